from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cache.store import FeatureCache
from tests.conftest import MakeCache
from tests.train.runs import config, same, weights
from train.fit.best_epoch import BestEpochTracker, ValidatedEpoch
from train.fit.reports import EpochLog
from train.fit.run import train
from train.model.bundle import load_bundle


@pytest.mark.parametrize("spoiled", ["checkpoint.pt", "best.cap"])
@pytest.mark.parametrize("by", ["select_by", "photos"])
def test_the_best_model_stays_unless_the_present_one_is_better(
    spoiled: str, by: str, cache: FeatureCache, tmp_path: Path, make_cache: MakeCache
) -> None:
    run = tmp_path / "run"
    settings: dict[str, Any] = {"epochs": 4, "select_by": "cider" if by == "select_by" else "loss"}
    list(train(config(cache, run, **settings)))
    if spoiled == "checkpoint.pt":
        state = torch.load(run / spoiled, weights_only=True)
        state["trainer"]["parameters"]["head.weight"].mul_(-9)
        torch.save(state, run / spoiled)
        expected = weights(run / "best.cap")
    else:
        best = load_bundle(run / spoiled)
        with torch.no_grad():
            best.decoder.head.weight.mul_(-9)
        best.save(run / spoiled)
        expected = weights(run / "last.cap")
    changes: dict[str, Any] = {"select_by": "loss"}
    if by == "photos":
        changes["val_cache"] = make_cache([["a cat"], ["the dog runs"]], name="val.h5").path
    logs = list(train(config(cache, run, **(settings | changes), resume=True)))
    assert not any(isinstance(log, EpochLog) for log in logs)  # nothing was trained
    assert same(weights(run / "best.cap"), expected)
    facts = load_bundle(run / "best.cap").training
    assert facts["config"]["select_by"] == "loss"
    assert facts["scores"]["count"] == (2 if by == "photos" else 6)
    # A further resumption compares with these scores.
    choice = torch.load(run / "checkpoint.pt", weights_only=True)["choice"]
    assert choice["best"]["val_loss"] == facts["val_loss"]


def test_with_another_select_by_the_model_so_far_is_validated_again(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    settings: dict[str, Any] = {"epochs": 2}
    list(train(config(cache, run, **settings)))
    standing = load_bundle(run / "best.cap").training["epoch"]
    seen: list[ValidatedEpoch] = []

    def update(tracker: BestEpochTracker, newest: ValidatedEpoch) -> bool:
        seen.append(newest)
        return BestEpochTracker.update(tracker, newest)

    watched = type("Watched", (BestEpochTracker,), {"update": update})
    monkeypatch.setattr("train.fit.run.BestEpochTracker", watched)
    # Without learning, the next epoch gets the same scores as the model so far.
    more = settings | {"self_critical_epochs": 1, "self_critical_rate": 0.0, "resume": True}
    list(train(config(cache, run, select_by="beam", **more)))
    best = load_bundle(run / "best.cap").training
    # The best model so far, the present one, and the one after the next epoch.
    assert [epoch.epoch for epoch in seen] == [standing, 1, 2]
    assert seen[1].ciders.tolist() == seen[2].ciders.tolist()
    assert best["config"]["select_by"] == "beam"
    assert best["scores"]["cider"] == pytest.approx(seen[best["epoch"] - standing].ciders.mean())


def test_with_other_validation_photos_the_model_so_far_is_validated_again(
    cache: FeatureCache, tmp_path: Path, make_cache: MakeCache
) -> None:
    run = tmp_path / "run"
    list(train(config(cache, run, epochs=1)))
    other = make_cache([["a cat sleeps on a hill"]] * 3, name="other.h5")
    logs = list(train(config(cache, run, epochs=2, val_cache=other.path, resume=True)))
    (log,) = (report for report in logs if isinstance(report, EpochLog))
    best = load_bundle(run / "best.cap").training
    assert best["scores"]["count"] == 3
    assert best["epoch"] == (1 if log.best else 0)


def test_a_run_interrupted_before_it_judges_anew_judges_later(
    cache: FeatureCache, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    list(train(config(cache, run, epochs=1)))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    reports = train(config(cache, run, epochs=2, select_by="loss", resume=True))
    next(reports)
    reports.close()
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
