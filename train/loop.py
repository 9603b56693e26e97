"""The training loop: from a caption set to a trained decoder, one report a step.

`fit` knows no files and prints nothing; `train.run` gives it a run folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from train.batches import CaptionSet, epoch_batches, epoch_views
from train.config import FitConfig
from train.decoder import CaptionDecoder
from train.vocab import PAD


@dataclass(frozen=True)
class Step:
    """After an optimizer step. Epochs and steps count from 0; `loss` stays on the device."""

    epoch: int
    step: int  # of this epoch
    steps: int  # in every epoch
    captions: int
    loss: Tensor  # scalar: mean cross-entropy per target token


def make_optimizer(decoder: CaptionDecoder, config: FitConfig) -> torch.optim.Adam:
    return torch.optim.Adam(decoder.parameters(), lr=config.learning_rate, fused=True)


def fit(
    decoder: CaptionDecoder,
    optimizer: torch.optim.Optimizer,
    captions: CaptionSet,
    config: FitConfig,
    *,
    epoch: int = 0,
    first_step: int = 0,
) -> Iterator[Step]:
    """Train in place: this epoch, from `first_step` on.

    Everything random comes from the seed, the epoch and the step, so going on after an
    interruption with the same decoder and optimizer state gives the same weights.
    """
    batches = epoch_batches(captions.lengths, config.batch_size, seed=config.seed, epoch=epoch)
    views = epoch_views(len(captions), captions.views, seed=config.seed, epoch=epoch)
    steps = len(batches)
    for step, chosen in enumerate(batches[first_step:], first_step):
        batch = captions.batch(chosen, None if views is None else views[chosen])
        # Evaluation in between must not shift what dropout draws here.
        torch.manual_seed(_dropout_seed(config.seed, epoch * steps + step))
        decoder.train()
        # BatchNorm cannot measure one row; a last batch of one caption uses running statistics.
        decoder.normalize.train(len(chosen) > 1)
        loss = decoder.loss(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), config.clip_norm)
        optimizer.step()
        yield Step(epoch, step, steps, len(chosen), loss.detach())


def _dropout_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


@torch.inference_mode()
def validation_loss(decoder: CaptionDecoder, captions: CaptionSet, batch_size: int = 512) -> float:
    """Mean cross-entropy per target token over all captions, without dropout."""
    decoder.eval()
    total, tokens = 0.0, 0
    # Captions of like length share a batch: less padding, the same sum.
    order = np.argsort(captions.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        batch = captions.batch(order[start : start + batch_size])
        count = int((batch.targets != PAD).sum())
        total += float(decoder.loss(batch)) * count
        tokens += count
    return total / tokens
