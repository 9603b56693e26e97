from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.store import FeatureCache
from tests.conftest import MakeCache
from tests.train.runs import config, same, weights
from train.fit.record.run_folder import TrainError
from train.fit.reports import Advice, EpochLog, Saved, Started
from train.fit.run import train
from train.model.bundle import load_bundle


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, make_cache: MakeCache) -> None:
    cache = make_cache([["a dog"]] * 9)
    with pytest.raises(TrainError, match=r"the loss is nan at epoch \d, step 1; .*learning-rate"):
        for _ in train(config(cache, tmp_path / "run", learning_rate=1e30)):
            pass


def test_a_run_that_diverges_at_once_can_be_repeated(cache: FeatureCache, tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = (
        rf"{run}: the (loss is|weights are) .* at epoch 1, step \d; lower --learning-rate and run "
        r"the command again \(nothing was saved\)"
    )
    with pytest.raises(TrainError, match=found):
        list(train(config(cache, run, learning_rate=1e30)))
    list(train(config(cache, run, epochs=1)))


def test_self_critical_epochs_that_diverge_can_be_tried_at_a_lower_rate(
    cache: FeatureCache, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings: dict[str, Any] = {"epochs": 1, "self_critical_epochs": 1, "self_critical_photos": 8}

    def diverge(*_: object) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(1.0), torch.tensor(math.nan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.fit.self_critical.SelfCritical.gradients", diverge)
        with pytest.raises(TrainError) as error:
            list(train(config(cache, run, **settings)))
    assert str(error.value) == (
        f"{run}: the loss is nan at epoch 2, step 2; "
        "go on with --resume and a lower --self-critical-rate"
    )
    list(train(config(cache, run, **settings, self_critical_rate=1e-6, resume=True)))


def test_self_critical_epochs_that_go_astray_are_an_error(
    cache: FeatureCache, tmp_path: Path
) -> None:
    """Their loss stays finite, but the model has unlearned everything."""
    run = tmp_path / "run"
    settings: dict[str, Any] = {"epochs": 1, "self_critical_epochs": 1, "self_critical_photos": 8}
    with pytest.raises(TrainError) as error:
        list(train(config(cache, run, **settings, self_critical_rate=1e4)))
    assert re.fullmatch(
        rf"{run}: the validation loss is [\de.+]+ at epoch 2, step 3; "
        "go on with --resume and a lower --self-critical-rate",
        str(error.value),
    )
    assert load_bundle(run / "best.cap").training["epoch"] == 0
    list(train(config(cache, run, **settings, self_critical_rate=1e-6, resume=True)))


@pytest.mark.parametrize("interrupted", [True, False])
def test_weights_that_are_not_finite_replace_no_checkpoint(
    interrupted: bool, cache: FeatureCache, tmp_path: Path
) -> None:
    """Also if the run is interrupted before the loss is logged."""
    run = tmp_path / "run"
    list(train(config(cache, run, epochs=1)))
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["settings"]["learning_rate"] = 1e30
    torch.save(state, run / "checkpoint.pt")
    before = {path.name: path.read_bytes() for path in run.glob("*.[cp]*")}
    reports = train(config(cache, run, 2, learning_rate=1e30, log_every=99, resume=True))
    found = (
        rf"{run}: the (loss is|weights are) .* at epoch 2, step \d; begin with a lower "
        r"--learning-rate and another --out \(the checkpoint of epoch 2, step 0 is kept\)"
    )
    if interrupted:
        assert list(itertools.islice(reports, 5))[1:] == [None] * 4
        with pytest.raises(TrainError, match=found):
            reports.close()
    else:
        with pytest.raises(TrainError, match=found):
            list(reports)
    assert {path.name: path.read_bytes() for path in run.glob("*.[cp]*")} == before


def test_out_of_memory_names_a_smaller_batch(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_small(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate …")

    monkeypatch.setattr("train.step.cpu.objective.CpuObjective.loss_and_gradients", too_small)
    with pytest.raises(TrainError, match="batches of 16 captions; try --batch-size 8"):
        for _ in train(config(cache, tmp_path / "run")):
            pass


def test_a_decoder_too_large_for_the_memory_is_one_line(
    cache: FeatureCache, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match="out of memory for a decoder of hidden size 30000000, "):
        next(train(config(cache, tmp_path / "run", hidden_size=30_000_000)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("failing", ["loss", "search"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_validation_without_memory_is_one_line_and_loses_no_epoch(
    failing: str, error: Exception, cache: FeatureCache, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def too_small(*_: object, **__: object) -> None:
        raise error

    names = {
        "loss": "train.step.cpu.objective.CpuObjective.loss",
        "search": "train.fit.validation.search",
    }
    settings: dict[str, Any] = {"average_decay": 0.9, "select_by": "beam"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(names[failing], too_small)
        with pytest.raises(TrainError) as caught:
            list(train(config(cache, run, epochs=1, **settings)))
    assert str(caught.value) == (
        "cpu: out of memory while validating; go on with --resume --select-by cider"
    )
    settings["select_by"] = "cider"
    reports = list(train(config(cache, run, epochs=1, resume=True, **settings)))
    assert [type(report) for report in reports] == [Started, EpochLog, Advice]  # no step again
    list(train(config(cache, tmp_path / "whole", epochs=1, **settings)))
    assert same(weights(run / "last.cap"), weights(tmp_path / "whole/last.cap"))


@pytest.mark.parametrize(
    ("rewarded", "found"),
    [
        (
            False,
            "cpu: out of memory with batches of 16 captions; go on with --resume when more memory "
            "is free, or begin anew with --overwrite and --batch-size 8",
        ),
        (
            True,
            "cpu: out of memory with 8 photos per self-critical step; go on with --resume when "
            "more memory is free",
        ),
    ],
)
def test_advice_against_too_little_memory_is_not_refused(
    rewarded: bool, found: str, cache: FeatureCache, tmp_path: Path
) -> None:
    """A run goes on only with the same batches, and self-critical epochs with the same photos."""
    run = tmp_path / "run"
    settings: dict[str, Any] = {"epochs": 1, "save_every": 1}
    if rewarded:
        settings |= {"self_critical_epochs": 1, "self_critical_photos": 8}

    def too_small(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    reports = train(config(cache, run, **settings))
    first = f"epoch-{int(rewarded)}-step-1.cap"
    next(report for report in reports if isinstance(report, Saved) and report.path.name == first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.step.cpu.objective.CpuObjective.loss_and_gradients", too_small)
        with pytest.raises(TrainError) as caught:
            list(reports)
    assert str(caught.value) == found
    list(train(config(cache, run, **settings, resume=True)))


def test_self_critical_steps_without_memory_take_fewer_photos(
    cache: FeatureCache, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings: dict[str, Any] = {"epochs": 1, "self_critical_epochs": 1, "self_critical_photos": 8}

    def too_small(*_: object) -> None:
        raise MemoryError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.fit.self_critical.SelfCritical.gradients", too_small)
        with pytest.raises(TrainError) as caught:
            list(train(config(cache, run, **settings)))
    assert str(caught.value) == (
        "cpu: out of memory with 8 photos per self-critical step; "
        "go on with --resume and --self-critical-photos 4"
    )
    list(train(config(cache, run, **(settings | {"self_critical_photos": 4}), resume=True)))
