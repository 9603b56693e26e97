"""The decoder that search uses on a CPU computes the steps of the plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from train import private_torch
from train.config import SearchConfig
from train.model.decoder import CaptionDecoder, DecoderConfig
from train.search import beam, hypotheses
from train.search.packed_decoder import PackedDecoder, for_search

SIZES: dict[str, Any] = {"feature_dim": 6, "vocab_size": 37, "embedding_size": 5, "hidden_size": 7}


def plain(**options: Any) -> CaptionDecoder:
    torch.manual_seed(0)
    made = CaptionDecoder(DecoderConfig(**{**SIZES, **options})).eval()
    for parameter in made.parameters():
        parameter.data.mul_(3)  # so that steps matter
    return made


@pytest.mark.parametrize("way", ["private", "public"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_embeddings": True, "photo_every_step": True, "dropout": 0.5, "feature_dropout": 0.3},
        {"num_layers": 3},
        {"start_after_photo": True},
    ],
)
def test_its_steps_are_those_of_the_decoder(
    options: dict[str, Any], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "public":
        monkeypatch.setattr(private_torch, "_private", lambda name: None)
    decoder = plain(**options)
    packed = for_search(decoder)
    assert isinstance(packed, PackedDecoder)
    photo = torch.randn(4, 6)
    with torch.inference_mode():
        inputs = decoder.read_photo(photo)
        torch.testing.assert_close(packed.read_photo(photo), inputs, rtol=0, atol=0)
        state = packed_state = None
        for word in (9, 20, 36):
            logits, state = decoder.step(inputs, state)
            packed_logits, packed_state = packed.step(inputs, packed_state)
            torch.testing.assert_close(packed_logits, logits)
            torch.testing.assert_close(packed_state.hidden, state.hidden)
            torch.testing.assert_close(packed_state.cell, state.cell)
            kept = torch.tensor([3, 1, 1, 0])  # as beams are
            state, packed_state = state.rows(kept), packed_state.rows(kept)
            inputs = packed.embed(torch.full((4,), word))


def test_search_makes_it_once_and_takes_one_that_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[CaptionDecoder] = []

    def beam_search(decoder: CaptionDecoder, *arguments: Any) -> Any:
        made.append(decoder)
        return beam.beam_search(decoder, *arguments)

    monkeypatch.setattr(hypotheses, "beam_search", beam_search)
    decoder = plain()
    config = SearchConfig(beam_size=2, max_length=4)
    hypotheses.search(decoder, torch.randn(3, 6), config, batch_size=2)
    assert made[0] is made[1]
    assert isinstance(made[0], PackedDecoder)
    hypotheses.search(made[0], torch.randn(1, 6), config)
    assert made[2] is made[0]


def test_it_is_not_for_training() -> None:
    decoder = plain().train()
    assert for_search(decoder) is decoder


def test_later_weights_need_another_one() -> None:
    """Validation after each epoch must not see the weights of the one before."""
    decoder, photo = plain(), torch.randn(2, 6)
    before = for_search(decoder).step(decoder.read_photo(photo), None)[0]
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(0.5)
    after = for_search(decoder).step(decoder.read_photo(photo), None)[0]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, decoder.step(decoder.read_photo(photo), None)[0])
