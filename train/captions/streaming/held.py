"""Features of some photos of a cache on a device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.store import FeatureCache

_PART_ROWS = 8192


@dataclass(frozen=True, eq=False)
class HeldFeatures:
    """Features of some photos. The addresses of all tensors never change, because captured graphs
    read them.
    """

    photos: NDArray[np.int64]  # (P,) ascending rows of the cache; not all of them need be held
    features: Tensor  # (S, V, D) float16 on the device
    slots: Tensor  # (P,) int32 on the device: the place of each photo in `features`
    host_slots: NDArray[np.int32]  # (P,) the same, and -1 for photos that are not held

    def slots_of(self, rows: NDArray[np.int64]) -> NDArray[np.int32] | None:
        """The places of these rows (B,), all among `photos`; None unless all are held."""
        found: NDArray[np.int32] = self.host_slots[np.searchsorted(self.photos, rows)]
        return found if (found >= 0).all() else None


def hold(cache: FeatureCache, photos: NDArray[np.int64], device: torch.device) -> HeldFeatures:
    """Read the features of these ascending rows. Raises CacheError, torch.OutOfMemoryError."""
    shape = (len(photos), *cache.features.shape[1:])
    features = torch.empty(shape, dtype=torch.float16, device=device)
    for start in range(0, len(photos), _PART_ROWS):
        part = slice(start, start + _PART_ROWS)
        features[part].copy_(torch.from_numpy(cache.read_rows(photos[part])))
    slots = np.arange(len(photos), dtype=np.int32)
    return HeldFeatures(photos, features, torch.from_numpy(slots).to(device), slots)
