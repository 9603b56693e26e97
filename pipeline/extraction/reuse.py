"""Reusing the rows of an older cache: photos that it knows are not encoded again."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.record import CacheError, EncoderRecord
from cache.store import DONE, PENDING, FeatureCache
from cache.verify import damaged_rows
from cache.writer import CacheWriter
from pipeline.extraction.digests import digest_or_none, look_at
from pipeline.photos.photo_file import read_photo
from pipeline.photos.sources.reading import is_there
from pipeline.photos.sources.source import Source

_PART_PHOTOS = 32


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
    writer: CacheWriter, known: KnownPhotos, source: Source, threads: int
) -> Iterator[tuple[int, int]]:
    """Copy the known rows among the pending ones, in parts; yields (copied, unreadable) of each.

    Photos that cannot be read are then set aside. If they were left pending, and could be read in a
    later run, they might be copied then, and the photos after them would change their places in the
    batches. Raises StalledError, SourceError, CacheError.
    """
    paths = writer.cache.paths
    pending = np.flatnonzero(writer.status == PENDING)
    looked = look_at(source, paths, pending, threads, digest_or_none)
    unread: list[int] = []
    readable = -1  # the latest row whose photo was read
    while part := list(islice(looked, _PART_PHOTOS)):
        here, old = [], []
        for row, digest in sorted(part, key=lambda seen: seen[0]):
            if digest is None:
                unread.append(row)
                continue
            readable = row
            known_row = known.row(digest)
            if known_row is not None:
                here.append(row)
                old.append(known_row)
        if here:
            writer.copy(np.array(here), known.cache, np.array(old))
        yield len(here), 0
    for row in sorted(unread):
        # Where no photo can be read any more, the drive is gone. Then they stay pending.
        if readable >= 0 and is_there(source.place(paths[readable])):
            yield 0, _set_aside(writer, source, row)


def _set_aside(writer: CacheWriter, source: Source, row: int) -> int:
    """Mark the photo of a row as unreadable, with the reason, if it still is. Returns 1 or 0."""
    cache = writer.cache
    place = source.place(cache.paths[row])
    read = read_photo(place, cache.encoder.image_size, cache.encoder.views)
    if not read.error:
        return 0
    writer.set_unreadable(row, read.error, read.digest)
    return 1


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
