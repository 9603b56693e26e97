"""Fills a cache: one writer at a time, finished rows are safe, and interruptions can be resumed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cache.create import create_file
from cache.record import CacheError, Shard, Skeleton
from cache.store import (
    DONE,
    ERROR_BYTES,
    PENDING,
    UNREADABLE,
    FeatureCache,
    row_checksum,
)

_GO_ON = "what is done is kept, run the same command again to go on"
_NO_ERROR = np.zeros(ERROR_BYTES, np.uint8)


class CacheWriter:
    """Writes rows to a cache file and keeps track of their status. Open one with `open_writer`.

    Rows are written to the file at once. `flush` writes their status when the rows themselves are
    on the disk, so a row marked "done" is done even after a power cut. The lock on the file belongs
    to the descriptor and ends with the process.
    """

    def __init__(self, path: Path, fd: int, advice: str = _GO_ON) -> None:
        self.path = path
        self._advice = advice  # for the user, in case the disk fails
        self.cache = FeatureCache(path)
        self._fd = fd
        self._status = np.array(self.cache.status)  # as it will be after the next flush
        self._dirty: list[NDArray[np.int64]] = []

    @property
    def status(self) -> NDArray[np.uint8]:
        """(N,) the status of all rows, including those not flushed yet. Do not write to it."""
        return self._status

    def write(
        self, rows: NDArray[np.int64], features: NDArray[np.float16], digests: NDArray[np.uint8]
    ) -> None:
        """Store rows as done. features: (B, V, D) float16; digests: (B, 16) uint8.

        Raises CacheError if the disk is full or gone. Rows that were flushed before stay valid.
        """
        checksums = np.array(
            [
                row_checksum(digest, _NO_ERROR, row)
                for digest, row in zip(digests, features, strict=True)
            ],
            np.uint32,
        )
        for run in _runs(rows):
            first = int(rows[run.start])
            self._put("features", first, features[run])
            self._put("digests", first, digests[run])
            self._put("checksums", first, checksums[run])
            self._put("errors", first, np.zeros((run.stop - run.start, ERROR_BYTES), np.uint8))
        self._mark(rows, DONE)

    def set_unreadable(self, row: int, reason: str, digest: NDArray[np.uint8]) -> None:
        """Mark a photo as unreadable. reason: one line, cut to what the file can store."""
        error = np.zeros(ERROR_BYTES, np.uint8)
        text = " ".join(reason.split()).encode("utf-8", "replace")[:ERROR_BYTES]
        text = text.decode("utf-8", "ignore").encode()  # drop a character that the cut split
        error[: len(text)] = np.frombuffer(text, np.uint8)
        self._put("errors", row, error)
        self._put("digests", row, digest)
        self._put("checksums", row, np.uint32(row_checksum(digest, error, None)))
        self._mark(np.array([row]), UNREADABLE)

    def copy(self, first: int, source: FeatureCache, rows: NDArray[np.int64]) -> None:
        """Copy rows of another cache, none of them pending, to the rows from `first` on.

        Raises CacheError if one of them is damaged or the disk is full.
        """
        status = source.status[rows]
        features = source.features[rows]
        features[status != DONE] = 0  # they were never written and may have any content
        digests, errors, checksums = (
            source.digests[rows],
            source.error_bytes[rows],
            source.checksums[rows],
        )
        for place, row in enumerate(rows.tolist()):
            kept = features[place] if status[place] == DONE else None
            if row_checksum(digests[place], errors[place], kept) != checksums[place]:
                raise CacheError(
                    f"{source.path}: row {row} ({source.paths[row]}) does not match its checksum"
                )
        for name, values in (
            ("features", features),
            ("digests", digests),
            ("errors", errors),
            ("checksums", checksums),
        ):
            self._put(name, first, values)
        for kind in (DONE, UNREADABLE):
            self._mark(first + np.flatnonzero(status == kind), kind)

    def retry_unreadable(self) -> int:
        """Make all unreadable rows pending again. Returns how many there were."""
        rows = np.flatnonzero(self._status == UNREADABLE)
        self._mark(rows, PENDING)
        self.flush()
        return len(rows)

    def flush(self) -> None:
        """Sync everything written so far to the disk, then write the status of these rows."""
        if not self._dirty:
            return
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise self._failure(error) from None
        rows = np.unique(np.concatenate(self._dirty))
        for run in _runs(rows):
            self._put("status", int(rows[run.start]), self._status[rows[run]])
        self._dirty.clear()

    def close(self) -> None:
        """Flush, and release the file."""
        if self._fd < 0:
            return
        try:
            self.flush()
            os.fsync(self._fd)
        finally:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except CacheError:
            if error is None:  # otherwise the first error is the one to report
                raise

    def _mark(self, rows: NDArray[np.int64], status: int) -> None:
        self._status[rows] = status
        self._dirty.append(rows)

    def _put(self, name: str, row: int, values: NDArray[Any] | np.generic) -> None:
        region = self.cache.region(name)
        stride = math.prod(region.shape[1:]) * region.dtype.itemsize
        data = memoryview(np.ascontiguousarray(values, region.dtype).tobytes())
        position = region.offset + row * stride
        try:
            while data:
                written = os.pwrite(self._fd, data, position)
                data, position = data[written:], position + written
        except OSError as error:
            raise self._failure(error) from None

    def _failure(self, error: OSError) -> CacheError:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        return CacheError(f"{self.path}: cannot write ({reason}); {self._advice}")


def _runs(rows: NDArray[np.int64]) -> list[slice]:
    """Slices of `rows` with consecutive numbers. Each slice takes one write."""
    cuts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    return [slice(start, stop) for start, stop in pairwise(cuts) if stop > start]


def open_writer(
    path: str | Path,
    skeleton: Skeleton,
    *,
    library_versions: Mapping[str, str],
    overwrite: bool = False,
) -> CacheWriter:
    """Start a cache at `path`, or continue the one there if it was made from the same skeleton.

    A continued file keeps its own `batch_rows`, whatever the skeleton says: see `Skeleton`.

    Raises CacheError if another process is writing it, if the file there differs (naming the field)
    and `overwrite` is off, or if the folder cannot be written to.
    """
    path = Path(path)
    while True:
        existing = _lock_existing(path)
        try:
            if existing is not None and not overwrite:
                _check_same(path, skeleton)
                writer = CacheWriter(path, existing)
                existing = None  # the writer closes it now
                return writer
            with _draft(path) as (temporary, fd):
                if existing is None and path.exists():  # another process has just made it
                    continue
                create_file(temporary, fd, skeleton, library_versions)
                _publish(temporary, fd, path)
                return CacheWriter(path, os.dup(fd))
        finally:
            if existing is not None:
                os.close(existing)


@contextlib.contextmanager
def new_cache(
    path: Path, skeleton: Skeleton, *, library_versions: Mapping[str, str], overwrite: bool = False
) -> Iterator[CacheWriter]:
    """A writer for a cache that appears at `path` when the block ends without an error.

    Raises CacheError as `open_writer` does, and if a file is there and `overwrite` is off.
    """
    existing = _lock_existing(path)
    try:
        if existing is not None and not overwrite:
            raise CacheError(f"{path}: already exists; name another --out, or --overwrite it")
        with _draft(path) as (temporary, fd):
            create_file(temporary, fd, skeleton, library_versions)
            with CacheWriter(temporary, os.dup(fd), "no file was made") as writer:
                yield writer
            _publish(temporary, fd, path)
    finally:
        if existing is not None:
            os.close(existing)


@contextlib.contextmanager
def _draft(path: Path) -> Iterator[tuple[Path, int]]:
    """(a temporary file beside `path`, its locked descriptor). After the block the file is deleted,
    unless it was renamed.

    A duplicate of the descriptor keeps the lock after the block. Error messages name `path`.
    """
    temporary = path.with_name(path.name + ".tmp")
    fd = _lock(temporary, create=True)
    assert fd is not None
    try:
        yield temporary, fd
    except CacheError as error:
        raise CacheError(str(error).replace(f"{temporary}: ", f"{path}: ", 1)) from None
    except OSError as error:
        raise CacheError(f"{path}: cannot write ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(fd), os.stat(temporary)):
                temporary.unlink()
        os.close(fd)


def _publish(temporary: Path, fd: int, path: Path) -> None:
    os.fsync(fd)
    temporary.rename(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_place(path: Path) -> None:
    """Raise CacheError before any work is done if `open_writer` could not start at `path`."""
    fd = _lock_existing(path)
    if fd is not None:
        os.close(fd)
    if not os.access(path.parent, os.W_OK):
        raise CacheError(f"{path}: cannot write (the folder is read-only)")


def _lock_existing(path: Path) -> int | None:
    """A locked descriptor of the file at `path`; None if there is none. Raises CacheError."""
    if not path.parent.is_dir():
        raise CacheError(f"{path.parent}: no such folder")
    if path.is_dir():
        raise CacheError(f"{path}: is a folder; name a file")
    return _lock(path, create=False)


def _lock(path: Path, *, create: bool) -> int | None:
    """An exclusively locked descriptor of `path`; None if there is no file and `create` is off."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o666)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CacheError(f"{path}: cannot write ({error.strerror})") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise CacheError(f"{path}: another process is writing it") from None
        except OSError as error:
            os.close(fd)
            raise CacheError(f"{path}: cannot lock ({error.strerror})") from None
        try:
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)  # the file was renamed or removed between open and lock: try again


def _share(shard: Shard | None) -> str:
    return "all photos" if shard is None else f"--shard {shard}"


def _check_same(path: Path, skeleton: Skeleton) -> None:
    there = FeatureCache(path)
    difference = there.encoder.difference(skeleton.encoder)
    if difference is None and str(there.shard) != str(skeleton.shard):
        difference = f"{_share(there.shard)}, not {_share(skeleton.shard)}"
    if difference is None and there.photos_sha256 != skeleton.photos_sha256():
        if len(there) == len(skeleton.paths):
            difference = "other photos (names, ids or order), not those asked for"
        else:
            difference = f"{len(there):,} photos, not {len(skeleton.paths):,}"
    if difference is None:
        difference = there.captions.other_tokenizer(skeleton.captions)
    if difference is None and there.captions_sha256 != skeleton.captions.sha256():
        difference = "other captions, not those asked for"
    if difference is not None:
        raise CacheError(f"{path}: written with {difference}. Use another --out, or --overwrite.")
