from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import MakeCache
from train.captions.caption_set import caption_set
from train.captions.vocabulary import END, PAD, START, UNK, build_vocabulary
from train.config import Recipe
from train.fit import self_critical
from train.fit.self_critical import SelfCritical, _advantages, _as_batch
from train.fit.trainer import Trainer
from train.model.decoder import CaptionDecoder, DecoderConfig
from train.search.rollout import sample
from train.step.packed_batch import PackedBatch

CPU = torch.device("cpu")


def test_a_sample_is_compared_with_the_others_of_its_photo() -> None:
    advantages = _advantages(np.array([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]]))
    assert advantages.tolist() == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]


def test_drawn_captions_become_a_batch_longest_first() -> None:
    words = torch.tensor([[4, END, PAD], [5, 6, END], [7, END, PAD]])
    batch, order = _as_batch(torch.arange(6.0).reshape(3, 2), words)
    assert order.tolist() == [1, 0, 2]
    assert batch.targets.tolist() == [[5, 6, END], [4, END, PAD], [7, END, PAD]]
    assert batch.inputs.tolist() == [[5, 6], [4, PAD], [7, PAD]]
    assert batch.features[:, 0].tolist() == [2.0, 0.0, 4.0]


def trainer(make_cache: MakeCache, seed: int = 0) -> Trainer:
    """Six photos, each with a caption of its own, and a decoder that has half learned them."""
    sentences = ["a dog runs", "two cats sleep", "the bird sings", "a man eats", "red cars", "snow"]
    cache = make_cache([[sentence] * 4 for sentence in sentences])
    vocabulary = build_vocabulary(cache.captions, 1)
    recipe = Recipe(
        embedding_size=16, hidden_size=32, batch_size=12, epochs=12, learning_rate=0.01,
        self_critical_epochs=60, self_critical_photos=6, self_critical_samples=4,
        self_critical_rate=0.003, label_smoothing=0.1,
    )  # fmt: skip
    torch.manual_seed(seed)
    decoder = CaptionDecoder(DecoderConfig(8, len(vocabulary), 16, 32))
    captions = caption_set(cache, vocabulary, device=CPU, max_length=50)
    made = Trainer(decoder, captions, recipe, seed=seed, vocabulary=vocabulary, precision="float32")
    for epoch in range(made.recipe.epochs):
        for _ in made.epoch(epoch):
            pass
    return made


def test_drawn_captions_get_better_at_what_is_rewarded(make_cache: MakeCache) -> None:
    made = trainer(make_cache)
    first, last = 12, 12 + 59
    rewards = {
        epoch: [-float(step.loss) for step in made.epoch(epoch)] for epoch in range(first, last + 1)
    }
    before = np.mean([rewards[epoch] for epoch in range(first, first + 5)])
    after = np.mean([rewards[epoch] for epoch in range(last - 4, last + 1)])
    assert 0 < before < 9
    assert after > before + 1


def remembering(
    critic: SelfCritical, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[np.ndarray]]:
    """Records the features that captions are sampled from, the sampled words and the rewards."""
    features: list[torch.Tensor] = []
    words: list[torch.Tensor] = []
    rewards: list[np.ndarray] = []
    score, draw = critic._reward.score, sample

    def remember_draw(decoder: CaptionDecoder, read: torch.Tensor, *args: Any, **more: Any) -> Any:
        features.append(read)
        words.append(draw(decoder, read, *args, **more))
        return words[-1]

    def remember_score(photos: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        rewards.append(score(photos, drawn))
        return rewards[-1]

    monkeypatch.setattr(self_critical, "sample", remember_draw)
    critic._reward = type("Remembering", (), {"score": staticmethod(remember_score)})()
    return features, words, rewards


@pytest.mark.parametrize("dropped", [0.0, 0.5])
def test_the_gradient_is_the_reward_weighted_log_likelihoods(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch, dropped: float
) -> None:
    """The same samples and rewards, differentiated by autograd through the plain decoder."""
    made = trainer(make_cache)
    decoder, captions = made.decoder, made.captions
    assert made._vocabulary is not None
    anchor = 0.0 if dropped else 0.3  # with dropout, the plain decoder cannot repeat the anchor
    critic = SelfCritical(
        decoder, made.objective, captions, made._vocabulary, samples=4, anchor=anchor
    )
    decoder.config = replace(decoder.config, feature_dropout=dropped)
    seen, drawn, scored = remembering(critic, monkeypatch)
    photos = np.array([0, 2, 5])
    count, reward = critic.gradients(photos, np.zeros(3, np.int64), seed=1)
    gradients = {
        name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None
    }
    (words,), (rewards,), (read,) = drawn, scored, seen
    zeros = (read == 0).float().mean()
    assert zeros == 0 if not dropped else 0.2 < zeros < 0.8
    assert int(count) == int((words != PAD).sum())
    assert float(reward) == rewards.mean()
    decoder.eval()
    features = read.repeat_interleave(4, 0)
    inputs = words[:, :-1].masked_fill(words[:, :-1] == END, PAD)
    logits = decoder(features, inputs)
    logits[..., [PAD, START, UNK]] = -1e4  # never drawn
    logits[:, 0, END] = -1e4
    log_probs = logits.log_softmax(-1)
    picked = log_probs.gather(2, words.unsqueeze(-1)).squeeze(-1) * (words != PAD)
    advantages = torch.from_numpy(_advantages(rewards.reshape(3, 4)).reshape(-1)).float()
    loss = -(picked.sum(1) * advantages).sum()
    # Photo row r has captions 4r … 4r + 3. Their mean loss has weight 0.3 for each sampled token.
    true = captions.batch(np.concatenate([np.arange(4 * row, 4 * row + 4) for row in photos]))
    loss = loss + anchor * int(count) * decoder.loss(true, label_smoothing=0.1)
    expected = torch.autograd.grad(loss, list(decoder.parameters()))
    for (name, _), wanted in zip(decoder.named_parameters(), expected, strict=True):
        torch.testing.assert_close(gradients[name], wanted, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("random_views", [False, True])
def test_self_critical_epochs_take_random_views_only_if_the_recipe_does(
    make_cache: MakeCache, random_views: bool
) -> None:
    cache = make_cache([["a dog runs", "a dog"]] * 12, views=("flip", "full"))
    vocabulary = build_vocabulary(cache.captions, 1)
    recipe = Recipe(
        embedding_size=8, hidden_size=8, epochs=1, self_critical_epochs=1,
        random_views=random_views,
    )  # fmt: skip
    decoder = CaptionDecoder(DecoderConfig(8, len(vocabulary), 8, 8))
    captions = caption_set(cache, vocabulary, device=CPU, max_length=50)
    made = Trainer(decoder, captions, recipe, seed=0, vocabulary=vocabulary, precision="float32")
    next(iter(made.epoch(1)))
    assert made._self_critical is not None
    ((_, views),) = made._self_critical.epoch_batches(12, seed=0, epoch=1)
    assert set(views.tolist()) == ({0, 1} if random_views else {1})


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_photos_with_many_captions_are_computed_in_parts(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    """No part is larger than 8 captions a photo, and the gradient is that of all at once."""
    sentences = ["a dog runs", "two cats sleep in the sun", "a bird", "snow"]
    cache = make_cache([sentences * 50, ["a man eats"] * 5, sentences])
    vocabulary = build_vocabulary(cache.captions, 1)
    torch.manual_seed(0)
    decoder = CaptionDecoder(DecoderConfig(8, len(vocabulary), 8, 8, dropout=dropout))
    captions = caption_set(cache, vocabulary, device=CPU, max_length=50)
    made = Trainer(decoder, captions, Recipe(), seed=0, vocabulary=vocabulary, precision="float32")
    sizes: list[int] = []
    compute = made.objective.loss_and_gradients

    def remember(batch: PackedBatch, *args: Any, **more: Any) -> torch.Tensor:
        sizes.append(len(batch.features))
        return compute(batch, *args, **more)

    monkeypatch.setattr(made.objective, "loss_and_gradients", remember)
    critic = SelfCritical(
        decoder, made.objective, captions, vocabulary, samples=2, anchor=1.0, random_views=False
    )
    gradients = []
    for limit in (64, 1000):
        monkeypatch.setattr(self_critical, "_LEAST_TRUE_CAPTIONS", limit)
        critic.gradients(np.array([0, 1, 2]), np.zeros(3, np.int64), seed=1)
        gradients.append(made.parameters.gradients.clone())
    drawn, all_captions = 3 * 2, 200 + 5 + 4
    assert sizes == [drawn, 64, 64, 64, 17, drawn, all_captions]
    if dropout:  # other masks
        assert not torch.equal(*gradients)
    else:
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
