"""The optimizer, the learning rate's schedule and the weights' average."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from train.config import FixedRecipe, Recipe
from train.model.decoder import CaptionDecoder, DecoderConfig
from train.model.flat_parameters import FlatParameters
from train.step.update.optimizer import FlatAdamW, learning_rate
from train.step.update.weight_average import WeightAverage


def decoder() -> CaptionDecoder:
    torch.manual_seed(0)
    return CaptionDecoder(DecoderConfig(5, 9, embedding_size=4, hidden_size=6))


@pytest.mark.parametrize("clip_norm", [1000.0, 0.5])
def test_steps_are_torchs_own_adamw_after_clipping(clip_norm: float) -> None:
    plain, model = decoder(), decoder()
    matrices = [p for p in plain.parameters() if p.dim() == 2]
    vectors = [p for p in plain.parameters() if p.dim() == 1]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.01,
    )
    parameters = FlatParameters(model, transposed=True)
    optimizer = FlatAdamW(parameters, Recipe(weight_decay=0.1, clip_norm=clip_norm))
    optimizer.set_rate(0.01)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            theirs.grad = torch.randn(theirs.shape, generator=generator)
            assert mine.grad is not None
            mine.grad.copy_(theirs.grad * 7)  # a sum over seven tokens
        nn.utils.clip_grad_norm_(plain.parameters(), clip_norm)
        reference.step()
        optimizer.step(torch.tensor(7))
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_the_state_is_restored_by_name_whatever_the_layout() -> None:
    states: list[dict[str, Any]] = []
    for transposed in (True, False):
        model = decoder()
        parameters = FlatParameters(model, transposed=transposed)
        optimizer = FlatAdamW(parameters, Recipe())
        optimizer.set_rate(0.01)
        if transposed:
            parameters.gradients.copy_(torch.arange(len(parameters.gradients)))
            optimizer.step(torch.tensor(3))
        else:
            optimizer.load(copy.deepcopy(states[0]))
        states.append(optimizer.state())
    assert states[0]["steps"] == states[1]["steps"] == 1
    for name, mean in states[0]["mean"].items():
        assert torch.equal(mean, states[1]["mean"][name])


def test_the_rate_rises_and_falls_as_the_recipe_says() -> None:
    level = FixedRecipe(learning_rate=0.4, warmup=0.25)
    assert [learning_rate(level, step, 8) for step in range(8)] == [0.2] + [0.4] * 7
    falling = FixedRecipe(learning_rate=0.4, warmup=0.25, decay="cosine")
    rates = [learning_rate(falling, step, 8) for step in range(8)]
    assert rates[:3] == [0.2, 0.4, 0.4]
    assert rates[5] == pytest.approx(0.2)
    assert 0 < rates[7] < rates[6] < rates[5]


def test_the_average_follows_the_weights_and_replaces_them() -> None:
    model = decoder()
    parameters = FlatParameters(model, transposed=True)
    average = WeightAverage(parameters, decay=0.5)
    start = model.head.weight.detach().clone()
    for step in range(30, 33):
        with torch.no_grad():
            parameters.values.add_(1)
        average.set_step(step)
        average.update()
    live = model.head.weight.detach().clone()
    # 0 → 1/2 → 1/2 · 1/2 + 2/2 = 5/4 → 5/8 + 3/2 = 17/8
    with average.in_place():
        torch.testing.assert_close(model.head.weight.detach(), start + 17 / 8)
    assert torch.equal(model.head.weight.detach(), live)
    average.set_step(0)  # the first updates use a lower decay
    average.update()
    with average.in_place():
        torch.testing.assert_close(model.head.weight.detach(), 0.1 * (start + 17 / 8) + 0.9 * live)
