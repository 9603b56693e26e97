"""Filling a cache: one writer at a time, every finished row safe, any interruption resumable."""

from __future__ import annotations

import errno
import fcntl
import math
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cache.create import create_file
from cache.record import CacheError, Skeleton
from cache.store import (
    DONE,
    ERROR_BYTES,
    PENDING,
    UNREADABLE,
    FeatureCache,
    row_checksum,
)

_NO_ERROR = np.zeros(ERROR_BYTES, np.uint8)


class CacheWriter:
    """Writes rows into a cache file and remembers which are safe. Make one with `open_writer`.

    Rows go to the file at once; their status follows in `flush`, after the rows themselves are on
    the disk, so a row that says "done" is done even after a power cut. The file's lock is held by
    the descriptor and dies with the process.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.cache = FeatureCache(path)
        self._fd = fd
        self._status = np.array(self.cache.status)  # as it will be after the next flush
        self._dirty: list[NDArray[np.int64]] = []

    @property
    def status(self) -> NDArray[np.uint8]:
        """(N,) the status of every row, unflushed ones included. Do not write to it."""
        return self._status

    def write(
        self, rows: NDArray[np.int64], features: NDArray[np.float16], digests: NDArray[np.uint8]
    ) -> None:
        """Store rows as done. features: (B, V, D) float16; digests: (B, 16) uint8.

        Raises CacheError where the disk is full or gone; what was flushed before stays valid.
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
        """Set a photo aside; `reason` is one line, cut to what the file keeps."""
        error = np.zeros(ERROR_BYTES, np.uint8)
        text = " ".join(reason.split()).encode("utf-8", "replace")[:ERROR_BYTES]
        text = text.decode("utf-8", "ignore").encode()  # no half character at the cut
        error[: len(text)] = np.frombuffer(text, np.uint8)
        self._put("errors", row, error)
        self._put("digests", row, digest)
        self._put("checksums", row, np.uint32(row_checksum(digest, error, None)))
        self._mark(np.array([row]), UNREADABLE)

    def retry_unreadable(self) -> int:
        """Make every unreadable row pending again; returns how many there were."""
        rows = np.flatnonzero(self._status == UNREADABLE)
        self._mark(rows, PENDING)
        self.flush()
        return len(rows)

    def flush(self) -> None:
        """Make everything written so far survive a power cut, then say so in `status`."""
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
        """Flush and let go of the file."""
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
            if error is None:  # else the first failure is the one to hear about
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
        return CacheError(
            f"{self.path}: cannot write ({reason}); what is done is kept, run the same command "
            "again to go on"
        )


def _runs(rows: NDArray[np.int64]) -> list[slice]:
    """Slices of `rows` in which the numbers follow one another: each is one write."""
    cuts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    return [slice(start, stop) for start, stop in pairwise(cuts) if stop > start]


def open_writer(
    path: str | Path,
    skeleton: Skeleton,
    *,
    library_versions: Mapping[str, str],
    overwrite: bool = False,
) -> CacheWriter:
    """Start a cache at `path`, or go on with the one there if it was made from the same skeleton.

    Going on keeps the file's own `batch_rows`, whatever the skeleton says: see `Skeleton`.

    Raises CacheError if another process writes it, if the file there differs (naming the field)
    and `overwrite` is off, or if the folder cannot be written to.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    if not path.parent.is_dir():
        raise CacheError(f"{path.parent}: no such folder")
    if path.is_dir():
        raise CacheError(f"{path}: is a folder; name a file")
    while True:
        existing = _lock(path, create=False)
        if existing is not None and not overwrite:
            try:
                _check_same(path, skeleton)
                return CacheWriter(path, existing)
            except BaseException:
                os.close(existing)
                raise
        fd = _lock(temporary, create=True)
        assert fd is not None
        try:
            if existing is None and path.exists():  # another process was faster
                temporary.unlink(missing_ok=True)
                os.close(fd)
                continue
            create_file(temporary, fd, skeleton, library_versions)
            os.fsync(fd)
            os.rename(temporary, path)
            _sync_folder(path.parent)
            return CacheWriter(path, fd)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            os.close(fd)
            if isinstance(error, CacheError):
                raise CacheError(f"{path}: {error}") from None
            if isinstance(error, OSError):
                raise CacheError(f"{path}: cannot write ({error.strerror or error})") from None
            raise
        finally:
            if existing is not None:
                os.close(existing)


def _lock(path: Path, *, create: bool) -> int | None:
    """An open, exclusively locked descriptor of `path`; None if it is absent and not to be made."""
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
        os.close(fd)  # renamed or removed between open and lock: look again


def _check_same(path: Path, skeleton: Skeleton) -> None:
    there = FeatureCache(path)
    difference = there.encoder.difference(skeleton.encoder)
    if difference is None and there.photos_sha256 != skeleton.photos_sha256():
        if len(there) == len(skeleton.paths):
            difference = "other photos (names, ids or order), not those asked for"
        else:
            difference = f"{len(there):,} photos, not {len(skeleton.paths):,}"
    if difference is None and there.captions_sha256 != skeleton.captions.sha256():
        difference = "other captions, not those asked for"
    if difference is not None:
        raise CacheError(f"{path}: written with {difference}. Use another --out, or --overwrite.")


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
