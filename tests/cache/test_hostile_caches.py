"""Damaged caches and files made to look like caches give an error in one line, or the right rows.

Checksums reveal accidents. Whoever manipulates a file recomputes the checksums. That must not lead
to a crash, to unlimited use of memory or to rows of other photos either.
"""

from __future__ import annotations

import copy
import json
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from cache import seal
from cache.record import CacheError
from cache.store import FeatureCache, open_cache
from cache.verify import verify
from tests.cache.test_store import fill
from tests.conftest import MakeCache

HEADER = struct.Struct("<8sIII")


def read_record(whole: bytes | bytearray) -> dict[str, Any]:
    _, _, length, _ = HEADER.unpack_from(whole)
    record: dict[str, Any] = json.loads(whole[HEADER.size : HEADER.size + length])
    return record


def forge(whole: bytes, record: dict[str, Any]) -> bytes:
    """The file with this record in its seal, and valid checksums of the seal."""
    text = json.dumps(record).encode()
    block = HEADER.pack(seal.MAGIC, seal.FORMAT_VERSION, len(text), zlib.crc32(text)) + text
    return block.ljust(seal.SEAL_BYTES, b"\0") + whole[seal.SEAL_BYTES :]


def reseal(whole: bytes, record: dict[str, Any]) -> bytes:
    """`forge`, with the checksums over the fixed bytes recomputed."""
    record = copy.deepcopy(record)
    between, end = 0, seal.SEAL_BYTES
    for name, (dtype, shape, offset) in sorted(
        record["arrays"].items(), key=lambda item: int(item[1][2])
    ):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if size:
            between, end = zlib.crc32(whole[end:offset], between), offset + size
            if name not in seal.MUTABLE:
                record["crc32s"][name] = zlib.crc32(whole[offset:end])
    record["crc32s"][""] = zlib.crc32(whole[end:], between)
    crc, position = 0, seal.SEAL_BYTES
    mutable = sorted(
        (record["arrays"][name][2], *record["arrays"][name][:2]) for name in seal.MUTABLE
    )
    for offset, dtype, shape in mutable:
        crc = zlib.crc32(whole[position:offset], crc)
        position = offset + int(np.prod(shape)) * np.dtype(dtype).itemsize
    record["crc32"] = zlib.crc32(whole[position:], crc)
    return forge(whole, record)


def read_everything(path: Path) -> None:
    """Do what the commands do with a cache."""
    cache = FeatureCache(path)
    list(cache.image_ids), list(cache.paths), cache.errors()
    cache.captions.by_row(len(cache))
    [cache.captions.words[token] for token in cache.captions.tokens.tolist()]
    cache.load_features()
    verify(cache)


def test_the_seal_tells_what_hdf5_tells(tmp_path: Path) -> None:
    fill(tmp_path / "x.h5")
    record = read_record((tmp_path / "x.h5").read_bytes())
    with h5py.File(tmp_path / "x.h5", "r") as file:
        assert dict(file.attrs) == record["attributes"]
        datasets: dict[str, Any] = {}
        file.visititems(
            lambda name, item: datasets.update({name: item}) if hasattr(item, "dtype") else None
        )
        assert datasets.keys() == record["arrays"].keys()
        for name, (dtype, shape, offset) in record["arrays"].items():
            assert datasets[name].dtype.str == dtype
            assert datasets[name].shape == tuple(shape)
            assert datasets[name].id.get_offset() == offset


def test_reading_needs_no_hdf5(tmp_path: Path) -> None:
    """The HDF5 library crashes on crafted files, so readers must not use it."""
    fill(tmp_path / "x.h5")
    whole = bytearray((tmp_path / "x.h5").read_bytes())
    record = read_record(whole)
    whole[seal.SEAL_BYTES : seal.SEAL_BYTES + 512] = os.urandom(512)  # HDF5's superblock
    (tmp_path / "x.h5").write_bytes(reseal(bytes(whole), record))
    cache = open_cache(tmp_path / "x.h5")
    assert cache.paths[2] == "0002.jpg"
    assert list(cache.captions.words)[:2] == [".", "a"]


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_end_in_one_line_or_a_found_row(tmp_path: Path, seed: int) -> None:
    """A hundred files per seed: truncated, extended, overwritten, or with blocks swapped."""
    path = tmp_path / "x.h5"
    fill(path)
    whole = path.read_bytes()
    with h5py.File(path, "r") as file:
        start = file["features"].id.get_offset() + 16
    chance = random.Random(seed)

    def truncate(data: bytearray) -> None:
        del data[chance.randrange(len(data)) :]

    def extend(data: bytearray) -> None:
        data.extend(chance.randbytes(chance.randrange(1, 5000)))

    def overwrite(data: bytearray) -> None:
        for _ in range(chance.choice([1, 1, 4, 64])):
            position = chance.randrange(len(data))
            data[position : position + 1] = chance.randbytes(1)

    def swap(data: bytearray) -> None:
        size = chance.choice([16, 512, 4096])
        one, other = (chance.randrange(len(data) // size) * size for _ in range(2))
        data[one : one + size], data[other : other + size] = (
            data[other : other + size],
            data[one : one + size],
        )

    def zero(data: bytearray) -> None:
        position, size = chance.randrange(len(data)), chance.choice([1, 512, 4096])
        data[position : position + size] = bytes(len(data[position : position + size]))

    messages: list[str] = []
    for _ in range(100):
        data = bytearray(whole)
        chance.choice([truncate, extend, overwrite, swap, zero])(data)
        # The features of an unreadable row are never read, so damage to them does not matter.
        data[start : start + 16] = whole[start : start + 16] if len(data) > start + 16 else b""
        path.write_bytes(data)
        try:
            report, _ = verify(open_cache(path))
            assert not report.ok or data == whole
        except CacheError as error:
            messages.append(str(error))
    assert not [message for message in messages if "\n" in message]


@pytest.mark.parametrize("seed", range(4))
def test_mutated_records_under_valid_checksums_are_refused_or_harmless(
    tmp_path: Path, seed: int
) -> None:
    """Wrong types, negative and gigantic numbers, missing names, overlapping arrays."""
    path = tmp_path / "x.h5"
    fill(path)
    whole = path.read_bytes()
    chance = random.Random(seed)
    odd: list[Any] = [
        None, -1, 0, 1, 2, 7, 2**31, 2**62, 2**70, 1.5, float("nan"), True, "", "x", "<f8", "|O",
        "[" * 900, [], [[]], [1, 2], {}, {"a": 1}, "1/0", "9/2", "\ud800",
    ]  # fmt: skip

    def mutate(value: Any) -> Any:
        if isinstance(value, dict) and value and chance.random() < 0.9:
            name = chance.choice(sorted(value))
            if chance.random() < 0.1:
                del value[name]
            else:
                value[name] = mutate(value[name])
            return value
        if isinstance(value, list) and value and chance.random() < 0.8:
            place = chance.randrange(len(value))
            value[place] = mutate(value[place])
            return value
        return chance.choice(odd)

    messages: list[str] = []
    for _ in range(150):
        record = read_record(whole)
        for _ in range(chance.choice([1, 1, 2])):
            record = mutate(record)
        try:
            path.write_bytes(reseal(whole, record))
        except (TypeError, ValueError, LookupError, AttributeError, OverflowError):
            path.write_bytes(forge(whole, record))
        try:
            read_everything(path)
        except CacheError as error:
            messages.append(str(error))
    assert len(messages) > 75
    assert not [message for message in messages if "\n" in message]


@pytest.mark.parametrize("seed", range(2))
def test_mutated_contents_under_valid_checksums_are_refused_or_harmless(
    tmp_path: Path, seed: int
) -> None:
    """Offsets out of order, rows and words out of range: they are refused before any indexing."""
    path = tmp_path / "x.h5"
    fill(path)
    whole, record = path.read_bytes(), read_record(path.read_bytes())
    chance = random.Random(seed)
    fixed = sorted(set(record["arrays"]) - set(seal.MUTABLE))
    messages: list[str] = []
    for _ in range(150):
        data = bytearray(whole)
        dtype, shape, offset = record["arrays"][chance.choice(fixed)]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        for _ in range(chance.choice([1, 2])):
            data[offset + chance.randrange(size)] = chance.choice([0, 1, 127, 128, 255])
        path.write_bytes(reseal(bytes(data), record))
        try:
            read_everything(path)
        except CacheError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert not [message for message in messages if "\n" in message]


def replaced(name: str, values: Any, dtype: str) -> Callable[[bytes], bytes]:
    def change(whole: bytes) -> bytes:
        record = read_record(whole)
        offset = record["arrays"][name][2]
        data = np.array(values, dtype).tobytes()
        return reseal(whole[:offset] + data + whole[offset + len(data) :], record)

    return change


@pytest.mark.parametrize(
    "change",
    [
        replaced("captions/rows", [0, 0, 3], "<i4"),
        replaced("captions/rows", [-1, 0, 2], "<i4"),
        replaced("captions/rows", [2, 0, 0], "<i4"),
        replaced("captions/tokens", [8], "<i4"),
        replaced("captions/tokens", [-1], "<i4"),
        replaced("captions/token_offsets", [0, 9, 7, 12], "<i8"),
        replaced("captions/token_offsets", [0, 4, 7, 13], "<i8"),
        replaced("paths/offsets", [0, 2**40], "<i8"),
        replaced("paths/offsets", [-8, 8], "<i8"),
        replaced("image_ids/offsets", [1], "<i8"),
        replaced("words/counts", [3, 2, 0], "<i8"),
        replaced("words/counts", [1, 2, 2], "<i8"),
    ],
)
@pytest.mark.parametrize("by_array", [True, False])
def test_numbers_that_would_be_indices_are_checked_before_they_are_used(
    tmp_path: Path, change: Callable[[bytes], bytes], by_array: bool
) -> None:
    path = tmp_path / "x.h5"
    fill(path)
    whole = change(path.read_bytes())
    if not by_array:  # as before there were checksums of single arrays
        record = read_record(whole)
        del record["crc32s"]
        whole = forge(whole, record)
    path.write_bytes(whole)
    with pytest.raises(CacheError, match="damaged"):
        open_cache(path).check()


@pytest.mark.parametrize("name", ["image_ids", "paths", "captions", "words"])
def test_names_and_captions_are_read_and_checked_when_they_are_used(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.h5"
    fill(path)
    whole, record = bytearray(path.read_bytes()), read_record(path.read_bytes())
    whole[record["arrays"][f"{name}/text"][2]] ^= 1
    path.write_bytes(whole)
    cache = open_cache(path)
    assert (cache.caption_count, cache.word_count) == (
        record["arrays"]["captions/rows"][1][0],
        record["arrays"]["words/counts"][1][0],
    )
    for attribute in ("image_ids", "paths", "captions"):
        if attribute == name.replace("words", "captions"):
            with pytest.raises(CacheError, match=rf"x\.h5: damaged \({name}/text changed\)"):
                getattr(cache, attribute)
        else:
            getattr(cache, attribute)
    with pytest.raises(CacheError, match="changed"):
        verify(cache)
    del record["crc32s"]
    path.write_bytes(forge(bytes(whole), record))
    with pytest.raises(CacheError, match="names, captions or structure changed"):
        open_cache(path)


@pytest.mark.parametrize("change", [lambda found: found.pop("paths/text"), dict.clear])
def test_a_seal_that_lacks_checksums_is_refused(
    change: Callable[[dict[str, int]], object], tmp_path: Path
) -> None:
    path = tmp_path / "x.h5"
    fill(path)
    record = read_record(path.read_bytes())
    change(record["crc32s"])
    path.write_bytes(forge(path.read_bytes(), record))
    with pytest.raises(CacheError, match="the seal is invalid"):
        open_cache(path)


def test_a_huge_declared_size_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    fill(path)
    whole = path.read_bytes()
    record = read_record(whole)
    record["arrays"]["features"][1] = [2**40, 1, 8]
    path.write_bytes(forge(whole, record))
    with pytest.raises(CacheError, match="its arrays do not fit into the file"):
        open_cache(path)


def test_an_older_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    fill(path)
    whole = bytearray(path.read_bytes())
    whole[8] = 1
    path.write_bytes(whole)
    with pytest.raises(CacheError, match="format version 1, this program reads 2 and 3; extract"):
        open_cache(path)


def test_a_cache_goes_to_another_process_as_its_path(make_cache: MakeCache) -> None:
    import pickle

    cache = make_cache([["a"], ["b"]])
    data = pickle.dumps(cache)
    assert len(data) < 300
    again = pickle.loads(data)
    assert np.array_equal(again.features, cache.features)
