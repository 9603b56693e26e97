"""The likeliest photos of a sentence are those of the plain computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from train.captions.vocabulary import END
from train.model.decoder import CaptionDecoder, DecoderConfig
from train.search import likelihood
from train.search.likelihood import likeliest, log_likelihoods

SENTENCES = [[5], [7, 5, 9], [4, 8, 8, 6, END]]


@pytest.fixture(scope="module", params=[False, True], ids=["classic", "best"])
def decoder(request: pytest.FixtureRequest) -> CaptionDecoder:
    torch.manual_seed(0)
    config = DecoderConfig(
        feature_dim=6,
        vocab_size=40,
        embedding_size=8,
        hidden_size=12,
        num_layers=2 if request.param else 1,
        tie_embeddings=request.param,
        photo_every_step=request.param,
    )
    decoder = CaptionDecoder(config).eval()
    for parameter in decoder.parameters():
        parameter.data *= 4  # so that photos differ
    return decoder


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return torch.randn(300, 6, generator=torch.Generator().manual_seed(1)).half()


def plain(decoder: CaptionDecoder, features: torch.Tensor, words: list[int]) -> torch.Tensor:
    """(N,) by teacher forcing and a softmax over everything."""
    given = torch.tensor(words).expand(len(features), -1)
    with torch.no_grad():
        log_probs: torch.Tensor = decoder(features, given[:, :-1]).log_softmax(2)
    return log_probs.gather(2, given.unsqueeze(2))[..., 0].sum(1)


@pytest.mark.parametrize("words", SENTENCES, ids=len)
def test_likelihoods_are_those_of_teacher_forcing(
    decoder: CaptionDecoder,
    features: torch.Tensor,
    words: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(likelihood, "_LOGITS_BYTES", 4 * 40 * 7)  # seven rows at once
    expected = plain(decoder, features, words)
    torch.testing.assert_close(log_likelihoods(decoder, features, words), expected)


@pytest.mark.parametrize("words", SENTENCES, ids=len)
@pytest.mark.parametrize("count", [1, 10, 400])
def test_the_likeliest_are_found_although_most_are_dropped_early(
    decoder: CaptionDecoder, features: torch.Tensor, words: list[int], count: int
) -> None:
    expected = plain(decoder, features, words)
    order = expected.argsort(descending=True, stable=True)[:count]
    rows = np.arange(1000, 1300)
    blocks = [(rows[at : at + 32], features[at : at + 32]) for at in range(0, 300, 32)]
    found = likeliest(decoder, blocks, words, count)
    assert found.rows.tolist() == (order + 1000).tolist()
    np.testing.assert_allclose(found.log_probs, expected[order].numpy(), rtol=1e-4)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(photos, words of the softmax) of every step that is computed."""
    steps: list[tuple[int, int]] = []
    whole = likelihood._log_probs

    def counted(
        decoder: CaptionDecoder, hidden: torch.Tensor, word: int, softmax_words: int
    ) -> torch.Tensor:
        steps.append((len(hidden), softmax_words))
        return whole(decoder, hidden, word, softmax_words)

    monkeypatch.setattr(likelihood, "_log_probs", counted)
    return steps


def test_a_photo_below_the_floor_is_dropped_before_its_last_word(
    decoder: CaptionDecoder, features: torch.Tensor, computed: list[tuple[int, int]]
) -> None:
    expected = plain(decoder, features, SENTENCES[2])
    floor = float(expected.sort().values[-10])
    found = log_likelihoods(decoder, features, SENTENCES[2], floor)
    assert computed[0] == (300, 40)
    assert computed[-1][0] < 290, computed
    torch.testing.assert_close(found[expected >= floor], expected[expected >= floor])
    assert log_likelihoods(decoder, features, SENTENCES[2], 1.0).tolist() == [-torch.inf] * 300


@pytest.mark.parametrize("words", [*SENTENCES, [30, 39, 12, 5]], ids=str)
def test_bounds_by_some_words_drop_no_photo_above_the_floor(
    decoder: CaptionDecoder,
    features: torch.Tensor,
    computed: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    words: list[int],
) -> None:
    monkeypatch.setattr(likelihood, "_BOUND_WORDS", 19)
    expected = plain(decoder, features, words)
    floor = float(expected.sort().values[-10])
    found = log_likelihoods(decoder, features, words, floor)
    torch.testing.assert_close(found[expected >= floor], expected[expected >= floor])
    assert computed[0] == (300, 19)
    whole = [photos for photos, softmax_words in computed if softmax_words == 40]
    assert 10 <= whole[0] < 300
    rows = torch.arange(300)
    with torch.inference_mode():
        photos = decoder.read_photo(features)
        _, bounds = likelihood._summed(decoder, photos, rows, words, -torch.inf, 19)
    assert (bounds >= expected - 1e-5).all()
    assert (bounds > expected + 1e-3).any()
