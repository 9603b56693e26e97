"""Splits the photos of a cache into those to train on and those held out for validation."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from cache.store import DONE, FeatureCache


def split_photos(
    cache: FeatureCache, *, held_out: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training rows, validation rows): a random share of the photos with captions is held out.

    A photo is on one side with all its captions. The choice depends only on the seed and the image
    ids, so the order of the photos does not matter, and photos with the same id stay together.
    """
    rows = np.unique(cache.captions.rows[cache.status[cache.captions.rows] == DONE])
    ranks = np.array([_rank(cache.image_ids[int(row)], seed) for row in rows])
    count = min(max(1, round(held_out * len(rows))), max(len(rows) - 1, 0))
    is_held_out = np.zeros(len(rows), bool)
    is_held_out[np.argsort(ranks, kind="stable")[:count]] = True
    return rows[~is_held_out].astype(np.int64), rows[is_held_out].astype(np.int64)


def _rank(image_id: str, seed: int) -> int:
    text = f"{seed} {image_id}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
