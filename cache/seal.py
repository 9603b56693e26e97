"""The seal of a cache file: 16 KiB before the HDF5 data that tell a reader all it needs to know.

HDF5 leaves a *user block* at the start of a file to the application. There a cache stores the place
of each of its arrays, how it was made, and a checksum of all bytes that never change after the file
is made. A reader checks these and then maps the arrays. It never uses the HDF5 library, which can
crash or hang on a manipulated file. Layout, little-endian:

- bytes 0–7    `capcache`
- bytes 8–11   uint32 format version
- bytes 12–15  uint32 length L of the text
- bytes 16–19  uint32 CRC-32 of the text
- bytes 20–    L bytes of JSON, then zeros: {"size": file size in bytes, "crc32": CRC-32 of all
  bytes from 16384 on that are outside mutable arrays, "crc32s": {name of an array that is not
  mutable: CRC-32 of its bytes, "": CRC-32 of the bytes that are in no array}, "arrays": {name:
  [dtype, shape, offset]}, "attributes": the root attributes of the HDF5 file}

A reader that knows `crc32s` opens a file without reading its names and captions, and checks an
array when it first uses it. Files that were made before `crc32s` was added are checked as a whole.
The mutable arrays have checksums of their own instead: of each row, and of each line of
`later_versions`.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache.record import CacheError

MAGIC = b"capcache"
FORMAT_VERSION = 3
READABLE_VERSIONS = (2, 3)
SEAL_BYTES = 16384
MUTABLE = ("features", "status", "digests", "errors", "checksums", "later_versions")
DTYPES = ("|u1", "<i4", "<u4", "<i8", "<f2")
_HEADER = struct.Struct("<8sIII")
_CHUNK_BYTES = 1 << 20
_BETWEEN = ""  # in `crc32s`, the bytes that are in no array


@dataclass(frozen=True)
class Region:
    """A contiguous array in the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file; 0 where the array is empty

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Seal:
    """The content of a checked seal. All regions lie within the file and none overlap."""

    version: int
    size_bytes: int
    arrays: Mapping[str, Region]
    attributes: Mapping[str, str | int]
    # CRC-32 of each array that is not mutable, and of the bytes in none; None if unknown.
    checksums: Mapping[str, int] | None = None


def write_seal(fd: int, arrays: Mapping[str, Region], attributes: Mapping[str, str | int]) -> None:
    """Seal an open file (read-write descriptor) after all its fixed bytes are written.

    Raises CacheError if the attributes are too long for the seal, and OSError.
    """
    size = os.fstat(fd).st_size
    whole, parts = _checksums(fd, size, arrays)
    text = json.dumps(
        {
            "size": size,
            "crc32": whole,
            "crc32s": parts,
            "arrays": {n: [a.dtype.str, a.shape, a.offset] for n, a in arrays.items()},
            "attributes": dict(attributes),
        }
    ).encode()
    block = _HEADER.pack(MAGIC, FORMAT_VERSION, len(text), zlib.crc32(text)) + text
    if len(block) > SEAL_BYTES:
        raise CacheError("the names of its weights and library versions are too long to store")
    os.pwrite(fd, block.ljust(SEAL_BYTES, b"\0"), 0)


def is_cache(path: Path) -> bool:
    """Whether a file begins like a cache. It may be damaged nevertheless."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def check_seal(fd: int) -> Seal:
    """Read the seal of an open file and check the file's structure.

    If the seal has no `checksums`, all fixed bytes are then as they were written. If it has them,
    only those outside arrays are, and `check_array` checks the arrays. Raises CacheError, whose
    message does not name the file, and OSError.
    """
    seal, crc = _read_seal(fd)
    actual = os.fstat(fd).st_size
    if actual != seal.size_bytes:
        raise CacheError(f"damaged ({actual} bytes, must be {seal.size_bytes}); extract again")
    position = SEAL_BYTES
    for region in _in_order(seal.arrays.values()):
        if region.offset < position or region.offset + region.size_bytes > seal.size_bytes:
            raise CacheError("damaged (its arrays do not fit into the file)")
        position = region.offset + region.size_bytes
    if seal.checksums is None:
        if _checksums(fd, seal.size_bytes, seal.arrays)[0] != crc:
            raise CacheError("damaged (names, captions or structure changed); extract again")
    elif _between_crc32(fd, seal) != seal.checksums[_BETWEEN]:
        raise CacheError("damaged (its structure changed); extract again")
    return seal


def check_array(fd: int, seal: Seal, name: str) -> None:
    """Check that an array that is not mutable is as it was written, unless `check_seal` has.

    Raises CacheError, whose message does not name the file, and OSError.
    """
    region = seal.arrays[name]
    if seal.checksums is None or not region.size_bytes:
        return
    crc = 0
    for chunk in _chunks(fd, region.offset, region.offset + region.size_bytes):
        crc = zlib.crc32(chunk, crc)
    if crc != seal.checksums[name]:
        raise CacheError(f"damaged ({name} changed); extract again")


def read_seal(fd: int) -> Seal:
    """The seal of an open file, not compared with the rest of the file.

    Raises CacheError, whose message does not name the file, and OSError.
    """
    return _read_seal(fd)[0]


def attributes_of(path: Path) -> Mapping[str, str | int] | None:
    """How a cache was made, read from its seal alone; None if the file is no readable cache."""
    try:
        with path.open("rb") as file:
            return read_seal(file.fileno()).attributes
    except (OSError, CacheError):
        return None


def _read_seal(fd: int) -> tuple[Seal, int]:
    """(the seal, not yet compared with the file; CRC-32 that the fixed bytes must have)."""
    block = os.pread(fd, SEAL_BYTES, 0)
    if len(block) < _HEADER.size or not block.startswith(MAGIC):
        raise CacheError("not a feature cache")
    _, version, length, text_crc = _HEADER.unpack_from(block)
    if version not in READABLE_VERSIONS:
        known = " and ".join(map(str, READABLE_VERSIONS))
        raise CacheError(
            f"cache format version {version}, this program reads {known}; extract again"
        )
    text = block[_HEADER.size : _HEADER.size + length]
    if len(text) != length or zlib.crc32(text) != text_crc or any(block[_HEADER.size + length :]):
        raise CacheError("damaged (the seal does not match its own checksum)")
    try:
        record = json.loads(text)
        size, crc = _natural(record["size"]), _natural(record["crc32"])
        arrays = {str(name): _region(value) for name, value in record["arrays"].items()}
        attributes = {str(name): _plain(value) for name, value in record["attributes"].items()}
        checksums = _checksums_of_parts(record.get("crc32s"), arrays)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CacheError("damaged (the seal is invalid)") from None
    return Seal(version, size, arrays, attributes, checksums), crc


def _natural(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError("not a natural number")
    return value


def _plain(value: object) -> str | int:
    if type(value) not in (str, int):
        raise ValueError("neither text nor a number")
    return value  # type: ignore[return-value]


def _region(value: list[Any]) -> Region:
    dtype, shape, offset = value
    if dtype not in DTYPES:
        raise ValueError("unknown dtype")
    return Region(np.dtype(dtype), tuple(_natural(extent) for extent in shape), _natural(offset))


def _in_order(regions: Iterable[Region]) -> list[Region]:
    return sorted((r for r in regions if r.size_bytes), key=lambda region: region.offset)


def _checksums_of_parts(
    record: Mapping[str, Any] | None, arrays: Mapping[str, Region]
) -> dict[str, int] | None:
    """Raises KeyError if one is missing."""
    if record is None:
        return None
    fixed = [name for name, region in arrays.items() if name not in MUTABLE and region.size_bytes]
    return {name: _natural(record[name]) for name in (_BETWEEN, *fixed)}


def _checksums(fd: int, size: int, arrays: Mapping[str, Region]) -> tuple[int, dict[str, int]]:
    """(CRC-32 of all fixed bytes, CRC-32 of each fixed array and of the bytes between arrays)."""
    whole, parts = 0, {_BETWEEN: 0}
    for name, start, stop in _parts(size, arrays):
        if name not in MUTABLE:
            for chunk in _chunks(fd, start, stop):
                whole = zlib.crc32(chunk, whole)
                parts[name] = zlib.crc32(chunk, parts.get(name, 0))
    return whole, parts


def _between_crc32(fd: int, seal: Seal) -> int:
    crc = 0
    for name, start, stop in _parts(seal.size_bytes, seal.arrays):
        if name == _BETWEEN:
            for chunk in _chunks(fd, start, stop):
                crc = zlib.crc32(chunk, crc)
    return crc


def _parts(size: int, arrays: Mapping[str, Region]) -> Iterator[tuple[str, int, int]]:
    """(name, start, stop) of each array with elements, and of the bytes between them, in order."""
    position = SEAL_BYTES
    for name in sorted((n for n in arrays if arrays[n].size_bytes), key=lambda n: arrays[n].offset):
        start = arrays[name].offset
        yield _BETWEEN, position, start
        position = start + arrays[name].size_bytes
        yield name, start, position
    yield _BETWEEN, position, size


def _chunks(fd: int, start: int, stop: int) -> Iterator[bytes]:
    while start < stop:
        chunk = os.pread(fd, min(_CHUNK_BYTES, stop - start), start)
        if not chunk:
            raise CacheError("the file is shorter than its seal says")
        yield chunk
        start += len(chunk)
