"""The order of an epoch: which captions share a batch, and which view each caption's photo shows.

Everything follows from the seed and the epoch alone, so a resumed run needs no saved order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# How many batches' captions are sorted by length together. More of them save padding; fewer keep a
# batch closer to a random sample.
_POOL_BATCHES = 32


def epoch_batches(
    lengths: NDArray[np.int64], batch_size: int, *, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """The batches of an epoch, as caption numbers: each caption once; one batch may be smaller.

    The captions are shuffled, sorted by length within pools of some batches, and cut into batches,
    which are then shuffled. Captions of similar length share a batch, so little of it is padding.
    """
    random = np.random.default_rng((seed, epoch))
    return in_batches_of_similar_length(
        random.permutation(len(lengths)), lengths, batch_size, random
    )


def in_batches_of_similar_length(
    order: NDArray[np.int64],
    lengths: NDArray[np.int64],
    batch_size: int,
    random: np.random.Generator,
) -> list[NDArray[np.int64]]:
    """Batches, in random order, of captions that come in random order. Changes `order`.

    lengths: of all captions. One batch may be smaller than `batch_size`.
    """
    pool = _POOL_BATCHES * batch_size
    for start in range(0, len(order), pool):
        part = order[start : start + pool]
        order[start : start + pool] = part[np.argsort(lengths[part], kind="stable")]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def epoch_views(count: int, views: int, *, seed: int, epoch: int) -> NDArray[np.int64] | None:
    """(count,) a random view of the photo for each caption; None if there is only one view."""
    if views == 1:
        return None
    return np.random.default_rng((seed, epoch, 1)).integers(views, size=count)
