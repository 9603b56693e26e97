from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from cache.store import FeatureCache
from tests.train.runs import config, same
from train.captions.caption_set import caption_set
from train.captions.vocabulary import build_vocabulary
from train.config import Recipe
from train.fit.reports import Saved
from train.fit.run import train
from train.fit.trainer import Trainer
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
