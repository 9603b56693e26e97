"""The seal of a cache file: 4 KiB before the HDF5 data that make damage visible without HDF5.

HDF5 reserves a *user block* at the start of a file for the application. A cache keeps there a
checksum over every byte that never changes after the file is made: HDF5's own structures, names,
captions, tokens. It is checked before the HDF5 library sees the file, so a truncated, foreign or
damaged file ends in one clear line and never inside a C library. Layout, little-endian:

- bytes 0–7    `capcache`
- bytes 8–11   uint32 format version
- bytes 12–15  uint32 length L of the text
- bytes 16–19  uint32 CRC-32 of the text
- bytes 20–    L bytes of JSON: {"size": file size in bytes, "crc32": CRC-32 of all bytes from 4096
  on that are outside `mutable`, "mutable": [[offset, size], …] ascending}

The mutable ranges (features, status, digests, checksums, errors) carry a checksum per row instead.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path

from cache.record import CacheError

MAGIC = b"capcache"
FORMAT_VERSION = 1
SEAL_BYTES = 4096
_HEADER = struct.Struct("<8sIII")
_CHUNK_BYTES = 1 << 20

Ranges = list[tuple[int, int]]  # (offset, size), ascending and disjoint


def _fixed_crc32(fd: int, size: int, mutable: Ranges) -> int:
    crc, position = 0, SEAL_BYTES
    for start, length in [*mutable, (size, 0)]:
        while position < start:
            chunk = os.pread(fd, min(_CHUNK_BYTES, start - position), position)
            if not chunk:
                raise CacheError("the file is shorter than its own record of it")
            crc = zlib.crc32(chunk, crc)
            position += len(chunk)
        position = start + length
    return crc


def write_seal(fd: int, mutable: Ranges) -> None:
    """Seal an open file (read-write descriptor) whose fixed bytes are all written."""
    size = os.fstat(fd).st_size
    mutable = sorted(mutable)
    text = json.dumps(
        {"size": size, "crc32": _fixed_crc32(fd, size, mutable), "mutable": mutable}
    ).encode()
    block = _HEADER.pack(MAGIC, FORMAT_VERSION, len(text), zlib.crc32(text)) + text
    if len(block) > SEAL_BYTES:
        raise ValueError("too many mutable ranges for the seal")
    os.pwrite(fd, block.ljust(SEAL_BYTES, b"\0"), 0)


def is_cache(path: Path) -> bool:
    """Whether a file begins as a cache does; says nothing about its health."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def check_seal(path: Path) -> None:
    """Raise CacheError, naming the file, unless every fixed byte is as it was written."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CacheError(f"{path}: no such file") from None
    except OSError as error:
        raise CacheError(f"{path}: cannot open ({error.strerror})") from None
    try:
        _check_open_file(fd)
    except CacheError as error:
        raise CacheError(f"{path}: {error}") from None
    except OSError as error:
        raise CacheError(f"{path}: cannot read ({error.strerror})") from None
    finally:
        os.close(fd)


def _check_open_file(fd: int) -> None:
    block = os.pread(fd, SEAL_BYTES, 0)
    if len(block) < _HEADER.size or not block.startswith(MAGIC):
        raise CacheError("not a feature cache")
    _, version, length, text_crc = _HEADER.unpack_from(block)
    if version != FORMAT_VERSION:
        raise CacheError(
            f"cache format version {version}, this program reads {FORMAT_VERSION}; extract again"
        )
    text = block[_HEADER.size : _HEADER.size + length]
    if len(text) != length or zlib.crc32(text) != text_crc or any(block[_HEADER.size + length :]):
        raise CacheError("damaged (the seal does not match its own checksum)")
    record = json.loads(text)
    size = os.fstat(fd).st_size
    if size != record["size"]:
        raise CacheError(f"damaged ({size} bytes, must be {record['size']}); extract again")
    mutable = [(start, length) for start, length in record["mutable"]]
    if _fixed_crc32(fd, size, mutable) != record["crc32"]:
        raise CacheError("damaged (names, captions or structure changed); extract again")
