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
from cache.store import DONE, FeatureCache, open_cache
from cache.verify import check_rows, verify
from cache.writer import open_writer
from tests.cache.test_store import fill
from tests.conftest import MakeCache, skeleton

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
    """`forge`, with the checksum over the fixed bytes recomputed."""
    record = copy.deepcopy(record)
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
def test_numbers_that_would_be_indices_are_checked_at_opening(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "x.h5"
    fill(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CacheError, match="damaged"):
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


def test_a_replaced_file_is_read_on_as_the_old_one(make_cache: MakeCache) -> None:
    cache = make_cache([["a"], ["b"]])
    before = cache.features.copy()
    make_cache([["a"]], name="y.h5")
    cache.path.with_name("y.h5").replace(cache.path)
    for features in (cache.features, cache.load_features(), cache.read_rows(np.array([0, 1]))):
        assert np.array_equal(features, before)
    assert (cache.status == DONE).all()


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    """As `cp` does, with a cache of the same size."""
    path.write_bytes(path.with_name("y.h5").read_bytes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut_off, r"x\.h5: [\d,]+ bytes, but [\d,]+ when it was opened; another program has cut"),
        (overwrite, r"x\.h5: another program has overwritten it since it was opened; start again"),
    ],
)
def test_a_cache_that_changes_while_it_is_open_is_one_line(
    make_cache: MakeCache, change: Callable[[Path], None], message: str
) -> None:
    """Reading the mapping beyond the end would kill the process."""
    make_cache([["a"], ["c"]], feature_dim=4096, name="y.h5")
    cache = make_cache([["a"], ["b"]], feature_dim=4096)
    os.utime(cache.path, ns=(0, 0))  # a file system may count time in steps of milliseconds
    cache.check_unchanged()
    change(cache.path)
    for read in (
        cache.check_unchanged,
        cache.load_features,
        lambda: cache.read_rows(np.array([1])),
        lambda: verify(cache),
        lambda: check_rows(cache, np.array([0])),
    ):
        with pytest.raises(CacheError, match=message):
            read()


def test_a_cache_cut_off_in_the_middle_of_a_read_is_one_line(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache([["a"], ["b"]], feature_dim=4096)
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], position: int) -> int:
        cut_off(cache.path)
        return real(fd, buffers, position)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(CacheError, match="another program has cut it off"):
        cache.load_features()


def test_rows_that_are_filled_meanwhile_are_no_change(tmp_path: Path) -> None:
    with open_writer(tmp_path / "x.h5", skeleton([["a"], ["b"]]), library_versions={}) as writer:
        cache = open_cache(tmp_path / "x.h5", allow_pending=True)
        writer.write(np.array([1]), np.ones((1, 1, 8), np.float16), np.ones((1, 16), np.uint8))
        writer.flush()
        assert cache.status.tolist() == [0, DONE]
        assert cache.read_rows(np.array([1])).tolist() == [[[1.0] * 8]]
        assert cache.load_features()[1].tolist() == [[1.0] * 8]
