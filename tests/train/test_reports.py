"""The log lines of a run say what the numbers are."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.conftest import MakeCache
from train.config import Recipe, TrainConfig
from train.fit.reports import StepLog
from train.fit.run import train

CAPTIONS = [["a dog runs", "the dog runs on"], ["a cat sleeps"]] * 4


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_perplexity_is_that_of_the_true_words_or_is_not_printed(
    make_cache: MakeCache, tmp_path: Path, smoothing: float
) -> None:
    recipe = Recipe(
        embedding_size=8, hidden_size=16, epochs=1, min_count=1, label_smoothing=smoothing
    )
    cache = make_cache(CAPTIONS)
    config = TrainConfig(cache.path, tmp_path / "run", recipe=recipe, device="cpu")
    logs = [report for report in train(config) if isinstance(report, StepLog)]
    assert logs
    for log in logs:
        if smoothing:
            assert log.perplexity is None
            assert "Perplexity" not in log.line()
            assert f", Smoothed loss: {log.loss:.4f}, " in log.line()
        else:
            perplexity = math.exp(log.loss)
            assert log.perplexity == pytest.approx(perplexity)
            assert f", Loss: {log.loss:.4f}, Perplexity: {perplexity:.2f}, " in log.line()
