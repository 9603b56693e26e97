"""Dropout masks for one step, all drawn at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from train.model.decoder import DecoderConfig
from train.step.packed_batch import PackedBatch


@dataclass(frozen=True)
class Masks:
    """Factors that apply dropout: 0 for a dropped number, 1 / (1 - p) for a kept one.

    All are in the objective's dtype. None means no dropout in that place.
    """

    features: Tensor | None  # (B, D)
    inputs: Tensor | None  # (R, E)
    layers: tuple[Tensor, ...]  # (R, H) for the outputs of each LSTM layer; empty: no dropout


NO_MASKS = Masks(None, None, ())


def draw_masks(
    config: DecoderConfig, batch: PackedBatch, dtype: torch.dtype, seed: int | None, rank: int = 0
) -> Masks:
    """Masks for a batch, which keep a number with probability 1 - p.

    seed: seeds a generator that is used for this step alone; None: draw on the batch's device with
    its default generator. rank: of the process, if several share the batch. They draw the same
    masks of the features, which are those of the whole batch, and different ones of the rows.
    """
    rows, photos = len(batch.words), len(batch.features)
    feature_shapes = [(photos, config.feature_dim)] if config.feature_dropout else []
    sizes = [config.embedding_size, *[config.hidden_size] * config.num_layers]
    row_shapes = [(rows, size) for size in sizes] if config.dropout else []
    if not feature_shapes and not row_shapes:
        return NO_MASKS
    keep_features, keep = 1 - config.feature_dropout, 1 - config.dropout
    if seed is None:
        device = batch.words.device
        of_features = _draw_on_device(feature_shapes, keep_features, dtype, device)
        of_rows = _draw_on_device(row_shapes, keep, dtype, device, skipped=rank)
    else:
        random = np.random.Generator(np.random.SFC64(seed))
        of_features = [_draw_on_host(random, s, keep_features, dtype) for s in feature_shapes]
        if rank:
            random = np.random.Generator(np.random.SFC64((seed, rank)))
        of_rows = [_draw_on_host(random, shape, keep, dtype) for shape in row_shapes]
    return Masks(
        of_features[0] if of_features else None, of_rows[0] if of_rows else None, tuple(of_rows[1:])
    )


def _draw_on_device(
    shapes: list[tuple[int, int]],
    keep: float,
    dtype: torch.dtype,
    device: torch.device,
    skipped: int = 0,
) -> list[Tensor]:
    """Draw all masks at once, which takes two kernels.

    skipped: draw so many other sets of masks before, because a captured graph cannot seed its
    generator otherwise than other processes do. They take a few microseconds.
    """
    sizes = [rows * size for rows, size in shapes]
    if not sizes:
        return []
    drawn = torch.empty((skipped + 1) * sum(sizes), dtype=dtype, device=device)
    drawn = drawn.bernoulli_(keep)[skipped * sum(sizes) :].div_(keep)
    return [part.view(shape) for part, shape in zip(drawn.split(sizes), shapes, strict=True)]


def _draw_on_host(
    random: np.random.Generator, shape: tuple[int, int], keep: float, dtype: torch.dtype
) -> Tensor:
    """Draw one mask from sixteen random bits a number, ten times as fast as torch's Bernoulli."""
    threshold = max(1, round(keep * 65536))
    bits = np.frombuffer(random.bytes(2 * shape[0] * shape[1]), np.uint16).reshape(shape)
    return torch.from_numpy(bits < threshold).to(dtype).mul_(65536 / threshold)
