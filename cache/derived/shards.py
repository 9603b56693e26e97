"""The caches that a catalogue lists, and the features in them.

A catalogue is a cache without the array `features`. These arrays say where the features are, for F
files:

- `shards/paths/text`, `shards/paths/offsets`: F paths, relative to the catalogue's folder
- `shards/rows` (F,) int64: the number of rows of each, which follow one another in the catalogue
- `shards/sizes` (F,) int64: bytes
- `shards/seals` (F, 16) uint8: BLAKE2b-128 of the first 16,384 bytes
"""

from __future__ import annotations

import contextlib
import hashlib
import operator
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.derived.rows import read_into, runs
from cache.record import CacheError, Strings, offsets_of
from cache.seal import SEAL_BYTES, read_seal

SEAL_DIGEST_BYTES = 16
FILLS_NO_CATALOGUE = (
    "is a catalogue, which lists caches and is not filled itself; name another --out, or the cache "
    "in which the photos are"
)
_PENDING = 0
_AGAIN = "list the caches again with `cap merge --catalogue --overwrite`"


@dataclass(frozen=True)
class Listed:
    """A cache as a catalogue lists it."""

    path: str  # relative to the catalogue's folder
    rows: int
    size_bytes: int
    seal_digest: bytes  # as `seal_digest` computes it


def listed_arrays(shards: Sequence[Listed]) -> dict[str, NDArray[Any]]:
    """The arrays of a catalogue that list these caches."""
    paths = Strings.pack(shard.path for shard in shards)
    seals = b"".join(shard.seal_digest for shard in shards)
    return {
        "shards/paths/text": paths.text,
        "shards/paths/offsets": paths.offsets,
        "shards/rows": np.array([shard.rows for shard in shards], np.int64),
        "shards/sizes": np.array([shard.size_bytes for shard in shards], np.int64),
        "shards/seals": np.frombuffer(seals, np.uint8).reshape(-1, SEAL_DIGEST_BYTES),
    }


@dataclass(frozen=True)
class _Place:
    """Where the features of a cache are, in a file that looked like this when it was checked."""

    identity: tuple[int, int, int, int]  # device, inode, size, time of the last change
    offset: int  # of the features


class ShardedFeatures:
    """The features (N, V, D) float16 of a catalogue. Indexing reads rows from their files.

    It has of an array what readers of a cache use: `shape`, `dtype`, `nbytes`, `len`, indexing and
    conversion to an array. Each file is opened for each read, so their number is not limited.
    """

    def __init__(
        self,
        catalogue: Path,
        folder: Path,
        listed: Sequence[Listed],
        *,
        row_shape: tuple[int, int],
        status: NDArray[np.uint8],
        checksums: NDArray[np.uint32],
    ) -> None:
        """folder: where relative paths begin. row_shape: (V, D). status, checksums: (N,) of the
        catalogue's rows. Raises CacheError, without the catalogue's name, if a file is missing or
        is not as it was listed.
        """
        self.listed = listed
        self.dtype = np.dtype(np.float16)
        self.shape = (len(status), *row_shape)
        self._catalogue, self._folder = catalogue, folder
        self._status, self._checksums = status, checksums
        self._first_rows = offsets_of(np.array([shard.rows for shard in listed], np.int64))
        if self._first_rows[-1] != len(status):
            raise CacheError("damaged (its caches have another number of rows)")
        self._places: list[_Place] = []
        for number in range(len(listed)):
            with self._file(number) as fd:
                self._places.append(self._checked(number, fd))

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("the features of a catalogue are read from files, which is a copy")
        return self[:].astype(self.dtype if dtype is None else dtype, copy=False)

    def __getitem__(self, key: Any) -> NDArray[np.float16]:
        """As of an array, copied. The rows come first in a key, as a number, slice or array.

        Raises IndexError, and CacheError as `read_rows` does.
        """
        first, *rest = key if isinstance(key, tuple) else (key,)
        if first is Ellipsis:
            whole: NDArray[np.float16] = self.read_rows(np.arange(len(self)))[key]
            return whole
        if isinstance(first, slice):
            rows = np.arange(*first.indices(len(self)))
            chosen: Any = slice(None)
        elif isinstance(first, (list, np.ndarray)):
            given = np.asarray(first)
            if given.dtype == bool:
                if given.shape != (len(self),):
                    raise IndexError(f"a mask of {given.shape} for {len(self)} rows")
                given = np.flatnonzero(given)
            elif given.size and given.dtype.kind not in "iu":
                raise IndexError(f"rows are whole numbers, not {given.dtype}")
            rows = given.astype(np.int64).reshape(-1)
            chosen = np.arange(rows.size).reshape(given.shape)
        else:
            try:
                rows = np.array([operator.index(first)])
            except TypeError:
                raise IndexError(f"rows are numbers, slices or arrays, not {first!r}") from None
            chosen = 0
        if len(rows) and not -len(self) <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"row {rows.min()} or {rows.max()} of {len(self)}")
        values: NDArray[np.float16] = self.read_rows(rows % max(1, len(self)))[(chosen, *rest)]
        return values

    def read_rows(
        self, rows: NDArray[np.int64], out: NDArray[np.float16] | None = None
    ) -> NDArray[np.float16]:
        """Features (B, V, D) of these rows (B,), from 0 on, in memory, or in `out`.

        Raises CacheError if a file is missing, has changed, or cannot be read.
        """
        features = np.empty((len(rows), *self.shape[1:]), self.dtype) if out is None else out
        row_bytes = features[:1].nbytes
        with contextlib.ExitStack() as stack:
            opened = -1
            for run in runs(rows):
                start = run.start
                while start < run.stop:
                    row = int(rows[start])
                    number = int(np.searchsorted(self._first_rows, row, "right")) - 1
                    if number != opened:
                        stack.close()
                        fd, opened = stack.enter_context(self._opened(number)), number
                    stop = min(run.stop, start + int(self._first_rows[number + 1]) - row)
                    offset = self._places[number].offset
                    position = offset + (row - int(self._first_rows[number])) * row_bytes
                    if not read_into(fd, features[start:stop], position):
                        raise CacheError(f"{self.path(number)}: the file has become shorter")
                    start = stop
        return features

    def path(self, number: int) -> Path:
        """Where a file should be."""
        return Path(os.path.normpath(self._folder / self.listed[number].path))

    @contextlib.contextmanager
    def _opened(self, number: int) -> Iterator[int]:
        """A descriptor of a file that is as it was listed."""
        try:
            with self._file(number) as fd:
                if _identity(fd) != self._places[number].identity:
                    self._places[number] = self._checked(number, fd)
                yield fd
        except CacheError as error:
            raise CacheError(f"{self._catalogue}: {error}") from None

    @contextlib.contextmanager
    def _file(self, number: int) -> Iterator[int]:
        path = self.path(number)
        try:
            # O_NONBLOCK, because opening a named pipe would wait for a writer.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise CacheError(
                f"{path}, which it lists, is not there; put it back, or {_AGAIN}"
            ) from None
        except OSError as error:
            raise CacheError(f"cannot open {path} ({error.strerror})") from None
        try:
            yield fd
        except OSError as error:
            raise CacheError(f"cannot read {path} ({error.strerror})") from None
        finally:
            os.close(fd)

    def _checked(self, number: int, fd: int) -> _Place:
        """Where the features are. Raises CacheError unless the file is as it was listed, with the
        same names and captions and, by their checksums, the same rows.
        """
        shard, path, identity = self.listed[number], self.path(number), _identity(fd)
        size = os.fstat(fd).st_size
        if size != shard.size_bytes:
            raise CacheError(
                f"{path} has {size:,} bytes, but {shard.size_bytes:,} when it was listed; {_AGAIN}"
            )
        if seal_digest(os.pread(fd, SEAL_BYTES, 0)) != shard.seal_digest:
            raise CacheError(f"{path} is another cache than when it was listed; {_AGAIN}")
        seal = read_seal(fd)
        region = seal.arrays.get("features")
        if (
            region is None
            or region.dtype != self.dtype
            or region.shape != (shard.rows, *self.shape[1:])
            or region.offset + region.size_bytes > size
        ):
            raise CacheError(f"damaged (the features of {path} have another shape)")
        rows = slice(int(self._first_rows[number]), int(self._first_rows[number + 1]))
        for name, expected in (("status", self._status), ("checksums", self._checksums)):
            there = np.empty(shard.rows, expected.dtype)
            place = seal.arrays.get(name)
            if place is None or place.size_bytes != there.nbytes:
                raise CacheError(f"damaged (the {name} of {path} have another shape)")
            if not read_into(fd, there, place.offset):
                raise CacheError(f"{path} ends too soon; {_AGAIN}")
            if name == "status" and (pending := int((there == _PENDING).sum())):
                raise CacheError(
                    f"{pending:,} of {len(there):,} photos of {path} are not extracted yet; run "
                    "the same `cap extract-features` again to finish it"
                )
            if not np.array_equal(there, expected[rows]):
                raise CacheError(f"{path} has other rows than when it was listed; {_AGAIN}")
        return _Place(identity, region.offset)


def is_catalogue(path: Path) -> bool:
    """Whether a file is a catalogue, as far as its seal says."""
    try:
        with path.open("rb") as file:
            return "features" not in read_seal(file.fileno()).arrays
    except (OSError, CacheError):
        return False


def seal_digest(block: bytes) -> bytes:
    """Identifies a cache by its first 16,384 bytes, with the checksum of all that never changes."""
    return hashlib.blake2b(block, digest_size=SEAL_DIGEST_BYTES).digest()


def _identity(fd: int) -> tuple[int, int, int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
