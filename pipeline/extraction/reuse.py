"""Reusing the rows of an older cache: photos that it knows are not encoded again.

A photo is known if the bytes of its file are. Every file is read and digested, whatever its name,
size or date; this takes about a hundredth of the time of encoding it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.record import CacheError, EncoderRecord
from cache.store import DIGEST_BYTES, DONE, PENDING, FeatureCache
from cache.verify import damaged_rows
from cache.writer import CacheWriter
from pipeline.photos.decoding import ImageError
from pipeline.photos.photo_file import file_digest, read_file
from pipeline.photos.photo_loader import STALL_S, Silence, StalledError

_TASK_PHOTOS = 32
_Digested = tuple[NDArray[np.int64], NDArray[np.uint8]]


class KnownPhotos:
    """The extracted photos of an older cache, by digest."""

    def __init__(self, cache: FeatureCache) -> None:
        self.cache = cache
        rows = cache.rows_with(DONE)
        keys = np.ascontiguousarray(cache.digests[rows]).view(np.uint64)[:, 0]
        order = np.argsort(keys, kind="stable")
        self._keys, self._rows = keys[order], rows[order]  # keys: first halves of the digests

    def row(self, digest: NDArray[np.uint8]) -> int | None:
        """The row with this (16,) digest that is not damaged; None if there is none."""
        key = np.ascontiguousarray(digest).view(np.uint64)[0]
        start, stop = (int(np.searchsorted(self._keys, key, side)) for side in ("left", "right"))
        for row in self._rows[start:stop].tolist():
            same = np.array_equal(self.cache.digests[row], digest)
            if same and not damaged_rows(self.cache, np.array([row])):
                return int(row)
        return None


def open_known(path: Path, encoder: EncoderRecord) -> KnownPhotos:
    """Open an older cache. Raises CacheError if another encoder made its features."""
    cache = FeatureCache(path)
    difference = cache.encoder.difference(encoder)
    if difference is not None:
        raise CacheError(f"{path}: made with {difference}; its rows cannot be reused")
    return KnownPhotos(cache)


def copy_known(
    writer: CacheWriter, known: KnownPhotos, images: Path, threads: int
) -> Iterator[int]:
    """Copy the known rows among the pending ones, in parts; yields how many each part had.

    Rows whose photos cannot be read stay pending. Raises StalledError or CacheError.
    """
    rows = np.flatnonzero(writer.status == PENDING)
    for part, digests in _digests(writer.cache, rows, images, threads):
        found = [known.row(digest) for digest in digests]
        old = np.array([row for row in found if row is not None], np.int64)
        here = np.array([row is not None for row in found], bool)
        if len(old):
            writer.copy(part[here], known.cache, old)
        yield len(old)


def new_rows(writer: CacheWriter, known: KnownPhotos) -> NDArray[np.int64]:
    """The rows that the older cache does not know, in the order in which they fill the batches.

    Rows that are already encoded count as well, so that a run after an interruption has the same
    batches.
    """
    status, digests = writer.status, writer.cache.digests
    is_new = np.ones(len(status), bool)
    for row in np.flatnonzero(status == DONE).tolist():
        is_new[row] = known.row(digests[row]) is None
    return np.flatnonzero(is_new)


def _digests(
    cache: FeatureCache, rows: NDArray[np.int64], images: Path, threads: int
) -> Iterator[_Digested]:
    """(rows, (B, 16) digests) of the photos that can be read, in parts that come in any order."""
    parts = np.array_split(rows, -(-len(rows) // _TASK_PHOTOS)) if len(rows) else []
    tasks: queue.SimpleQueue[NDArray[np.int64]] = queue.SimpleQueue()
    for part in parts:
        tasks.put(part)
    finished: queue.SimpleQueue[_Digested | BaseException] = queue.SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            try:
                part = tasks.get_nowait()
            except queue.Empty:
                return
            try:
                digests = [_digest(images / cache.paths[row]) for row in part.tolist()]
            except BaseException as error:  # our bug, not the photo's: the caller raises it
                finished.put(error)
                return
            readable = np.array([digest is not None for digest in digests], bool)
            read = [digest for digest in digests if digest is not None]
            finished.put((part[readable], np.array(read, np.uint8).reshape(-1, DIGEST_BYTES)))

    # Daemons, because a thread that hangs in a dead network drive must not keep the process alive.
    for number in range(threads):
        threading.Thread(target=work, name=f"digests-{number}", daemon=True).start()
    try:
        for _ in parts:
            result = _next_of(finished, images)
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        stopped.set()


def _next_of(
    finished: queue.SimpleQueue[_Digested | BaseException], images: Path
) -> _Digested | BaseException:
    silence = Silence(STALL_S)
    while True:
        with contextlib.suppress(queue.Empty):
            return finished.get(timeout=1.0)
        if silence.is_stall(0):
            raise StalledError(
                f"{images}: nothing came from the disk for {silence.seconds:.0f} s; what is done "
                "is kept, run the same command again to continue"
            )


def _digest(path: Path) -> NDArray[np.uint8] | None:
    try:
        return file_digest(read_file(path))
    except (OSError, ImageError, MemoryError):
        return None
