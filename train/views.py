"""Which of a photo's views a caption is made from: the whole photo, or the mean of all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cache.store import FeatureCache

FULL, MEAN = "full", "mean"
AUTO = "auto"  # whatever the model's record says, else the full view
CHOICES = (AUTO, FULL, MEAN)


def views_to_read(views: Sequence[str], view: str) -> tuple[str, ...]:
    """Of the views an encoder makes, those that `full` or `mean` needs, in the encoder's order.

    Where there is no full view, the first one stands in for it.
    """
    if view == MEAN:
        return tuple(views)
    return (FULL if FULL in views else views[0],)


def view_features(cache: FeatureCache, rows: NDArray[np.int64], view: str) -> NDArray[np.float32]:
    """(B, D) features of these rows (B,): of one view, or the mean of all."""
    views = cache.encoder.views
    if view == MEAN:
        return mean_of_views(cache.features[rows])
    (name,) = views_to_read(views, view)
    chosen: NDArray[np.float16] = cache.features[rows, views.index(name)]
    return chosen.astype(np.float32)


def mean_of_views(features: NDArray[np.float16]) -> NDArray[np.float32]:
    """(B, V, D) → (B, D), in float32 so that a cache and a photo give the same mean."""
    mean: NDArray[np.float32] = features.mean(1, dtype=np.float32)
    return mean
