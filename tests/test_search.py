from __future__ import annotations

import itertools

import pytest
import torch

from train.config import SearchConfig
from train.decoder import CaptionDecoder, DecoderConfig
from train.search import Hypothesis, search
from train.vocab import END, PAD, START, UNK

WORDS = 8  # the four special ones and four real words


def decoder(seed: int, scale: float = 3.0) -> CaptionDecoder:
    """A random decoder with opinions: large weights make probabilities uneven."""
    torch.manual_seed(seed)
    made = CaptionDecoder(DecoderConfig(3, WORDS, embedding_size=4, hidden_size=5)).eval()
    for parameter in made.parameters():
        parameter.data.mul_(scale)
    made.head.bias.data[END] -= 4 * (seed % 4)  # short and long captions among the best
    return made


def features(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)).half()


def exhaustive(model: CaptionDecoder, photo: torch.Tensor, config: SearchConfig) -> Hypothesis:
    """The best of all captions of up to `max_length` words, each scored as a whole."""
    best = Hypothesis((), float("-inf"))
    for length in range(1, config.max_length + 1):
        words = torch.tensor(list(itertools.product(range(4, WORDS), repeat=length)))
        with torch.no_grad():
            log_probs = model(photo.expand(len(words), -1), words).log_softmax(-1)
        targets = torch.nn.functional.pad(words, (0, 1), value=END)
        totals = log_probs.gather(2, targets.unsqueeze(-1)).sum((1, 2))
        scores = totals / (length + 1) ** config.length_penalty
        if float(scores.max()) > best.score:
            best = Hypothesis(tuple(words[scores.argmax()].tolist()), float(scores.max()))
    return best


def test_a_wide_beam_finds_what_exhaustive_search_finds() -> None:
    lengths = set()
    for seed, length_penalty in itertools.product(range(6), (0.0, 0.7, 1.0)):
        config = SearchConfig(beam_size=400, max_length=4, length_penalty=length_penalty)
        model, photos = decoder(seed), features(3, seed)
        for photo, found in zip(photos, search(model, photos, config), strict=True):
            expected = exhaustive(model, photo, config)
            assert found.words == expected.words
            assert found.score == pytest.approx(expected.score, abs=1e-4)
            lengths.add(len(found.words))
    assert len(lengths) > 2


def greedy_by_hand(model: CaptionDecoder, photo: torch.Tensor, max_length: int) -> tuple[int, ...]:
    words: list[int] = []
    while len(words) < max_length:
        with torch.no_grad():
            logits = model(photo.unsqueeze(0), torch.tensor([words], dtype=torch.int64))[0, -1]
        logits[[PAD, START, UNK] if words else [PAD, START, UNK, END]] = float("-inf")
        word = int(logits.argmax())
        if word == END:
            break
        words.append(word)
    return tuple(words)


def test_greedy_takes_the_likeliest_word_at_every_step() -> None:
    config = SearchConfig(beam_size=1, max_length=6)
    for seed in range(5):
        model, photos = decoder(seed), features(4, seed)
        found = search(model, photos, config)
        assert [h.words for h in found] == [greedy_by_hand(model, p, 6) for p in photos]


def test_a_beam_of_one_is_greedy() -> None:
    from train import search as module

    config = SearchConfig(beam_size=1, max_length=6)
    for seed in range(8):
        model, photos = decoder(seed), features(16, seed)
        with torch.inference_mode():
            by_beam = module._beam(model, photos, config)
        by_greedy = search(model, photos, config)
        assert [h.words for h in by_beam] == [h.words for h in by_greedy]
        assert [h.score for h in by_beam] == pytest.approx([h.score for h in by_greedy], abs=1e-5)


def test_photos_do_not_influence_one_another() -> None:
    model, photos = decoder(3), features(9)
    config = SearchConfig(beam_size=3, max_length=6)
    together = search(model, photos, config)
    alone = [search(model, photo.unsqueeze(0), config)[0] for photo in photos]
    in_chunks = search(model, photos, config, batch_size=2)
    assert [h.words for h in together] == [h.words for h in alone]
    assert [h.words for h in together] == [h.words for h in in_chunks]


@pytest.mark.parametrize("beam_size", [1, 2, 5, 50])
def test_a_caption_always_comes_back_without_special_words(beam_size: int) -> None:
    model = decoder(0)
    model.head.bias.data[END] = -1000.0  # never wants to end
    model.head.bias.data[UNK] = 10.0  # always wants <unk>
    config = SearchConfig(beam_size=beam_size, max_length=7)
    for found in search(model, features(4), config):
        assert len(found.words) == 7
        assert not {PAD, START, END, UNK} & set(found.words)
        assert found.score > float("-inf")
    model.head.bias.data[END] = 2000.0  # ends at once
    assert [len(h.words) for h in search(model, features(4), config)] == [1] * 4
    assert search(model, features(0), config) == []
