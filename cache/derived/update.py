"""Gives a cache other captions or other photos, and keeps the rows that it has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.derived.shards import FILLS_NO_CATALOGUE
from cache.record import CacheError, Skeleton
from cache.store import PENDING, FeatureCache
from cache.writer import new_cache

_BLOCK_BYTES = 1 << 20  # of features, copied at a time; it stays in the processor's cache


def update_cache(path: Path, skeleton: Skeleton, old_rows: NDArray[np.int64]) -> None:
    """Replace the cache at `path`, in one step, by one of this skeleton with rows of the old one.

    old_rows: (N,), for each photo of the skeleton the row of the old cache that is its own, or -1
    if there is none. Such rows, and those that were pending, are pending afterwards, and
    `open_writer` with the same skeleton fills them. Other captions alone are `np.arange(N)`. Then
    the file has the bytes of an extraction with these captions.

    The file is copied, not changed in place: the arrays follow one another without gaps, and a
    power cut in the middle of a change would lose all features. So the disk needs room for both.
    An interruption leaves the old cache, and readers that have it open keep it.

    Raises CacheError if the encoders differ (naming the field), if a row that is kept is damaged,
    if another process is writing the cache, or if the disk is full. The old cache is then intact.
    """
    old = FeatureCache(path)
    if old.shards is not None:
        raise CacheError(f"{path}: {FILLS_NO_CATALOGUE}")
    difference = old.encoder.difference(skeleton.encoder)
    if difference is not None:
        raise CacheError(f"{path}: written with {difference}; its rows cannot be kept")
    with new_cache(path, skeleton, library_versions=old.library_versions, overwrite=True) as writer:
        old = FeatureCache(path)  # again, because nobody else can write it now
        kept = np.flatnonzero(old_rows >= 0)
        kept = kept[old.status[old_rows[kept]] != PENDING]
        block = max(1, _BLOCK_BYTES // (old.features[:1].nbytes or 1))
        for start in range(0, len(kept), block):
            part = kept[start : start + block]
            writer.copy(part, old, old_rows[part])
