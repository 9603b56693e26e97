"""`--tensorboard` writes the curves for TensorBoard, or says before training what is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from cache.store import FeatureCache
from tests.train.runs import config, log_lines
from train.fit.record.run_folder import TrainError
from train.fit.record.tensorboard import Board
from train.fit.reports import EpochLog, StepLog
from train.fit.run import train


def scalars(run: Path) -> dict[str, list[tuple[int, Any]]]:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reading.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_shows_what_the_log_says(cache: FeatureCache, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pytest.importorskip("tensorboard")
    settings: dict[str, Any] = {
        "tensorboard": True,
        "self_critical_epochs": 1,
        "self_critical_photos": 12,
    }
    reports = train(config(cache, run, epochs=2, **settings))
    next(report for report in reports if isinstance(report, EpochLog))
    next(reports), next(reports), next(reports)
    reports.close()
    list(train(config(cache, run, epochs=2, resume=True, **settings)))
    lines = log_lines(run)
    # Epochs of 5 steps, and a self-critical one of 2.
    steps = [line for line in lines if "loss" in line]
    places = [5 * line["epoch"] + line["step"] for line in steps]
    assert places[-1] == 12
    shown = scalars(run)
    losses = [line["loss"] for line in steps]
    rewards = shown.pop("train/reward")
    assert rewards == [(12, pytest.approx(-losses[-1]))]
    assert shown["train/loss"] == list(zip(places[:-1], map(pytest.approx, losses), strict=False))
    assert shown["train/learning_rate"][-1] == (12, pytest.approx(5e-5))
    epochs = [line for line in lines if "val_loss" in line]
    for name, member in (("loss", "val_loss"), ("CIDEr", "cider"), ("perplexity", "perplexity")):
        expected = [pytest.approx(line[member]) for line in epochs]
        assert shown[f"validation/{name}"] == list(zip((5, 10, 12), expected, strict=True))
    list(train(config(cache, run, epochs=1, overwrite=True, tensorboard=True)))
    assert [step for step, _ in scalars(run)["validation/loss"]] == [5]


def test_without_tensorboard_nothing_begins(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it fails
    with pytest.raises(TrainError) as error:
        next(train(config(cache, tmp_path / "run", tensorboard=True)))
    assert str(error.value) == (
        "--tensorboard needs TensorBoard; get it with `pip install 'tensorboard>=2.18'`, "
        "or leave the option out (curves.png is drawn without it)"
    )
    assert not (tmp_path / "run").exists()


def test_steps_that_are_trained_again_after_a_kill_are_shown_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for first, losses in ((0, (1.0, 2.0, 3.0, 4.0)), (2, (30.0, 40.0))):
        with Board(tmp_path, first) as board:
            for step, loss in enumerate(losses, first + 1):
                board.add_steps(StepLog(0, 1, step, 4, loss, 100.0, all_steps=step))
    assert scalars(tmp_path)["train/loss"] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]
