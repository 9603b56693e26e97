"""What a run says about a disk without room."""

from __future__ import annotations

import collections
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.atomic import WriteError
from cache.store import FeatureCache
from tests.train.runs import config, same, weights
from train.fit.record.metrics import MetricsLog
from train.fit.record.run_folder import TrainError
from train.fit.reports import EpochLog
from train.fit.run import train
from train.model.bundle import Bundle, find_bundle

Usage = collections.namedtuple("Usage", "total used free")


def test_a_run_that_does_not_fit_on_its_disk_does_not_begin(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 3_000_000))
    # The LSTM has 4 × 1000 × 1008 weights, 16 MB. Two models, and a checkpoint of three times that
    # size, which is there twice while it is replaced.
    with pytest.raises(TrainError) as error:
        next(train(config(cache, run, hidden_size=1000)))
    assert str(error.value) == (
        f"{run}: needs 0.13 GB of disk, 0.00 GB are free; free some, or name another --out"
    )
    assert not run.exists()
    list(train(config(cache, run, epochs=1)))


def test_files_that_are_replaced_count_as_free_space(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    list(train(config(cache, run, epochs=1)))
    kept = {path.name: path.read_bytes() for path in run.iterdir()}
    checkpoint = (run / "checkpoint.pt").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, checkpoint // 10))
    asked: list[dict[str, Any]] = [{"overwrite": True}, {"resume": True, "epochs": 2}]
    for changes in asked:
        with pytest.raises(TrainError, match=r"run: needs 0\.00 GB of disk"):
            next(train(config(cache, run, **changes)))
        assert {path.name: path.read_bytes() for path in run.iterdir()} == kept
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, checkpoint))
    list(train(config(cache, run, epochs=2, resume=True)))


def full_disk(*_: object) -> None:
    raise WriteError("x: cannot write (No space left on device)")


@pytest.mark.parametrize(
    ("written", "then"),
    [
        ((), "run the command again"),
        (("best.cap",), "run the command again with --overwrite"),
        (("best.cap", "checkpoint.pt"), "go on with --resume"),
    ],
)
def test_a_disk_that_fills_up_leads_to_a_command_that_works(
    written: tuple[str, ...], then: str, cache: FeatureCache, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.fit.run.SAVE_PAUSE_S", 0.0)
        reports = train(config(cache, run))
        if "checkpoint.pt" in written:
            for report in reports:
                if isinstance(report, EpochLog):
                    break
        save = Bundle.save

        def save_or_fail(model: Bundle, path: Path) -> None:
            if path.name not in written or "checkpoint.pt" in written:
                full_disk()
            save(model, path)

        patch.setattr(Bundle, "save", save_or_fail)
        patch.setattr("train.fit.record.run_folder._link", lambda *_: False)
        with pytest.raises(WriteError) as error:
            list(reports)
    assert str(error.value) == (
        f"x: cannot write (No space left on device); free space or mend the disk, then {then}"
    )
    again: dict[str, Any] = {"resume": "--resume" in then, "overwrite": "--overwrite" in then}
    list(train(config(cache, run, **again)))
    list(train(config(cache, tmp_path / "whole")))
    assert same(weights(run / "last.cap"), weights(tmp_path / "whole/last.cap"))


def test_a_log_that_cannot_be_written_is_one_line(cache: FeatureCache, tmp_path: Path) -> None:
    """Closing it would try to write the rest once more."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full")
    with (
        pytest.raises(WriteError, match=r"/dev/full: cannot write \(No space left on device\)"),
        MetricsLog(full) as log,
    ):
        log.write({"epoch": 0})


def test_a_finished_run_needs_no_checkpoint_but_to_train_more(
    cache: FeatureCache, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    list(train(config(cache, run, epochs=1)))
    (run / "checkpoint.pt").unlink()
    assert find_bundle(run) == run / "best.cap"
    assert all(bool(torch.isfinite(value).all()) for value in weights(run).values())
    with pytest.raises(TrainError) as error:
        next(train(config(cache, run, epochs=2, resume=True)))
    assert str(error.value) == (
        f"{run}: nothing to resume (no checkpoint.pt); give --overwrite to begin anew"
    )
    list(train(config(cache, run, epochs=2, overwrite=True)))
