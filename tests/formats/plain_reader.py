"""A reader of cache files without code of `cache`: written from docs/cache-format.md alone.

It is the proof that the page is complete, and an example for readers in other languages. It needs
NumPy and Python's standard library. The numbers in comments are the page's steps.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

SEAL_BYTES = 16384
MUTABLE = ("features", "status", "digests", "errors", "checksums", "later_versions")
DTYPES = ("|u1", "<i4", "<u4", "<i8", "<f2")
PENDING, DONE, UNREADABLE = 0, 1, 2

Arrays = dict[str, NDArray[Any]]
Attributes = dict[str, Any]


class RefusedError(Exception):
    """The file is no cache, is damaged, or has a version that this reader does not know."""


def read_cache(data: bytes) -> tuple[Arrays, Attributes]:
    """(arrays by name, attributes) of a cache file's bytes. Raises RefusedError."""
    if len(data) < 20 or not data.startswith(b"capcache"):  # 1
        raise RefusedError("not a cache")
    version, length, text_crc = struct.unpack_from("<III", data, 8)
    if version not in (2, 3):  # 2
        raise RefusedError(f"version {version}, this reader knows 2 and 3")
    text = data[20 : 20 + length]
    if 20 + length > SEAL_BYTES or zlib.crc32(text) != text_crc:  # 3
        raise RefusedError("the seal's text does not match its checksum")
    if any(data[20 + length : SEAL_BYTES]):
        raise RefusedError("a byte behind the seal's text is not zero")
    try:
        seal = json.loads(text)  # 4
        if seal["size"] != len(data):  # 5
            raise RefusedError(f"{len(data)} bytes, must be {seal['size']}")
        arrays = _arrays(data, seal["arrays"])
        if _fixed_crc32(data, seal["arrays"]) != seal["crc32"]:  # 7
            raise RefusedError("a fixed byte has changed")
        _check_shapes(arrays, seal["attributes"])
        _check_indices(arrays)
        _check_attributes(seal["attributes"])
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"the seal makes no sense ({error})") from None
    return arrays, seal["attributes"]


def _arrays(data: bytes, places: dict[str, Any]) -> Arrays:
    arrays: Arrays = {}
    taken = []
    for name, (dtype, shape, offset) in places.items():
        if dtype not in DTYPES or not all(type(x) is int and x >= 0 for x in (offset, *shape)):
            raise ValueError(name)
        size = _size(dtype, shape)
        taken += [(offset, offset + size)] if size else []
        count = size // np.dtype(dtype).itemsize
        flat = np.frombuffer(data, dtype, count, offset) if size else np.zeros(0, dtype)
        arrays[name] = flat.reshape(shape)
    bounds = [(0, SEAL_BYTES), *sorted(taken), (len(data), len(data))]
    if any(stop > start for (_, stop), (start, _) in pairwise(bounds)):  # 6
        raise RefusedError("arrays overlap, or lie in the seal or beyond the end")
    return arrays


def _size(dtype: str, shape: list[int]) -> int:
    size = np.dtype(dtype).itemsize
    for extent in shape:
        size *= extent
    return size


def _fixed_crc32(data: bytes, places: dict[str, Any]) -> int:
    mutable = [(place[2], _size(*place[:2])) for name, place in places.items() if name in MUTABLE]
    crc, position = 0, SEAL_BYTES
    for offset, size in sorted(place for place in mutable if place[1]):
        crc = zlib.crc32(data[position:offset], crc)
        position = offset + size
    return zlib.crc32(data[position:], crc)


def _check_shapes(arrays: Arrays, attributes: Attributes) -> None:  # 8
    n, m = len(arrays["status"]), len(arrays["captions/rows"])
    k, w = len(arrays["captions/tokens"]), len(arrays["words/counts"])
    v, d = len(attributes["views"].split(",")), attributes["feature_dim"]
    expected = {
        "features": ("<f2", (n, v, d)),
        "status": ("|u1", (n,)),
        "digests": ("|u1", (n, 16)),
        "errors": ("|u1", (n, 96)),
        "checksums": ("<u4", (n,)),
        "captions/rows": ("<i4", (m,)),
        "captions/tokens": ("<i4", (k,)),
        "captions/token_offsets": ("<i8", (m + 1,)),
        "words/counts": ("<i8", (w,)),
    }
    if "image_ids/numbers" in arrays:
        expected["image_ids/numbers"] = ("|u1", (n,))
    if "later_versions" in arrays:
        expected["later_versions"] = ("|u1", (4096,))
    for name, count in (("image_ids", n), ("paths", n), ("captions", m), ("words", w)):
        expected[f"{name}/text"] = ("|u1", (arrays[f"{name}/text"].size,))
        expected[f"{name}/offsets"] = ("<i8", (count + 1,))
    for name, (dtype, shape) in expected.items():
        if (arrays[name].dtype.str, arrays[name].shape) != (dtype, shape):
            raise RefusedError(f"{name} is {arrays[name].dtype.str} {arrays[name].shape}")


def _check_indices(arrays: Arrays) -> None:  # 9
    ends = {
        f"{name}/offsets": arrays[f"{name}/text"].size
        for name in ("image_ids", "paths", "captions", "words")
    }
    for name, end in (ends | {"captions/token_offsets": arrays["captions/tokens"].size}).items():
        offsets = arrays[name]
        if offsets[0] != 0 or offsets[-1] != end or (np.diff(offsets) < 0).any():
            raise RefusedError(f"{name} do not rise from 0 to {end}")
    for name, end in (
        ("captions/rows", len(arrays["status"])),
        ("captions/tokens", len(arrays["words/counts"])),
        ("status", 3),
    ):
        if (arrays[name] < 0).any() or (arrays[name] >= end).any():
            raise RefusedError(f"{name} has a number beyond {end - 1}")
    counts = arrays["words/counts"]
    if (np.diff(arrays["captions/rows"]) < 0).any() or (np.diff(counts) > 0).any():
        raise RefusedError("captions/rows or words/counts are not in order")
    if (counts < 1).any():
        raise RefusedError("a word occurs nowhere")


def _check_attributes(attributes: Attributes) -> None:  # 10
    for name in (
        *("backbone", "weights", "weights_sha256", "preprocessing", "precision"),
        *("photos_sha256", "captions_sha256", "library_versions"),
    ):
        if not isinstance(attributes[name], str):
            raise ValueError(name)
    if min(attributes[name] for name in ("batch_rows", "image_size", "feature_dim")) < 1:
        raise RefusedError("a size is below 1")
    if "shard" in attributes:
        number, count = map(int, attributes["shard"].split("/"))
        if not 1 <= number <= count:
            raise RefusedError(f"there is no shard {number} of {count}")
        if not 0 <= attributes["shard_first_row"] < attributes["all_rows"]:
            raise RefusedError("the shard begins outside the whole set")


def strings(arrays: Arrays, name: str) -> list[str]:
    """The list of strings `name/text`, `name/offsets`."""
    text, offsets = arrays[f"{name}/text"].tobytes(), arrays[f"{name}/offsets"].tolist()
    return [text[a:b].decode("utf-8", "surrogateescape") for a, b in pairwise(offsets)]


def error(arrays: Arrays, row: int) -> str:
    """Why a row is unreadable."""
    return bytes(arrays["errors"][row]).rstrip(b"\0").decode()


def row_checksum(arrays: Arrays, row: int) -> int:
    """What `checksums` holds for a row that is done or unreadable."""
    covered = b""
    if "later_versions" in arrays:  # format version 3
        start, stop = arrays["paths/offsets"][row : row + 2].tolist()
        covered = arrays["paths/text"][start:stop].tobytes()
    covered += arrays["digests"][row].tobytes() + arrays["errors"][row].tobytes()
    if arrays["status"][row] == DONE:
        covered += arrays["features"][row].tobytes()
    return zlib.crc32(covered)


def later_versions(arrays: Arrays) -> list[dict[str, str]]:
    """The library versions of later sessions. Raises RefusedError if a byte has changed."""
    found = []
    lines = arrays["later_versions"].tobytes().rstrip(b"\0").splitlines()
    for line in lines:
        checksum, _, text = line.partition(b" ")
        if checksum != b"%08x" % zlib.crc32(text):
            raise RefusedError("a line of later_versions does not match its checksum")
        found.append(json.loads(text))
    return found


def sha256_of(arrays: Arrays, *names: str) -> str:
    """SHA-256 of some arrays' bytes, one array after the other."""
    return hashlib.sha256(b"".join(arrays[name].tobytes() for name in names)).hexdigest()
