"""docs/cache-format.md and docs/model-format.md say what is in the files, and say all of it."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache.writer import open_writer
from tests.conftest import ROOT, MakeCache, skeleton
from tests.formats import plain_reader
from tests.formats.plain_reader import (
    DONE,
    PENDING,
    UNREADABLE,
    Arrays,
    Attributes,
    RefusedError,
    later_versions,
    read_cache,
    row_checksum,
    sha256_of,
    strings,
)
from train.fit.record.metrics import epoch_record, step_record
from train.fit.reports import EpochLog, StepLog
from train.model.bundle import load_bundle
from train.model.decoder import DecoderConfig

FORMATS = ROOT / "tests" / "formats"
FILES = FORMATS / "v0.1.0"
VERSIONS = ("v0.1.0", "v0.2.0")
CACHES = ("cache.h5", "pending.h5", "shard-1.h5", "shard-2.h5")
every_version = pytest.mark.parametrize("version", VERSIONS)
CACHE_PAGE = (ROOT / "docs" / "cache-format.md").read_text(encoding="utf-8")
MODEL_PAGE = (ROOT / "docs" / "model-format.md").read_text(encoding="utf-8")


def read(version: str, name: str) -> tuple[Arrays, Attributes]:
    return read_cache((FORMATS / version / name).read_bytes())


def first_cells(page: str, heading: str) -> set[str]:
    """The names in backticks in the first column of the tables below a heading."""
    section = re.split(rf"^#+ .*{re.escape(heading)}.*$", page, flags=re.MULTILINE)[1]
    section = re.split(r"^#+ ", section, flags=re.MULTILINE)[0]
    cells = re.findall(r"^\|([^|]+)\|", section, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_the_plain_reader_shares_no_code_with_the_program() -> None:
    tree = ast.parse(Path(plain_reader.__file__).read_text(encoding="utf-8"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported == {
        *("__future__", "hashlib", "itertools", "json", "struct", "typing", "zlib", "numpy")
    }


@every_version
def test_a_reader_written_from_the_page_reads_the_file(version: str) -> None:
    arrays, attributes = read(version, "cache.h5")
    expected = json.loads((FORMATS / version / "expected.json").read_text(encoding="utf-8"))
    assert strings(arrays, "image_ids") == expected["image_ids"]
    assert strings(arrays, "paths") == expected["paths"]
    assert strings(arrays, "captions") == expected["texts"]
    assert strings(arrays, "words") == expected["words"]
    assert arrays["words/counts"].tolist() == expected["counts"]
    done = arrays["status"] == DONE
    assert arrays["features"][done].astype(float) == pytest.approx(
        np.array(expected["features"]), abs=1e-4
    )
    unreadable = np.flatnonzero(arrays["status"] == UNREADABLE).tolist()
    assert [
        [strings(arrays, "paths")[row], plain_reader.error(arrays, row)] for row in unreadable
    ] == expected["errors"]
    assert attributes["views"] == "full,flip"
    words, (start, stop) = strings(arrays, "words"), arrays["captions/token_offsets"][:2]
    assert expected["texts"][0] == "A dog runs on the beach."
    tokens = [words[number] for number in arrays["captions/tokens"][start:stop]]
    assert tokens == ["a", "dog", "runs", "on", "the", "beach", "."]


@every_version
@pytest.mark.parametrize("name", CACHES)
def test_checksums_and_sums_cover_what_the_page_says(version: str, name: str) -> None:
    arrays, attributes = read(version, name)
    finished = np.flatnonzero(arrays["status"] != PENDING).tolist()
    assert finished
    for row in finished:
        assert row_checksum(arrays, row) == arrays["checksums"][row]
    assert attributes["photos_sha256"] == sha256_of(
        arrays, "image_ids/offsets", "image_ids/text", "paths/offsets", "paths/text"
    )
    assert attributes["captions_sha256"] == sha256_of(
        arrays,
        *("captions/offsets", "captions/text", "words/offsets", "words/text"),
        *("captions/rows", "captions/tokens", "captions/token_offsets"),
    )


@every_version
def test_a_shard_names_the_whole_set(version: str) -> None:
    whole, attributes = read(version, "cache.h5")
    for number in (1, 2):
        _, shard = read(version, f"shard-{number}.h5")
        assert shard["shard"] == f"{number}/2"
        assert shard["shard_first_row"] == 8 * (number - 1)
        assert shard["all_rows"] == len(whole["status"])
        assert shard["all_photos_sha256"] == attributes["photos_sha256"]
        assert shard["all_captions_sha256"] == sha256_of(
            whole, "captions/offsets", "captions/text", "captions/rows"
        )


def test_the_page_names_every_array_and_attribute() -> None:
    arrays, attributes = read(VERSIONS[-1], "shard-1.h5")
    assert first_cells(CACHE_PAGE, "The arrays") == set(arrays)
    assert first_cells(CACHE_PAGE, "Attributes") == set(attributes)


def test_a_cache_of_today_is_as_the_page_says(make_cache: MakeCache) -> None:
    cache = make_cache([["A dog ."], [], ["Birds .", ""]] * 100, feature_dim=64)
    arrays, attributes = read_cache(cache.path.read_bytes())
    assert np.array_equal(arrays["features"], cache.features)
    assert strings(arrays, "captions") == list(cache.captions.texts)
    assert attributes["photos_sha256"] == cache.photos_sha256
    rows = range(len(cache))
    assert [row_checksum(arrays, row) for row in rows] == arrays["checksums"].tolist()
    assert later_versions(arrays) == []
    large = [name for name in arrays if cache.region(name).size_bytes >= 4096]
    assert {"features", "errors"} <= set(large)
    assert all(cache.region(name).offset % 4096 == 0 for name in large)


def test_versions_of_later_sessions_are_where_the_page_says(make_cache: MakeCache) -> None:
    path = make_cache([["A dog ."]]).path
    with open_writer(path, skeleton([["A dog ."]]), library_versions={"torch": "2.14"}) as writer:
        writer.write(np.array([0]), np.ones((1, 1, 8), np.float16), np.ones((1, 16), np.uint8))
    arrays, _ = read_cache(path.read_bytes())
    assert later_versions(arrays) == [{"torch": "2.14"}]


def test_a_cache_without_captions_is_as_the_page_says(make_cache: MakeCache) -> None:
    arrays, _ = read_cache(make_cache([[], []]).path.read_bytes())
    assert len(arrays["status"]) == 2
    for name in ("captions/rows", "captions/tokens", "words/counts", "captions/text"):
        assert len(arrays[name]) == 0
    assert arrays["captions/token_offsets"].tolist() == [0]


@every_version
def test_the_plain_reader_finds_any_flipped_byte(version: str) -> None:
    whole = (FORMATS / version / "cache.h5").read_bytes()
    arrays, _ = read_cache(whole)
    random = np.random.default_rng(0)
    for place in random.choice(len(whole), 300, replace=False).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(8))
        try:
            found, _ = read_cache(bytes(damaged))
            if version != "v0.1.0":
                later_versions(found)
        except RefusedError:
            continue
        differing = [
            row
            for row in range(len(found["status"]))
            if found["status"][row] != arrays["status"][row]
            or row_checksum(found, row) != found["checksums"][row]
        ]
        assert len(differing) == 1 or _is_in_unread_features(arrays, whole, place)


def _is_in_unread_features(arrays: Arrays, whole: bytes, place: int) -> bool:
    """Whether a byte belongs to the features of an unreadable row, which may be anything."""
    seal = json.loads(whole[20:].split(b"\0")[0])
    row_bytes = arrays["features"][0].nbytes
    row = int(place - seal["arrays"]["features"][2]) // row_bytes
    return 0 <= row < len(arrays["status"]) and bool(arrays["status"][row] == UNREADABLE)


def bundle(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors' places, the record) of a model file, read as docs/model-format.md says."""
    return model_parts((FILES / "run" / name).read_bytes())


def model_parts(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    record = json.loads(header.pop("__metadata__")["cap_bundle"])
    assert max(place["data_offsets"][1] for place in header.values()) == len(data) - 8 - length
    return header, record


def model_checksum(data: bytes) -> str:
    """The checksum of a model file, computed as docs/model-format.md says."""
    before, digits, after = re.split(rb'(?<=\\"crc32\\": \\")([0-9a-f]{8})', data, maxsplit=1)
    assert len(digits) == 8
    return f"{zlib.crc32(before + b'00000000' + after):08x}"


@pytest.mark.parametrize("name", ["best.cap", "last.cap"])
def test_a_model_file_is_as_its_page_says(name: str) -> None:
    tensors, record = bundle(name)
    assert set(record) == {"version", "decoder", "vocabulary", "encoder", "training"}
    assert first_cells(MODEL_PAGE, "A model") >= {*record, *tensors}
    for member in ("decoder", "vocabulary", "encoder", "training"):
        for field in record[member]:
            assert f"`{field}`" in MODEL_PAGE, field
    sizes = record["decoder"]
    w, e, h, d = (
        sizes[field] for field in ("vocab_size", "embedding_size", "hidden_size", "feature_dim")
    )
    assert len(record["vocabulary"]["words"]) + 4 == w
    assert sizes["tie_embeddings"]
    assert "head.weight" not in tensors
    shapes = {
        "project.weight": [e, d],
        "embed.weight": [w, e],
        "lstm.weight_ih_l0": [4 * h, e],
        "lstm.weight_hh_l0": [4 * h, h],
        "transform.weight": [e, h],
        "head.bias": [w],
        "normalize.running_var": [e],
    }
    for tensor, shape in shapes.items():
        assert tensors[tensor]["shape"] == shape, tensor
        assert tensors[tensor]["dtype"] == "F32"


def test_the_page_names_every_option_of_a_decoder() -> None:
    for field in dataclasses.fields(DecoderConfig):
        assert f"`{field.name}`" in MODEL_PAGE, field.name


def test_a_model_of_today_has_the_checksum_that_its_page_says(tmp_path: Path) -> None:
    load_bundle(FILES / "run" / "best.cap").save(tmp_path / "x.cap")
    data = (tmp_path / "x.cap").read_bytes()
    tensors, record = model_parts(data)
    assert record["crc32"] == model_checksum(data)
    old_tensors, old_record = bundle("best.cap")
    assert record == old_record | {"crc32": record["crc32"]}
    assert tensors == old_tensors
    assert first_cells(MODEL_PAGE, "A model") >= {*record, *tensors}
    load_bundle(tmp_path / "x.cap")
    foreign = data.replace(rb"\"epoch\": ", rb"\"Epoch\": ", 1)  # by another program's writer
    assert foreign != data
    old, new = record["crc32"].encode(), model_checksum(foreign).encode()
    (tmp_path / "y.cap").write_bytes(foreign.replace(old, new, 1))
    assert "Epoch" in load_bundle(tmp_path / "y.cap").training


def test_a_run_folder_is_as_its_page_says() -> None:
    folder = first_cells(MODEL_PAGE, "A run")
    assert {path.name for path in (FILES / "run").iterdir()} <= folder
    state = torch.load(FILES / "run" / "checkpoint.pt", weights_only=True)
    assert set(state) <= folder
    for part in (*state["trainer"], *state["trainer"]["optimizer"], *state["data"]):
        assert f"`{part}`" in MODEL_PAGE, part
    shown = re.search(r"```json\n(.*?)```", MODEL_PAGE, re.DOTALL)
    assert shown
    examples = [json.loads(line) for line in shown[1].splitlines()]
    text = (FILES / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    steps, epochs = examples
    assert all(set(line) <= set(epochs if "val_loss" in line else steps) for line in lines)


def test_a_log_of_today_has_the_members_that_its_page_says() -> None:
    shown = re.search(r"```json\n(.*?)```", MODEL_PAGE, re.DOTALL)
    assert shown
    steps = StepLog(0, 1, 10, 94, 5.31, 1391.3, learning_rate=0.002, steps_per_s=10.87)
    epochs = EpochLog(0, 1, 3.42, 0.11, 0.35, 212 / 300, best=True, seconds=9.4, photos=300)
    written = [step_record(steps), epoch_record(epochs)]
    written = [line | {"perplexity": round(line["perplexity"], 2)} for line in written]
    assert [json.dumps(line) for line in written] == shown[1].splitlines()
