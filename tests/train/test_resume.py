from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.store import FeatureCache
from tests.train.runs import SMALL, config, log_lines, same, weights
from train.config import BEST
from train.fit.record.run_folder import TrainError
from train.fit.reports import StepLog
from train.fit.run import train
from train.model.bundle import load_bundle


@pytest.mark.parametrize(
    ("stop_after", "changes"),
    [
        (2, {"dropout": 0.3}),
        (5, {"dropout": 0.3, "plain": True}),
        (8, {"dropout": 0.3, "num_layers": 2, "precision": "float32"}),
        (16, {"self_critical_epochs": 1, "self_critical_photos": 4, "average_decay": 0.9}),
        (9, dataclasses.asdict(dataclasses.replace(BEST, **SMALL))),
    ],
)
def test_a_resumed_run_reaches_the_same_weights_bit_for_bit(
    cache: FeatureCache, tmp_path: Path, stop_after: int, changes: dict[str, Any]
) -> None:
    changes = {"save_every": 4} | changes
    for _ in train(config(cache, tmp_path / "whole", **changes)):
        pass
    reports = train(config(cache, tmp_path / "run", **changes))
    for count, _ in enumerate(reports):
        if count == stop_after:
            break
    reports.close()
    torch.manual_seed(99)  # the state of torch's generator must not matter
    for _ in train(config(cache, tmp_path / "run", resume=True, **changes)):
        pass
    for name in ("last.cap", "best.cap", "epoch-2-step-4.cap"):
        assert same(weights(tmp_path / "whole" / name), weights(tmp_path / "run" / name)), name
    assert load_bundle(tmp_path / "whole").training == load_bundle(tmp_path / "run").training
    # A mean loss is of the steps since the line before, or since the run goes on.
    without = "loss", "perplexity"
    assert log_lines(tmp_path / "whole", *without) == log_lines(tmp_path / "run", *without)


def test_a_run_interrupted_before_its_first_step_can_be_resumed(
    cache: FeatureCache, tmp_path: Path
) -> None:
    reports = train(config(cache, tmp_path / "run", epochs=1))
    next(reports)  # the report before the first step
    reports.close()
    for resume, out in ((True, "run"), (False, "whole")):
        for _ in train(config(cache, tmp_path / out, epochs=1, resume=resume)):
            pass
    assert same(weights(tmp_path / "whole/last.cap"), weights(tmp_path / "run/last.cap"))


def test_a_killed_run_goes_on_from_its_last_checkpoint(cache: FeatureCache, tmp_path: Path) -> None:
    """As after SIGKILL: the generator does not clean up, and the last log line is incomplete."""
    for _ in train(config(cache, tmp_path / "whole", save_every=4)):
        pass
    reports = train(config(cache, tmp_path / "run", save_every=4))
    for count, _ in enumerate(reports):
        if count == 7:  # past the checkpoint within the first epoch
            break
    kept = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    reports.close()
    for path, data in kept.items():
        path.write_bytes(data)
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"epoch": 1, "st')
    for _ in train(config(cache, tmp_path / "run", resume=True)):
        pass
    assert same(weights(tmp_path / "whole/last.cap"), weights(tmp_path / "run/last.cap"))
    assert log_lines(tmp_path / "run") == log_lines(tmp_path / "whole")


def test_more_epochs_can_be_added(cache: FeatureCache, tmp_path: Path) -> None:
    for _ in train(config(cache, tmp_path / "whole", epochs=4)):
        pass
    for _ in train(config(cache, tmp_path / "run", epochs=2)):
        pass
    for _ in train(config(cache, tmp_path / "run", epochs=4, resume=True)):
        pass
    assert same(weights(tmp_path / "whole/last.cap"), weights(tmp_path / "run/last.cap"))
    for _ in train(config(cache, tmp_path / "falling", epochs=2, decay="cosine")):
        pass
    with pytest.raises(TrainError, match="was trained with epochs 2, asked for 4"):
        next(train(config(cache, tmp_path / "falling", epochs=4, decay="cosine", resume=True)))


def test_self_critical_epochs_can_be_added_to_a_finished_run(
    cache: FeatureCache, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"epochs": 2, "decay": "cosine", "average_decay": 0.9}
    for _ in train(config(cache, tmp_path / "run", **settings)):
        pass
    more = settings | {"self_critical_epochs": 2, "self_critical_photos": 8, "resume": True}
    logs = [report for report in train(config(cache, tmp_path / "run", **more)) if report]
    steps = [report for report in logs if isinstance(report, StepLog)]
    assert {step.epoch for step in steps} == {2, 3}
    assert all("Reward: " in step.line() for step in steps)
    with pytest.raises(TrainError, match="was trained with self_critical_epochs 2, asked for 3"):
        next(train(config(cache, tmp_path / "run", **(more | {"self_critical_epochs": 3}))))


def test_epochs_can_be_added_until_self_critical_ones_have_begun(
    cache: FeatureCache, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"average_decay": 0.9}
    run = tmp_path / "run"
    list(train(config(cache, run, epochs=1, **settings)))
    more = settings | {"resume": True}
    list(train(config(cache, run, epochs=2, **more)))
    more |= {"self_critical_epochs": 1, "self_critical_photos": 8}
    list(train(config(cache, run, epochs=2, **more)))
    with pytest.raises(TrainError, match="was trained with epochs 2, asked for 3"):
        next(train(config(cache, run, epochs=3, **more)))


def test_a_run_is_not_resumed_with_fewer_epochs_than_it_has_begun(
    cache: FeatureCache, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    reports = train(config(cache, run, epochs=4))
    for report in reports:
        if isinstance(report, StepLog) and (report.epoch, report.step) == (2, 2):
            break
    reports.close()
    for epochs, more in (1, 0), (2, 1):
        found = f"{run}: has begun 3 epochs, asked for {epochs}; give --epochs 3 or more"
        asked = config(cache, run, epochs, self_critical_epochs=more, resume=True)
        with pytest.raises(TrainError, match=found):
            next(train(asked))
    list(train(config(cache, run, epochs=3, resume=True)))


def test_a_run_with_a_setting_that_is_gone_goes_on_only_if_it_had_no_effect(
    cache: FeatureCache, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    list(train(config(cache, run, epochs=1)))
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    for share in (0.0, 0.2):
        state["settings"]["scheduled_sampling"] = share
        torch.save(state, run / "checkpoint.pt")
        again = config(cache, run, epochs=2, resume=True)
        if share:
            with pytest.raises(TrainError, match="which no longer exists"):
                next(train(again))
        else:
            list(train(again))
            state = torch.load(run / "checkpoint.pt", weights_only=True)
            assert "scheduled_sampling" not in state["settings"]
