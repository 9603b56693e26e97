"""Which view of a photo a caption is made from: the full one, or the mean of all views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.errors import CapError
from cache.store import FeatureCache
from train.config import AUTO, FULL, MEAN


class ViewError(CapError):
    """Raised for a view that the encoder does not make. The message is one line."""


def chosen_view(view: str, views: Sequence[str], training: Mapping[str, Any]) -> str:
    """`full` or `mean`: the view asked for or, for `auto`, the one in the model's record.

    views: the views that the encoder makes. training: the model's record; without a `view` in it,
    `auto` is `full`. Raises ViewError.
    """
    if view == AUTO:
        view = training.get("view", FULL)
    if view not in (FULL, MEAN):
        raise ViewError(f"no view {view!r}; choose {AUTO}, {FULL} or {MEAN}")
    if view == MEAN and len(views) == 1:
        raise ViewError(f"the mean needs several views; the model's encoder makes only {views[0]}")
    return view


def views_to_read(views: Sequence[str], view: str) -> tuple[str, ...]:
    """The views that `full` or `mean` needs, of those that the encoder makes, in its order.

    If there is no full view, the first one takes its place.
    """
    return tuple(views) if view == MEAN else (views[full_view_index(views)],)


def full_view_index(views: Sequence[str]) -> int:
    """The index of the full view among an encoder's views, or 0 if there is none."""
    return views.index(FULL) if FULL in views else 0


def view_features(cache: FeatureCache, rows: NDArray[np.int64], view: str) -> Tensor:
    """(B, D) features of these rows (B,) of a cache, copied. view: `full` or `mean`."""
    views = cache.encoder.views
    chosen = [views.index(name) for name in views_to_read(views, view)]
    return mean_of_views(torch.from_numpy(cache.read_rows(rows)[:, chosen]))


def mean_of_views(features: Tensor) -> Tensor:
    """(B, V, D) float16 → (B, D): a single view unchanged, or the mean of several in float32."""
    return features[:, 0] if features.shape[1] == 1 else features.float().mean(1)
