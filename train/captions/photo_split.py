"""Which photos of a cache are held out for validation, where it has no cache of its own."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from cache.record import Strings
from cache.store import DONE, FeatureCache


def split_photos(
    cache: FeatureCache, *, held_out: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training rows, validation rows): a seeded share of the photos that have captions.

    A photo is on one side with all its captions. The choice depends on the seed and each photo's
    image id alone, so it survives a change of order, and identical ids stay together.
    """
    rows = np.unique(cache.captions.rows[cache.status[cache.captions.rows] == DONE])
    ranked = np.array([_rank(cache.image_ids, int(row), seed) for row in rows])
    count = min(max(1, round(held_out * len(rows))), max(len(rows) - 1, 0))
    chosen = np.zeros(len(rows), bool)
    chosen[np.argsort(ranked, kind="stable")[:count]] = True
    return rows[~chosen].astype(np.int64), rows[chosen].astype(np.int64)


def _rank(image_ids: Strings, row: int, seed: int) -> int:
    text = f"{seed} {image_ids[row]}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
