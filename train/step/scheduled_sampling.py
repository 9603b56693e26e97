"""Scheduled sampling: replaces some input words with words drawn from the model itself.

This is the parallel form (Duckworth et al., 2019): one pass over the true words gives the model's
next word at every place, and the training step then reads the mixed words. The original form
(Bengio et al., 2015) goes through a caption word by word, which rules out large matrix products.
"""

from __future__ import annotations

import dataclasses

import torch

from train.captions.caption_set import Batch
from train.captions.vocabulary import PAD
from train.step.objective import Objective
from train.step.packed_batch import pack
from train.torch_import import seeded_generator


def with_sampled_words(objective: Objective, batch: Batch, share: float, seed: int) -> Batch:
    """A copy of the batch in which about `share` of the input words are drawn from the model.

    The targets remain the true words.
    """
    generator = seeded_generator(seed)
    inputs = batch.inputs
    draws = torch.rand(inputs.shape, generator=generator).to(inputs.device)
    caption, place = ((draws < share) & (inputs != PAD)).nonzero(as_tuple=True)
    if not len(caption):
        return batch
    packed = pack(batch, round_up=inputs.device.type == "cpu")
    starts = torch.tensor([0, *packed.steps], device=inputs.device).cumsum(0)
    # inputs[:, t] is the target of step t, so the outputs of step t draw its substitute.
    uniform = torch.rand(len(caption), generator=generator).to(inputs.device)
    words = objective.sample_words(packed, starts[place] + caption, uniform)
    mixed = inputs.clone()
    mixed[caption, place] = words
    return dataclasses.replace(batch, inputs=mixed)
