from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache.store import FeatureCache
from tests.conftest import MakeCache
from tests.train.runs import config, log_lines, same, weights
from train.captions.photo_split import split_photos
from train.config import Recipe, SearchConfig
from train.fit.best_epoch import BestEpochTracker, ValidatedEpoch
from train.fit.record.run_folder import TrainError
from train.fit.reports import EpochLog, OutOfPatience, StepLog
from train.fit.run import train
from train.fit.trainer import Trainer
from train.fit.validation import ValidationPhotos
from train.model.bundle import load_bundle
from train.search.hypotheses import search


def test_a_run_leaves_its_models_and_its_log(cache: FeatureCache, tmp_path: Path) -> None:
    reports = [report for report in train(config(cache, tmp_path / "run", save_every=4)) if report]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "best.cap",
        "last.cap",
        "checkpoint.pt",
        "metrics.jsonl",
        *(f"epoch-{epoch}-step-4.cap" for epoch in range(3)),
    }
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines if "loss" in line] == [
        (epoch, step) for epoch in range(3) for step in (2, 4, 5)
    ]
    logs = [report for report in reports if isinstance(report, StepLog)]
    assert logs[0].line().startswith("Epoch [1/3], Step [2/5], Loss: ")
    assert logs[0].perplexity == pytest.approx(math.exp(logs[0].loss))
    assert logs[-1].loss < logs[0].loss


def test_losses_that_are_read_late_make_the_same_log(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, a step is logged after the next one; here also when the run is interrupted."""
    for _ in train(config(cache, tmp_path / "soon", log_every=1)):
        pass
    monkeypatch.setattr("train.fit.run._reads_losses_late", lambda device: True)
    reports = train(config(cache, tmp_path / "late", log_every=1))
    for _ in itertools.islice(reports, 8):
        pass
    reports.close()
    for _ in train(config(cache, tmp_path / "late", log_every=1, resume=True)):
        pass
    assert log_lines(tmp_path / "late") == log_lines(tmp_path / "soon")
    assert same(weights(tmp_path / "soon/last.cap"), weights(tmp_path / "late/last.cap"))


@pytest.mark.parametrize("select_by", ["cider", "beam", "loss"])
def test_the_best_model_is_the_one_selection_asks_for(
    select_by: str, cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = BestEpochTracker(by_loss=select_by == "loss")
    expected: list[bool] = []

    def update(_: BestEpochTracker, newest: ValidatedEpoch) -> bool:
        expected.append(BestEpochTracker.update(tracker, newest))
        return expected[-1]

    watched = type("Watched", (BestEpochTracker,), {"update": update})
    monkeypatch.setattr("train.fit.run.BestEpochTracker", watched)
    reports = train(config(cache, tmp_path / "run", epochs=6, select_by=select_by))
    logs = [report for report in reports if isinstance(report, EpochLog)]
    assert [log.best for log in logs] == expected
    bundle = load_bundle(tmp_path / "run/best.cap")
    best = max(n for n, log in enumerate(logs) if log.best)
    assert bundle.training["epoch"] == best
    _, held_out = split_photos(cache, held_out=0.2, seed=0)
    search = SearchConfig(beam_size=3 if select_by == "beam" else 1)
    scores = ValidationPhotos(cache, rows=held_out).score(bundle.decoder, bundle.vocabulary, search)
    assert scores.cider == pytest.approx(logs[best].cider)
    if select_by == "loss":
        assert logs[best].val_loss == min(log.val_loss for log in logs)


def test_patience_ends_a_run_that_gets_no_better(cache: FeatureCache, tmp_path: Path) -> None:
    # Without learning, only BatchNorm's running statistics change, and those settle soon.
    stuck = config(cache, tmp_path / "run", epochs=60, patience=2, learning_rate=0.0)
    logs = [report for report in train(stuck) if isinstance(report, EpochLog)]
    assert logs[0].best
    assert len(logs) < 60
    best = max(n for n, log in enumerate(logs) if log.best)
    assert len(logs) == best + 3


def test_a_run_says_which_epochs_patience_leaves_out(cache: FeatureCache, tmp_path: Path) -> None:
    stopped = config(cache, tmp_path / "a", epochs=9, patience=1, select_by="loss")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "validation_loss", lambda *_: 1.0)
        reports = list(train(stopped))
    assert isinstance(reports[-2], OutOfPatience)
    assert reports[-2].line() == (
        "no better model within --patience, so epochs 3 to 9 are left out"
    )


def test_self_critical_epochs_follow_when_patience_has_ended_the_others(
    cache: FeatureCache, tmp_path: Path
) -> None:
    def trained(**changes: Any) -> list[int]:
        settings = {"epochs": 9, "patience": 1, "learning_rate": 0.0} | changes
        reports = train(config(cache, tmp_path / "run", **settings))
        return [report.epoch for report in reports if isinstance(report, EpochLog)]

    early = trained()
    assert early[-1] < 8
    more = {"self_critical_epochs": 2, "self_critical_rate": 0.0, "self_critical_photos": 8}
    assert trained(**more, resume=True)[0] == 9
    assert trained(**more, resume=True, patience=None)[:1] in ([], [10])
    assert trained(**more, overwrite=True)[: len(early) + 1] == [*early, 9]


def test_one_photo_is_too_few_and_a_last_batch_of_one_is_not(
    tmp_path: Path, make_cache: MakeCache
) -> None:
    with pytest.raises(TrainError, match="only one photo has captions"):
        next(train(config(make_cache([["a dog"]]), tmp_path / "a")))
    cache = make_cache([["a dog"]] * 18, name="y.h5")
    # One photo is held out: 17 captions make a batch of 16 and one of 1.
    for _ in train(config(cache, tmp_path / "b", val_share=0.05)):
        pass
    assert all(w.isfinite().all() for w in weights(tmp_path / "b/last.cap").values())


def test_four_captions_are_learned_by_heart(tmp_path: Path, make_cache: MakeCache) -> None:
    # Captions of equal length, so that batches mix the photos, as BatchNorm needs.
    sentences = [
        "a dog runs on the grass",
        "two cats sleep under a tree",
        "the bird sings near the hill",
        "grass grass grass and more grass",
    ]
    cache = make_cache([[sentence] * 25 for sentence in sentences])
    val = make_cache([[sentence] for sentence in sentences], name="val.h5")
    recipe = Recipe(embedding_size=8, hidden_size=32, epochs=20, batch_size=20, learning_rate=0.02)
    last = None
    for report in train(config(cache, tmp_path / "run", recipe=recipe, val_cache=val.path)):
        last = report if isinstance(report, EpochLog) else last
    assert last is not None
    assert last.val_loss < 0.02
    bundle = load_bundle(tmp_path / "run")
    features = torch.from_numpy(np.array(cache.features[:, 0]))
    for beam_size in (1, 3):
        found = search(bundle.decoder, features, SearchConfig(beam_size=beam_size))
        assert [bundle.vocabulary.decode(h.words) for h in found] == sentences
