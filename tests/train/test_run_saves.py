from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.atomic import write_atomically
from cache.store import FeatureCache
from tests.train.runs import config, same, weights
from train.captions.caption_set import caption_set
from train.captions.vocabulary import build_vocabulary
from train.config import Recipe
from train.fit.best_epoch import BestEpochTracker
from train.fit.record.run_folder import TrainError
from train.fit.reports import EpochLog, Saved
from train.fit.run import train
from train.fit.trainer import Trainer
from train.model.bundle import load_bundle
from train.model.decoder import CaptionDecoder, DecoderConfig


@pytest.mark.parametrize(("pause_s", "saved"), [(1e9, 0), (0.0, 6)])
def test_by_default_a_run_saves_at_intervals_and_not_too_often(
    cache: FeatureCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pause_s: float,
    saved: int,
) -> None:
    monkeypatch.setattr("train.fit.run.SAVE_EVERY", 2)
    monkeypatch.setattr("train.fit.run.SAVE_PAUSE_S", pause_s)
    reports = list(train(config(cache, tmp_path / "run", save_every=None)))
    assert sum(isinstance(report, Saved) for report in reports) == saved


@pytest.mark.parametrize(("save_every", "kept"), [(None, 3), (2, 6)])
def test_a_few_models_within_epochs_are_kept_unless_asked_for(
    save_every: int | None,
    kept: int,
    cache: FeatureCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("train.fit.run.SAVE_EVERY", 2)
    monkeypatch.setattr("train.fit.run.SAVE_PAUSE_S", 0.0)
    run = tmp_path / "run"
    reports = list(train(config(cache, run, epochs=3, save_every=save_every)))
    saved = [report.path.name for report in reports if isinstance(report, Saved)]
    assert len(saved) == 6
    assert sorted(path.name for path in run.glob("epoch-*.cap")) == sorted(saved[-kept:])


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_all_files_of_a_run_have_the_same_mode(
    umask: int, mode: int, cache: FeatureCache, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        for _ in train(config(cache, tmp_path / "run", epochs=1)):
            pass
    finally:
        os.umask(before)
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").iterdir()}
    assert {"best.cap", "last.cap", "checkpoint.pt", "metrics.jsonl"} <= set(files)
    assert set(files.values()) == {mode}


def test_a_checkpoint_holds_each_number_once(cache: FeatureCache, tmp_path: Path) -> None:
    list(train(config(cache, tmp_path / "run", epochs=1, average_decay=0.9)))
    path = tmp_path / "run/checkpoint.pt"
    trainer = torch.load(path, weights_only=True)["trainer"]
    optimizer = trainer["optimizer"]
    parts = [trainer["parameters"], trainer["buffers"], trainer["average"]]
    parts += [optimizer["mean"], optimizer["mean_of_squares"]]
    numbers = [tensor for part in parts for tensor in part.values()]
    held = sum(tensor.untyped_storage().nbytes() for tensor in numbers)
    assert held == sum(tensor.nbytes for tensor in numbers)


def test_the_state_of_a_trainer_does_not_follow_its_training(cache: FeatureCache) -> None:
    vocabulary = build_vocabulary(cache.captions, 1)
    decoder = CaptionDecoder(DecoderConfig(8, len(vocabulary), embedding_size=8, hidden_size=16))
    recipe = Recipe(embedding_size=8, hidden_size=16, batch_size=16, average_decay=0.9)
    captions = caption_set(cache, vocabulary, device=torch.device("cpu"), max_length=50)
    trainer = Trainer(decoder, captions, recipe, seed=0)
    before = weights_of(trainer)
    state = trainer.state()
    list(trainer.epoch(0))
    assert not same(before, weights_of(trainer))
    trainer.load(state)
    assert same(before, weights_of(trainer))


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    assert trainer.average is not None
    average = {f"average of {name}": value for name, value in trainer.average.state().items()}
    values = trainer.decoder.state_dict() | average
    return {name: value.clone() for name, value in values.items()}


def test_quick_epochs_are_written_once_at_the_end(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def remember(path: Path, write: Callable[[Path], object]) -> None:
        written.append(path.name)
        write_atomically(path, write)

    monkeypatch.setattr("train.model.bundle.write_atomically", remember)
    monkeypatch.setattr("train.fit.record.run_folder.write_atomically", remember)
    reports = train(config(cache, tmp_path / "run", epochs=5))
    for report in reports:
        if isinstance(report, EpochLog) and report.epoch < 4:
            assert not written
    assert written == ["best.cap", "last.cap", "checkpoint.pt"]
    written.clear()
    list(train(config(cache, tmp_path / "run", epochs=5, resume=True)))
    assert not written  # nothing has changed


def test_a_kill_costs_no_more_than_the_pause_or_one_epoch(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only epochs move: each takes 4 s, and saving takes none."""
    now, ticks = 0, itertools.count()

    def validation_loss(*_: object) -> float:
        nonlocal now
        now += 4
        return 1.0

    monkeypatch.setattr("train.fit.run.time.monotonic", lambda: now)
    monkeypatch.setattr("train.fit.run.time.perf_counter", lambda: now + 1e-9 * next(ticks))
    monkeypatch.setattr(Trainer, "validation_loss", validation_loss)
    saved: list[int] = []
    for report in train(config(cache, tmp_path / "run", epochs=7, log_every=99)):
        if isinstance(report, EpochLog):
            path = tmp_path / "run/checkpoint.pt"
            found = torch.load(path, weights_only=True)["epoch"] if path.exists() else 0
            saved.append(found)
    # After 8 s, because after the next epoch 12 s would be at stake; and at the end.
    assert saved == [0, 2, 2, 4, 4, 6, 7]


def test_an_interruption_between_epochs_keeps_the_scores_of_the_last(
    cache: FeatureCache, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    reports = train(config(cache, run))
    log = next(report for report in reports if isinstance(report, EpochLog))
    assert not list(run.glob("*.cap"))
    reports.close()
    assert load_bundle(run / "last.cap").training["scores"]["cider"] == log.cider
    assert torch.load(run / "checkpoint.pt", weights_only=True)["epoch"] == 1


def test_an_error_loses_no_finished_epoch(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    reports = train(config(cache, run))
    next(report for report in reports if isinstance(report, EpochLog))
    monkeypatch.setattr(Trainer, "_step", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        list(reports)
    monkeypatch.undo()
    list(train(config(cache, run, resume=True)))
    list(train(config(cache, tmp_path / "whole")))
    assert same(weights(run / "last.cap"), weights(tmp_path / "whole/last.cap"))


def test_a_model_under_two_names_takes_the_space_of_one(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file system has hard links."""
    best, last = tmp_path / "a/best.cap", tmp_path / "a/last.cap"
    list(train(config(cache, tmp_path / "a", epochs=1)))
    assert best.samefile(last)

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links")

    monkeypatch.setattr(os, "link", no_links)
    list(train(config(cache, tmp_path / "b", epochs=1)))
    assert not (tmp_path / "b/best.cap").samefile(tmp_path / "b/last.cap")
    for name in ("best.cap", "last.cap"):
        assert (tmp_path / "b" / name).read_bytes() == best.read_bytes()


def test_more_training_leaves_a_linked_model_alone(cache: FeatureCache, tmp_path: Path) -> None:
    run = tmp_path / "run"
    list(train(config(cache, run, epochs=1)))
    before = (run / "best.cap").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BestEpochTracker, "update", lambda *_: False)
        list(train(config(cache, run, epochs=2, resume=True)))
    assert (run / "best.cap").read_bytes() == before
    assert (run / "last.cap").read_bytes() != before


def test_save_every_that_saves_nothing_is_refused(cache: FeatureCache, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(TrainError) as error:
        next(train(config(cache, run, save_every=6)))
    assert str(error.value) == (
        f"{run}: no epoch has more than 5 steps, and steps are counted anew in each, so "
        "--save-every 6 saves nothing; lower it or leave it out"
    )
    assert not run.exists()
    rewarded: dict[str, Any] = {"self_critical_epochs": 1, "self_critical_photos": 4}
    next(train(config(cache, run, save_every=6, **rewarded)))  # 24 photos make 6 steps


def test_nothing_is_saved_within_epochs_if_not_wanted(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.fit.run.SAVE_EVERY", 2)
    monkeypatch.setattr("train.fit.run.SAVE_PAUSE_S", 0.0)
    reports = train(config(cache, tmp_path / "run", epochs=1), saves_within_epochs=False)
    assert not any(isinstance(report, Saved) for report in reports)
