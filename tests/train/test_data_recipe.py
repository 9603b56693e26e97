"""What a recipe leaves to the data: it follows the captions, and a resumed run keeps it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.conftest import MakeCache
from train.config import BEST, CLASSIC, FixedRecipe, Recipe, TrainConfig
from train.fit.data_recipe import data_recipe, held_out_share
from train.fit.reports import Advice, EpochLog, OutOfPatience, Started
from train.fit.run import train
from train.model.bundle import load_bundle

SMALL = {"embedding_size": 8, "hidden_size": 16}


@pytest.mark.parametrize(
    ("captions", "batch_size", "min_count"),
    [(1, 16, 1), (80, 16, 1), (999, 16, 1), (1_125, 32, 2), (4_750, 128, 2), (28_500, 128, 4)],
)
def test_batches_and_vocabulary_follow_the_captions(
    captions: int, batch_size: int, min_count: int
) -> None:
    recipe = data_recipe(BEST, captions)
    assert (recipe.batch_size, recipe.min_count) == (batch_size, min_count)


@pytest.mark.parametrize(
    ("captions", "epochs", "patience_steps"),
    [(80, 300, 250), (1_125, 42, 250), (28_500, 20, 5 * 223), (414_113, 20, 5 * 3_236)],
)
def test_few_captions_get_more_epochs_and_many_no_more_than_twenty(
    captions: int, epochs: int, patience_steps: int
) -> None:
    recipe = data_recipe(BEST, captions)
    assert (recipe.epochs, recipe.patience_steps) == (epochs, patience_steps)


def test_a_trained_model_is_changed_at_a_lower_rate() -> None:
    assert data_recipe(BEST, 80).learning_rate == 0.002
    assert data_recipe(BEST, 80, from_model=True).learning_rate == 0.0005
    given = dataclasses.replace(BEST, learning_rate=0.01)
    assert data_recipe(given, 80, from_model=True).learning_rate == 0.01
    assert data_recipe(CLASSIC, 80, from_model=True).learning_rate == 0.001


def test_what_is_given_is_kept() -> None:
    assert data_recipe(CLASSIC, 80) == FixedRecipe(epochs=2, batch_size=128, min_count=4)
    given = dataclasses.replace(BEST, epochs=7, batch_size=9, min_count=3, learning_rate=0.1)
    fixed = data_recipe(given, 80)
    assert (fixed.epochs, fixed.batch_size, fixed.min_count) == (7, 9, 3)
    assert fixed.patience_steps is None
    assert data_recipe(fixed, 1_000_000) is fixed
    # Only the numbers that were left open have changed.
    assert {n: getattr(fixed, n) for n in vars(given)} == vars(given)


@pytest.mark.parametrize(
    ("photos", "held_out"), [(5, 1), (50, 10), (100, 20), (250, 25), (1_000, 50), (82_783, 4_139)]
)
def test_enough_photos_are_held_out_to_choose_by(photos: int, held_out: int) -> None:
    assert round(photos * held_out_share(photos)) == held_out


def run_config(cache: Path, out: Path, **changes: object) -> TrainConfig:
    # At this rate the loss soon finds its lowest point.
    recipe = dataclasses.replace(BEST, learning_rate=0.05, **SMALL)  # type: ignore[arg-type]
    return TrainConfig(cache, out, recipe=recipe, device="cpu", **changes)  # type: ignore[arg-type]


def test_a_run_ends_when_steps_bring_nothing_more_and_says_so(
    tmp_path: Path, make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.fit.data_recipe._PATIENCE_STEPS", 30)
    cache = make_cache([["a dog runs", "the dog runs"], ["a cat sleeps", "the cat"]] * 10)
    reports = list(train(run_config(cache.path, tmp_path / "run")))
    (started,) = [r for r in reports if isinstance(r, Started)]
    # 16 photos with 32 captions train in two steps of 16, at most 1,500 of them.
    length = "at most 750 epochs of 2 steps of 16 captions, until 30 steps have brought no better "
    assert f"{length}model; with 4 validation photos the loss chooses" in started.summary()
    assert "(every word)" in started.summary()
    epochs = [r for r in reports if isinstance(r, EpochLog)]
    best = max(log.epoch for log in epochs if log.best)
    assert 1 + epochs[-1].epoch == len(epochs) == best + 1 + 15 < 750
    assert epochs[3].steps == 8
    assert epochs[3].seconds_left == pytest.approx(746 * epochs[3].seconds)
    ended = reports[-2]  # then comes advice
    assert isinstance(ended, OutOfPatience)
    assert ended.line() == (
        f"no better model in 30 steps, so epochs {len(epochs) + 1} to 750 are left out "
        "(--epochs N trains N epochs)"
    )
    settings = load_bundle(tmp_path / "run/best.cap").training["config"]
    assert {n: settings[n] for n in ("epochs", "batch_size", "min_count", "val_share")} == {
        "epochs": 750,
        "batch_size": 16,
        "min_count": 1,
        "val_share": 0.2,
    }


def test_a_resumed_run_keeps_the_numbers_that_it_chose(
    tmp_path: Path, make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache([["a dog runs", "the dog runs"], ["a cat sleeps", "the cat"]] * 10)
    reports = train(run_config(cache.path, tmp_path / "run"))
    for report in reports:
        if isinstance(report, EpochLog) and report.epoch == 1:
            break
    reports.close()
    monkeypatch.setattr("train.fit.data_recipe._MOST_STEPS", 10)
    monkeypatch.setattr("train.fit.data_recipe._SMALLEST_BATCH", 4)
    started = next(train(run_config(cache.path, tmp_path / "run", resume=True)))
    assert isinstance(started, Started)
    assert (started.epoch, started.epochs, started.batch_size) == (2, 750, 16)


def test_epochs_are_counted_where_they_are_given(tmp_path: Path, make_cache: MakeCache) -> None:
    cache = make_cache([["a dog runs"]] * 8)
    recipe = Recipe(**SMALL, epochs=3, batch_size=2, min_count=1)  # type: ignore[arg-type]
    reports = train(TrainConfig(cache.path, tmp_path / "run", recipe=recipe, device="cpu"))
    assert sum(isinstance(report, EpochLog) for report in reports) == 3
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert sum("val_loss" in json.loads(line) for line in lines) == 3


def test_patience_counts_epochs_where_it_is_given(tmp_path: Path, make_cache: MakeCache) -> None:
    cache = make_cache([["a dog runs", "the dog runs"], ["a cat sleeps", "the cat"]] * 10)
    reports = list(train(run_config(cache.path, tmp_path / "run", patience=2)))
    epochs = [report for report in reports if isinstance(report, EpochLog)]
    best = max(log.epoch for log in epochs if log.best)
    assert len(epochs) == best + 1 + 2
    ended = reports[-2]  # then comes advice
    assert isinstance(ended, OutOfPatience)
    assert ended.line().startswith("no better model within --patience, so epochs ")


def test_little_data_and_empty_talk_are_said_kindly(
    tmp_path: Path, make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache([["a dog runs"]] * 8 + [["a cat"]] * 4)
    recipe = Recipe(**SMALL, epochs=1, batch_size=4, min_count=1)  # type: ignore[arg-type]

    def last_line(out: str) -> str:
        reports = list(train(TrainConfig(cache.path, tmp_path / out, recipe=recipe, device="cpu")))
        assert isinstance(reports[-1], Advice)
        return reports[-1].line()

    monkeypatch.setattr("train.fit.validation.degenerate", lambda captions: None)
    assert last_line("few").startswith("10 captions are few to learn from: more photos, more ")
    assert "degenerate" not in load_bundle(tmp_path / "few").training
    monkeypatch.setattr("train.fit.validation.degenerate", lambda captions: "words repeat")
    found = "the captions of the best model mean little (words repeat): more photos, more captions "
    assert last_line("empty").startswith(found)
    assert load_bundle(tmp_path / "empty").training["degenerate"] == "words repeat"
    monkeypatch.setattr("train.fit.validation.degenerate", lambda captions: None)
    monkeypatch.setattr("train.fit.run.FEW_CAPTIONS", 10)
    config = TrainConfig(cache.path, tmp_path / "enough", recipe=recipe, device="cpu")
    assert not any(isinstance(report, Advice) for report in train(config))
