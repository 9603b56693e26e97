"""Which of a photo's views a caption is made from: the whole photo, or the mean of all of them."""

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
    """A view is asked for that the encoder does not make. One line."""


def chosen_view(view: str, views: Sequence[str], training: Mapping[str, Any]) -> str:
    """`full` or `mean`, as asked for; for `auto` what the model's record (`view`) says, else full.

    views: those the encoder makes. Raises ViewError.
    """
    if view == AUTO:
        view = training.get("view", FULL)
    if view not in (FULL, MEAN):
        raise ViewError(f"no view {view!r} to caption; there are {AUTO}, {FULL} and {MEAN}")
    if view == MEAN and len(views) == 1:
        raise ViewError(
            f"the mean of the views needs features of several; the model's encoder makes {views[0]}"
        )
    return view


def views_to_read(views: Sequence[str], view: str) -> tuple[str, ...]:
    """Of the views an encoder makes, those that `full` or `mean` needs, in the encoder's order.

    Where there is no full view, the first one stands in for it.
    """
    return tuple(views) if view == MEAN else (views[full_view_index(views)],)


def full_view_index(views: Sequence[str]) -> int:
    """The place of the full view among an encoder's views, or that of the first one without it."""
    return views.index(FULL) if FULL in views else 0


def view_features(cache: FeatureCache, rows: NDArray[np.int64], view: str) -> Tensor:
    """(B, D) features of these rows (B,) of a cache, copied: of one view, or the mean of all."""
    views = cache.encoder.views
    chosen = [views.index(name) for name in views_to_read(views, view)]
    return mean_of_views(torch.from_numpy(cache.features[rows][:, chosen]))


def mean_of_views(features: Tensor) -> Tensor:
    """(B, V, D) float16 → (B, D): the one view as it is, or the mean in float32."""
    return features[:, 0] if features.shape[1] == 1 else features.float().mean(1)
