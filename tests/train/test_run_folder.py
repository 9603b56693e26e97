from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from cache.store import FeatureCache
from tests.conftest import MakeCache
from tests.train.runs import config, same, weights
from train.fit.record.run_folder import RunFolder, TrainError
from train.fit.run import train


def test_a_run_is_not_overwritten_nor_mixed_up(
    cache: FeatureCache, tmp_path: Path, make_cache: MakeCache
) -> None:
    run = tmp_path / "run"
    with pytest.raises(TrainError, match="nothing to resume"):
        next(train(config(cache, run, resume=True)))
    for _ in train(config(cache, run, epochs=1)):
        pass
    with pytest.raises(TrainError, match="already holds a run"):
        next(train(config(cache, run)))
    with pytest.raises(TrainError, match="was trained with hidden_size 16, asked for 32"):
        next(train(config(cache, run, resume=True, hidden_size=32)))
    other = make_cache([["a dog"]] * 30, name="other.h5")
    with pytest.raises(TrainError, match="was trained on other captions"):
        next(train(config(other, run, resume=True)))
    (run / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(TrainError, match="cannot read"):
        next(train(config(cache, run, resume=True)))
    for _ in train(config(cache, run, epochs=1, overwrite=True)):
        pass
    assert not list(run.glob(".*"))


def test_overwriting_a_run_keeps_files_of_others(cache: FeatureCache, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    others = ("mine.cap", "epoch-final-step-last.cap", "notes.txt", "val.scores.json")
    for name in others:
        (run / name).write_text("mine")
    first = list(train(config(cache, run, epochs=2, save_every=4)))  # the folder holds no run yet
    assert first
    assert (run / "epoch-1-step-4.cap").exists()
    with pytest.raises(TrainError, match="already holds a run"):
        next(train(config(cache, run)))
    for _ in train(config(cache, run, epochs=1, overwrite=True)):
        pass
    assert not (run / "epoch-1-step-4.cap").exists()
    assert {(run / name).read_text() for name in others} == {"mine"}


def test_two_runs_do_not_share_a_folder(cache: FeatureCache, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = train(config(cache, run))
    for _ in itertools.islice(first, 8):  # past the first checkpoint
        pass
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    asked: list[dict[str, Any]] = [{}, {"resume": True}, {"overwrite": True}]
    for changes in asked:
        with pytest.raises(TrainError) as error:
            next(train(config(cache, run, **changes)))
        assert str(error.value) == (
            f"{run}: another process is training into it; wait until it ends, or name another --out"
        )
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    first.close()
    assert not (run / "run.lock").exists()
    list(train(config(cache, run, resume=True)))
    list(train(config(cache, tmp_path / "whole")))
    assert same(weights(tmp_path / "whole/last.cap"), weights(run / "last.cap"))


def test_inode_numbers_that_change_keep_no_run_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some network drives, where a file's number is another at each look."""
    monkeypatch.setattr(os.path, "samestat", lambda one, other: False)
    with RunFolder(tmp_path / "run") as folder:
        folder.start(overwrite=False)
        with (
            RunFolder(tmp_path / "run") as other,
            pytest.raises(TrainError, match="another process is training into it"),
        ):
            other.start(overwrite=True)
    assert not (tmp_path / "run" / "run.lock").exists()


def test_an_error_or_a_kill_leaves_no_folder_locked(cache: FeatureCache, tmp_path: Path) -> None:
    run = tmp_path / "run"
    list(train(config(cache, run, epochs=1)))
    with pytest.raises(TrainError, match="hidden_size"):
        next(train(config(cache, run, resume=True, hidden_size=32)))
    (run / "run.lock").touch()  # as a kill leaves it
    list(train(config(cache, run, epochs=2, resume=True)))
    assert not (run / "run.lock").exists()


def test_a_model_without_a_checkpoint_is_not_to_be_resumed(
    cache: FeatureCache, tmp_path: Path
) -> None:
    list(train(config(cache, tmp_path / "run", epochs=1)))
    (tmp_path / "run/checkpoint.pt").unlink()
    with pytest.raises(TrainError, match="already holds a model; replace it with --overwrite, or"):
        next(train(config(cache, tmp_path / "run")))
