"""Captions drawn from the decoder."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.train.test_search import WORDS, decoder, features
from train.captions.vocabulary import END, PAD
from train.config import SearchConfig
from train.search.hypotheses import search, search_several
from train.search.rollout import sample


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def log_probability(model: torch.nn.Module, photo: torch.Tensor, words: list[int]) -> float:
    """Of these words and <end>, without the forbidden words: as `sample` should draw them."""
    with torch.no_grad():
        logits = model(photo.unsqueeze(0), torch.tensor([words], dtype=torch.int64))[0]
    logits[:, [0, 1, 3]] = float("-inf")
    logits[0, END] = float("-inf")
    steps = logits.log_softmax(-1).gather(1, torch.tensor([*words, END]).unsqueeze(1))
    return float(steps.sum())


def test_captions_are_drawn_as_often_as_the_decoder_says() -> None:
    model, photo = decoder(1, scale=1.5), features(1)
    drawn = sample(model, photo, 40_000, 1.0, 12, seeded())
    counts = Counter(tuple(w for w in row if w not in (PAD, END)) for row in drawn.tolist())
    for words, count in counts.most_common(8):
        expected = log_probability(model, photo[0], list(words))
        assert count / 40_000 == pytest.approx(torch.tensor(expected).exp().item(), abs=0.01)


def test_drawn_captions_end_and_are_padded() -> None:
    model = decoder(0)
    drawn = sample(model, features(3), 4, 1.0, 6, seeded())
    assert drawn.dtype == torch.int64
    assert drawn.shape[0] == 12
    assert drawn.shape[1] <= 7
    for row in drawn.tolist():
        end = row.index(END)
        assert 1 <= end <= 6
        assert min(row[:end]) >= 4
        assert set(row[end + 1 :]) <= {PAD}
    assert (drawn[:, -1] != PAD).any()
    model.head.bias.data[END] = -1000.0
    assert sample(model, features(2), 1, 1.0, 6, seeded()).shape == (2, 7)
    assert sample(model, features(0), 5, 1.0, 6, seeded()).shape == (0, 0)


def test_the_seed_decides_what_is_drawn() -> None:
    model, photos = decoder(2), features(5)
    once, again, other = (sample(model, photos, 3, 1.0, 8, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert len({tuple(row) for row in once[:3].tolist()}) > 1  # the samples of a photo differ


def test_what_is_drawn_can_be_trained_on() -> None:
    model, photos = decoder(2).train(), features(5)
    drawn = sample(model.eval(), photos, 1, 1.0, 8, seeded())
    model.train()(photos, drawn[:, :-1]).sum().backward()
    assert model.embed.weight.grad is not None


def test_a_cold_draw_is_greedy() -> None:
    model, photos = decoder(3), features(6)
    drawn = search(model, photos, SearchConfig(sample=True, temperature=0.001, max_length=6))
    greedy = search(model, photos, SearchConfig(beam_size=1, max_length=6))
    assert [h.words for h in drawn] == [h.words for h in greedy]
    narrow = search(model, photos, SearchConfig(sample=True, top_p=0.0001, max_length=6))
    assert [h.words for h in narrow] == [h.words for h in greedy]


def test_a_photos_draws_depend_on_its_number_alone() -> None:
    model, photos = decoder(3), features(9)
    config = SearchConfig(sample=True, captions=4, top_p=0.9, temperature=0.8, max_length=6)
    together = search_several(model, photos, config)
    in_chunks = search_several(model, photos, config, batch_size=2)
    alone = [
        search_several(model, photos[i : i + 1], config, numbers=[i])[0] for i in range(len(photos))
    ]
    assert [[h.words for h in found] for found in together] == [
        [h.words for h in found] for found in in_chunks
    ]
    assert [[h.words for h in found] for found in together] == [
        [h.words for h in found] for found in alone
    ]
    assert all(len(found) == 4 for found in together)
    assert all(found == sorted(found, key=lambda h: -h.score) for found in together)


def test_the_vocabulary_is_as_wide_as_the_decoders() -> None:
    drawn = sample(decoder(1), features(50), 20, 3.0, 10, seeded())
    assert set(drawn.flatten().tolist()) == {PAD, END, *range(4, WORDS)}
