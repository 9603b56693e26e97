"""Dropout masks of one step, drawn at once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from train.decoder import DecoderConfig
from train.fast import Masks


def draw_masks(
    config: DecoderConfig, rows: int, dtype: torch.dtype, device: torch.device, seed: int | None
) -> Masks | None:
    """Masks for `rows` rows, or None without dropout: numbers stay with probability 1 - p.

    seed: of a generator of this step's own; None: the device's default generator.
    """
    if not config.dropout:
        return None
    sizes = [config.embedding_size, *[config.hidden_size] * config.num_layers]
    if seed is None:
        keep = 1 - config.dropout
        drawn = [
            torch.empty(rows, size, dtype=dtype, device=device).bernoulli_(keep).div_(keep)
            for size in sizes
        ]
    else:
        drawn = _draw_on_host(rows, sizes, 1 - config.dropout, seed, dtype)
    return Masks(drawn[0], tuple(drawn[1:]))


def _draw_on_host(
    rows: int, sizes: list[int], keep: float, seed: int, dtype: torch.dtype
) -> list[Tensor]:
    """Sixteen random bits a number: ten times as fast as torch's Bernoulli on a CPU."""
    threshold = max(1, round(keep * 65536))
    random = np.random.Generator(np.random.SFC64(seed))
    masks = []
    for size in sizes:
        bits = np.frombuffer(random.bytes(2 * rows * size), np.uint16).reshape(rows, size)
        stays = torch.from_numpy(bits < threshold)
        masks.append(stays.to(dtype).mul_(65536 / threshold))
    return masks
