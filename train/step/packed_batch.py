"""A batch of captions as one matrix of rows, step after step: the input of both objectives.

Captions are sorted longest first, so the captions that have not ended are the first ones at every
step. Their rows, one step after the other, form matrices without padding between captions of
different lengths:

    step 0: photo of caption 0, 1, 2, 3      (4 rows)
    step 1: word 0 of caption 0, 1, 2        (3 rows)
    step 2: word 1 of caption 0              (1 row)

On a CPU the rows of a step are rounded up to a multiple of 16, and the total to a multiple of 64,
because oneDNN compiles new kernels for every new size. Rows after a caption's end are computed, but
do not affect the loss.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from train.captions.caption_set import Batch, CaptionSet
from train.captions.vocabulary import PAD
from train.step.kernels import Kernels

_STEP_MULTIPLE = 16
_TOTAL_MULTIPLE = 64


@dataclass(frozen=True)
class PackedBatch:
    """B captions of N target tokens in R ≥ N rows; `steps[t]` rows belong to step t.

    Row n of step t continues row n of step t - 1. Rows after the last step are filling.
    """

    features: Tensor  # (B, D) float16; with a `share` those of the whole batch
    steps: tuple[int, ...]
    words: Tensor  # (R,) int64: the word each row reads; meaningless in the rows of step 0
    targets: Tensor  # (R,) int64; <pad> in rows that do not affect the loss
    captions: Tensor  # (R,) int64: the caption of each row; B or more in filling rows
    previous: Tensor  # (R,) int64: the same caption's row one step earlier; 0 at step 0
    # Which of the features these captions belong to. The others are those of the captions that
    # other processes train on; BatchNorm measures all of them. None: there are no others.
    share: slice | None = None

    @property
    def size(self) -> int:
        """B, the number of captions."""
        photos = len(self.features)
        return photos if self.share is None else len(range(photos)[self.share])

    def count(self) -> Tensor:
        """N, the number of target tokens, a scalar on the batch's device."""
        return (self.targets != PAD).sum()


def pack(batch: Batch, *, round_up: bool) -> PackedBatch:
    """Pack a batch (B, T).

    round_up: round sizes up as a CPU needs it. Otherwise every step has B rows, so that sizes
    depend on (B, T) alone and nothing waits for the device.
    """
    count, length = batch.targets.shape
    device = batch.targets.device
    if not round_up:
        captions, previous = _even_rows(count, length, device)
        targets = batch.targets.t().reshape(-1)
        photo = targets.new_full((count,), PAD)
        return PackedBatch(
            features=batch.features,
            steps=(count,) * length,
            words=torch.cat([photo, batch.inputs.t().reshape(-1)]),
            targets=targets,
            captions=captions,
            previous=previous,
        )
    unended = (batch.targets != PAD).sum(0).tolist()  # a caption's targets have no gaps
    steps = [-(-rows // _STEP_MULTIPLE) * _STEP_MULTIPLE for rows in unended]
    total = -(-sum(steps) // _TOTAL_MULTIPLE) * _TOTAL_MULTIPLE
    captions = torch.cat([torch.arange(rows) for rows in steps])
    time = torch.repeat_interleave(torch.arange(length), torch.tensor(steps))
    starts = torch.tensor([0, *steps]).cumsum(0)
    before = (time - 1).clamp_min(0)

    def padded(values: Tensor) -> Tensor:
        missing = (0, length - values.shape[1], 0, steps[0] - count)
        return torch.nn.functional.pad(values, missing, value=PAD)

    def filled(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, total - len(values)))

    return PackedBatch(
        features=batch.features,
        steps=tuple(steps),
        words=filled(padded(batch.inputs)[captions, before]),
        targets=filled(padded(batch.targets)[captions, time]),
        captions=filled(captions),
        previous=filled(torch.where(time > 0, starts[before] + captions, 0)),
    )


def gather_packed(
    captions: CaptionSet,
    kernels: Kernels,
    chosen: Tensor,
    views: Tensor,
    length: int,
    share: slice | None = None,
) -> PackedBatch:
    """The packed batch of some captions, `length` steps of B rows each.

    chosen: (B,) int64, the captions in the order of the rows. views: (B,), the view of each photo.
    share: which of the captions to pack, as in `PackedBatch`; of the others only the features are
    gathered. All work is on the device, so it can be part of a captured graph.
    """
    features = captions.features_of(chosen, views)
    if share is not None:
        chosen = chosen[share].contiguous()
    rows = length * len(chosen)
    words, targets = (
        torch.empty(rows, dtype=torch.int64, device=captions.device) for _ in range(2)
    )
    kernels.gather_words(chosen, captions.starts, captions.targets, captions.tokens, words, targets)
    caption_of, previous = _cached_even_rows(len(chosen), length, captions.device)
    return PackedBatch(
        features=features,
        steps=(len(chosen),) * length,
        words=words,
        targets=targets,
        captions=caption_of,
        previous=previous,
        share=share,
    )


def of_all_photos(batch: PackedBatch, d_photos: Tensor) -> Tensor:
    """The gradients (B, E) of the photos that a batch's captions read, among those of the whole
    batch: zero for the photos of other processes' captions.

    BatchNorm's backward pass is linear in these gradients. Each process therefore goes through it
    with its own part, over the whole batch, and the sum over all processes is right: BatchNorm
    needs no communication of its own.
    """
    if batch.share is None:
        return d_photos
    everywhere = d_photos.new_zeros(len(batch.features), d_photos.shape[1])
    everywhere[batch.share] = d_photos
    return everywhere


def _even_rows(count: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each row's caption, and its row one step earlier, if every step has `count` rows."""
    rows = torch.arange(count * length, device=device)
    return rows % count, (rows - count).clamp_min(0)


# Unbounded on purpose: tensors created during a capture would belong to that graph and be empty
# outside of it. The first step of a shape runs directly, so it creates them before any capture.
_cached_even_rows = functools.cache(_even_rows)
