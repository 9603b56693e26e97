"""BatchNorm cannot measure a batch of one caption; what is trained is still what is validated."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.conftest import MakeCache
from train.captions.caption_set import caption_set
from train.captions.vocabulary import build_vocabulary
from train.config import Recipe
from train.fit.trainer import Trainer
from train.model.decoder import CaptionDecoder, DecoderConfig

CAPTIONS = [
    [" ".join(words)] for words in itertools.permutations(("dog", "cat", "bird", "runs"), 2)
]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("average_decay", [0.0, 0.9])
def test_batches_of_one_caption_validate_the_network_that_they_train(
    make_cache: MakeCache, average_decay: float, plain: bool
) -> None:
    cache = make_cache(CAPTIONS)
    vocabulary = build_vocabulary(cache.captions, 1)
    captions = caption_set(cache, vocabulary, device=torch.device("cpu"), max_length=50)
    torch.manual_seed(0)
    model = CaptionDecoder(DecoderConfig(cache.encoder.feature_dim, len(vocabulary), 16, 32))
    recipe = Recipe(batch_size=1, epochs=40, learning_rate=0.01, average_decay=average_decay)
    trainer = Trainer(model, captions, recipe, seed=0, precision="float32", plain=plain)
    losses = [[float(step.loss) for step in trainer.epoch(epoch)] for epoch in range(40)]
    last = sum(losses[-1]) / len(losses[-1])
    with trainer.evaluation_weights():
        assert trainer.validation_loss(captions) == pytest.approx(last, abs=0.003)
