"""Lists run folders side by side: the settings and the scores of each."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache.errors import CapError
from train.model.bundle import BundleError, find_bundle, read_training


class RunsError(CapError):
    """Raised when a folder is missing or holds no runs. The message is one line."""


@dataclass(frozen=True)
class RunSummary:
    """A run folder with the scores of its best.cap, which are None before the first epoch ends.

    Without a best.cap they are those of last.cap. If neither has scores, they are those in the log
    of the epoch whose model was best.cap, or, in a log that does not name it, of the epoch with the
    highest CIDEr.

    Scores are those of greedy captions of the validation photos, or of beam search's captions if
    `select_by` is beam.
    """

    path: Path
    epochs: int  # finished
    best_epoch: int | None  # from 0
    cider: float | None
    bleu_4: float | None
    val_loss: float | None
    settings: dict[str, Any]  # of its training
    problem: str = ""  # why the settings could not be read

    def as_dict(self) -> dict[str, Any]:
        """The fields for JSON, with epochs counted from 1."""
        best = None if self.best_epoch is None else self.best_epoch + 1
        return {**asdict(self), "path": str(self.path), "best_epoch": best}


def find_runs(folder: Path) -> list[RunSummary]:
    """All runs in or below a folder: the best validation CIDEr first, runs without a score last.

    Raises RunsError if there are none.
    """
    if not folder.is_dir():
        raise RunsError(f"{folder}: no such folder")
    files = [*folder.rglob("metrics.jsonl"), *folder.rglob("best.cap"), *folder.rglob("last.cap")]
    runs = [_read(path) for path in sorted({file.parent for file in files})]
    if not runs:
        raise RunsError(f"{folder}: no runs below it; `cap train` makes one")
    return sorted(runs, key=_sort_key, reverse=True)


def _sort_key(run: RunSummary) -> tuple[float, float]:
    """Larger is better. CIDEr comes first: label smoothing and vocabulary affect the loss."""
    worst = float("-inf")
    return (
        worst if run.cider is None else run.cider,
        worst if run.val_loss is None else -run.val_loss,
    )


def _read(path: Path) -> RunSummary:
    epochs = _epoch_records(path / "metrics.jsonl")
    settings, scores, problem = _read_model(path)
    best = scores if scores.get("cider") is not None else _best_record(epochs)
    return RunSummary(
        path=path,
        epochs=len({record["epoch"] for record in epochs}),
        best_epoch=best.get("epoch"),
        cider=best.get("cider"),
        bleu_4=best.get("bleu_4"),
        val_loss=best.get("val_loss"),
        settings=settings,
        problem=problem,
    )


def _best_record(epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of the epoch that made the best model; empty if there are no epochs."""
    chosen = [record for record in epochs if record.get("best")]
    if chosen:
        return chosen[-1]
    return max(epochs, key=lambda e: (e.get("cider", float("-inf")), -e["val_loss"]), default={})


def _epoch_records(path: Path) -> list[dict[str, Any]]:
    """The lines about whole epochs. A line that a kill cut off is skipped."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "val_loss" in record and "epoch" in record:
            records.append(record)
    return records


def _read_model(path: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """(settings, scores, problem) from the run's model file."""
    try:
        training = read_training(find_bundle(path))
    except BundleError as error:
        return {}, {}, str(error)
    scores = training.get("scores") or {}
    facts = {"epoch": training.get("epoch"), "val_loss": training.get("val_loss"), **scores}
    return dict(training.get("config", {})), facts, ""


def runs_table(runs: Iterable[RunSummary]) -> str:
    """One line per run: scores, epochs done, then the settings that are not the same in all runs.

    Runs whose settings are unknown do not count as different.
    """
    runs = list(runs)
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    known = [run.settings for run in runs if run.settings]
    differing = [name for name in names if len({str(one.get(name, "")) for one in known}) > 1]
    by_beam = bool(known) and all(one.get("select_by") == "beam" for one in known)
    scores = ["CIDEr, beam" if by_beam else "CIDEr", "BLEU-4", "val loss"]
    header = ["run", *scores, "done", *differing]  # not "epochs", which is the name of a setting
    rows = [
        [
            str(run.path),
            _format_score(run.cider, 100, ".2f"),
            _format_score(run.bleu_4, 100, ".2f"),
            _format_score(run.val_loss, 1, ".4f"),
            str(run.epochs),
            *(_format_setting(run.settings.get(name)) for name in differing),
        ]
        for run in runs
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _format_score(value: float | None, scale: float, form: str) -> str:
    return "-" if value is None else format(scale * value, form)


def _format_setting(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
