"""A run's log, `metrics.jsonl`: one JSON object a line, written as training goes on, and read back.

Two kinds of lines, described in docs/model-format.md: of steps (`StepLog`), and of epochs
(`EpochLog`). Logs of earlier versions have fewer members, which are None here.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cache.atomic import WriteError, write_text

if TYPE_CHECKING:  # the process that draws curves needs nothing of it
    from train.fit.reports import EpochLog, StepLog


@dataclass(frozen=True)
class StepPoint:
    """The mean over the steps since the line before, of which `step` is the last.

    at: epochs since the start of training, the part of the present one included.
    """

    at: float
    loss: float  # minus the mean reward if `rewarded`
    rewarded: bool
    smoothed: bool  # the loss is against smoothed targets
    perplexity: float | None
    learning_rate: float | None


@dataclass(frozen=True)
class EpochPoint:
    """The validation scores after an epoch, as fractions. at: epochs since the start."""

    at: float
    val_loss: float
    cider: float | None
    bleu_4: float | None
    best: bool


@dataclass(frozen=True)
class Curves:
    """What a log holds, in the order of training."""

    steps: list[StepPoint]
    epochs: list[EpochPoint]


class MetricsLog:
    """Appends JSON lines to a file, each of them flushed at once. A context manager closes it."""

    def __init__(self, path: Path) -> None:
        """Raises WriteError."""
        self._path = path
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._failure(error) from None

    def write(self, record: dict[str, Any]) -> None:
        """Raises WriteError."""
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After a failure some text is left, which closing tries to write once more.
        with contextlib.suppress(OSError):
            self._file.close()

    def _failure(self, error: OSError) -> WriteError:
        return WriteError(f"{self._path}: cannot write ({error.strerror})")


def step_record(log: StepLog) -> dict[str, Any]:
    """The line of some steps."""
    return {
        "epoch": log.epoch,
        "step": log.step,
        "loss": log.loss,
        "objective": log.objective,
        "perplexity": log.perplexity,
        "learning_rate": log.learning_rate,
        "steps": log.steps,
        "steps_per_s": round(log.steps_per_s, 3),
        "captions_per_s": round(log.captions_per_s, 1),
    }


def epoch_record(log: EpochLog) -> dict[str, Any]:
    """The line of an epoch."""
    return {
        "epoch": log.epoch,
        "val_loss": log.val_loss,
        "perplexity": log.perplexity,
        "bleu_4": log.bleu_4,
        "cider": log.cider,
        "distinct": round(log.distinct * log.photos),
        "best": log.best,
        "seconds": round(log.seconds, 3),
    }


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that are records of steps or epochs; none if there is no such file.

    A line that a kill cut off, or that another program wrote, is left out.
    """
    try:
        lines = _lines(path)
    except OSError:
        return []
    return [record for line in lines if (record := _record(line)) is not None]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def epoch_records(path: Path) -> list[dict[str, Any]]:
    """The lines about whole epochs."""
    return [record for record in read_records(path) if "val_loss" in record]


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not _is_number(record.get("epoch")):
        return None
    if "val_loss" in record:
        return record if _is_number(record["val_loss"]) else None
    return record if _is_number(record.get("loss")) and _is_number(record.get("step")) else None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def drop_after(path: Path, epoch: int, step: int) -> None:
    """Remove the lines of steps beyond this position, which will be trained again.

    What a kill cut off goes with them. Raises WriteError.
    """
    if not path.exists():
        return
    kept = [
        line + "\n"
        for line in _lines(path)
        if (record := _record(line)) is not None
        and (record["epoch"], record.get("step", math.inf)) <= (epoch, step)
    ]
    write_text(path, "".join(kept))


def read_curves(path: Path) -> Curves:
    """The points of a log. What it does not hold is left out, or None."""
    records = read_records(path)
    steps_of = _steps_of_epochs(records)
    steps, epochs = [], []
    for record in records:
        epoch = record["epoch"]
        if "val_loss" in record:
            epochs.append(
                EpochPoint(
                    at=epoch + 1,
                    val_loss=record["val_loss"],
                    cider=_number(record, "cider"),
                    bleu_4=_number(record, "bleu_4"),
                    best=record.get("best") is True,
                )
            )
            continue
        objective = record.get("objective")
        steps.append(
            StepPoint(
                at=epoch + record["step"] / max(1, steps_of[epoch]),
                loss=record["loss"],
                # Earlier versions did not say so. No cross-entropy is below 0.
                rewarded=objective == "reward" if objective else record["loss"] < 0,
                smoothed=objective == "smoothed",
                perplexity=_number(record, "perplexity"),
                learning_rate=_number(record, "learning_rate"),
            )
        )
    return Curves(steps, epochs)


def _steps_of_epochs(records: list[dict[str, Any]]) -> dict[float, float]:
    """The number of steps of each epoch that has lines of steps.

    Where the lines do not say it: the last step of the epoch, or of the one before if that is
    more, since an unfinished epoch has not logged its last step.
    """
    found: dict[float, float] = {}
    said: dict[float, float] = {}
    for record in records:
        if "val_loss" not in record:
            epoch = record["epoch"]
            found[epoch] = max(found.get(epoch, 0), record["step"])
            if _is_number(record.get("steps")):
                said[epoch] = max(record["steps"], record["step"])
    finished = {record["epoch"] for record in records if "val_loss" in record}
    for epoch in found:
        if epoch not in said:
            before = 0 if epoch in finished else found.get(epoch - 1, 0)
            said[epoch] = max(found[epoch], before)
    return said


def _number(record: dict[str, Any], name: str) -> float | None:
    value = record.get(name)
    return value if _is_number(value) else None
