"""Scheduled sampling: some input words are replaced by words the model itself would have said.

The parallel form (Duckworth et al., 2019): one pass over the true words gives the model's next word
everywhere; the training step then reads the mixed words. The original (Bengio et al., 2015) goes
through the caption word by word, which cannot be done in large products.
"""

from __future__ import annotations

import dataclasses

import torch

from train.captions.caption_set import Batch
from train.captions.vocabulary import PAD
from train.step.objective import Objective
from train.step.packed_batch import pack


def with_own_words(objective: Objective, batch: Batch, share: float, seed: int) -> Batch:
    """The batch with about `share` of its input words drawn from the model's distribution.

    Targets stay the true words.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = batch.inputs
    draws = torch.rand(inputs.shape, generator=generator).to(inputs.device)
    caption, place = ((draws < share) & (inputs != PAD)).nonzero(as_tuple=True)
    if not len(caption):
        return batch
    packed = pack(batch, round_up=inputs.device.type == "cpu")
    starts = torch.tensor([0, *packed.steps], device=inputs.device).cumsum(0)
    # The word read at step t + 1 is what step t should have said; inputs[:, t] is that word.
    uniform = torch.rand(len(caption), generator=generator).to(inputs.device)
    words = objective.sample_words(packed, starts[place] + caption, uniform)
    mixed = inputs.clone()
    mixed[caption, place] = words
    return dataclasses.replace(batch, inputs=mixed)
