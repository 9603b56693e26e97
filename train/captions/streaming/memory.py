"""Whether all features of a cache fit into memory, and what takes their place if not."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cache.create import size_text
from cache.share import memory_bytes
from cache.store import FeatureCache
from train.config import WindowSize

# Features that take less than this share of what there is are all in memory. A CPU needs the rest
# for captions, the decoder and other programs; a GPU for the decoder.
_FITTING_SHARE, _FITTING_SHARE_OF_GPU = 0.5, 0.7
# Asking a GPU makes training wait until its driver is ready, which is not asked for less than this.
_SURELY_FITTING_BYTES = 1 << 30
# Else a window of this share is, in memory or in what is free of a GPU's. A larger one than the
# most would take long to read before the first step, and shuffle no better.
_SHARE, _SHARE_OF_GPU, _MOST_BYTES = 0.25, 0.5, 8 << 30


@dataclass(frozen=True)
class FeatureMemory:
    """The memory for a cache's features, and why."""

    size_bytes: int | None  # None: all features are in memory
    reason: str = ""


def feature_memory(window: WindowSize, cache: FeatureCache, device: torch.device) -> FeatureMemory:
    """What `--window` means for a cache on a device."""
    needed = cache.features.nbytes
    if window.everything:
        return FeatureMemory(None)
    if window.share is not None or window.size_bytes is not None:
        size = window.size_bytes if window.share is None else int(window.share * needed)
        assert size is not None
        return FeatureMemory(None if size >= needed else size)
    there = memory_bytes()
    if device.type == "cpu":
        if needed <= _FITTING_SHARE * there:
            return FeatureMemory(None)
        share = f"{_FITTING_SHARE:.0%} of the {size_text(there)} of memory"
        return FeatureMemory(min(_MOST_BYTES, int(_SHARE * there)), f"more than {share}")
    if needed <= _SURELY_FITTING_BYTES:
        return FeatureMemory(None)
    free, _ = torch.cuda.mem_get_info(device)
    if needed <= _FITTING_SHARE_OF_GPU * free:
        return FeatureMemory(None)
    share = f"{_FITTING_SHARE_OF_GPU:.0%} of the {size_text(free)} that are free on {device}"
    # Half of a window is on the host as well.
    size = min(_MOST_BYTES, int(_SHARE_OF_GPU * free), int(2 * _SHARE * there))
    return FeatureMemory(size, f"more than {share}")
