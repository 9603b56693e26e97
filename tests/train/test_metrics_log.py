"""A run's log is read whatever a kill, an earlier version or another program made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train.fit.record.metrics import drop_after, read_curves, read_records

FOREIGN = [
    b"",
    b"\xff\xfe\x00",
    b'[1, 2]\n3\nnull\n"text"',
    b'{"epoch": "0", "step": 1, "loss": 2.0}',
    b'{"epoch": true, "val_loss": 2.0}',
    b'{"epoch": 0, "step": 1, "loss": NaN}',
    b'{"epoch": 0, "val_loss": null}',
    b'{"step": 1, "loss": 2.0}',
    b"[" * 100_000,
    b'{"epoch": 0, "step": 1, "lo',
]


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("foreign", FOREIGN, ids=range(len(FOREIGN)))
def test_lines_of_other_programs_and_kills_are_left_out(foreign: bytes, tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    ours = b'{"epoch": 0, "step": 2, "loss": 5.0}\n'
    log.write_bytes(ours + foreign)
    assert read_records(log) == [{"epoch": 0, "step": 2, "loss": 5.0}]
    assert [point.loss for point in read_curves(log).steps] == [5.0]
    drop_after(log, 0, 2)
    assert log.read_bytes() == ours


def test_a_log_that_is_missing_has_no_curves(tmp_path: Path) -> None:
    curves = read_curves(tmp_path / "metrics.jsonl")
    assert (curves.steps, curves.epochs) == ([], [])
    drop_after(tmp_path / "metrics.jsonl", 0, 0)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_what_is_trained_again_leaves_the_log(tmp_path: Path) -> None:
    steps = [{"epoch": e, "step": s, "loss": 1.0} for e in range(3) for s in (2, 4)]
    epochs = [{"epoch": e, "val_loss": 1.0} for e in range(3)]
    log = write(tmp_path / "metrics.jsonl", *steps, *epochs)
    drop_after(log, 1, 2)
    kept = [(record["epoch"], record.get("step")) for record in read_records(log)]
    assert kept == [(0, 2), (0, 4), (1, 2), (0, None)]


def test_points_are_where_they_were_in_training(tmp_path: Path) -> None:
    log = write(
        tmp_path / "metrics.jsonl",
        {"epoch": 0, "step": 1, "loss": 4.0, "objective": "smoothed", "steps": 4},
        {"epoch": 0, "step": 4, "loss": 3.0, "objective": "cross-entropy", "steps": 4},
        {"epoch": 0, "val_loss": 2.0, "cider": 0.5, "bleu_4": 0.1, "best": True},
        {"epoch": 1, "step": 1, "loss": -0.5, "objective": "reward", "steps": 2},
    )
    curves = read_curves(log)
    assert [point.at for point in curves.steps] == [0.25, 1.0, 1.5]
    assert [point.smoothed for point in curves.steps] == [True, False, False]
    assert [point.rewarded for point in curves.steps] == [False, False, True]
    assert [(e.at, e.val_loss, e.cider, e.best) for e in curves.epochs] == [(1, 2.0, 0.5, True)]


def test_logs_of_earlier_versions_say_less_and_have_their_curves_all_the_same(
    tmp_path: Path,
) -> None:
    log = write(
        tmp_path / "metrics.jsonl",
        {"epoch": 0, "step": 2, "loss": 4.0},
        {"epoch": 0, "step": 4, "loss": 3.0},
        {"epoch": 0, "val_loss": 2.0},
        {"epoch": 1, "step": 2, "loss": -0.5},  # unfinished: as long as the epoch before
    )
    curves = read_curves(log)
    assert [point.at for point in curves.steps] == [0.5, 1.0, 1.5]
    assert [point.rewarded for point in curves.steps] == [False, False, True]
    assert {point.learning_rate for point in curves.steps} == {None}
    assert curves.epochs[0].cider is None
