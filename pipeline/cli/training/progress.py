"""How training is shown: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from pipeline.cli.terminal import ProgressLine, duration, say
from train.fit.reports import (
    Advice,
    EpochLog,
    OutOfPatience,
    Saved,
    Started,
    StartScores,
    StepLog,
    TrainReport,
    per_second,
)

# Without a live line: the first few lines of steps, then one after so long. A GPU would fill a
# screen every second.
_FIRST_LINES, _LINE_INTERVAL_S = 3, 5.0
_LIVE_INTERVAL_S = 0.1


class TrainingProgress:
    """Shows the reports of a run. A context manager removes the live line in the end."""

    def __init__(self, *, every_step_log: bool) -> None:
        """every_step_log: write a line for each report of steps; the user chose how many."""
        self._every = every_step_log
        self._line = ProgressLine("epoch  1/1", "steps", vanishes=True)
        self._lines = 0  # of steps
        self._shown_at = -_LINE_INTERVAL_S

    def say(self, text: str) -> None:
        """Write a notice, above the live line if there is one."""
        self._line.say(text)

    def show(self, report: TrainReport) -> None:
        match report:
            case Started():
                for text in report.summary().splitlines():
                    self._line.say(text)
            case StepLog():
                self._show_steps(report)
            case EpochLog() | OutOfPatience() | StartScores() | Advice():
                self._line.say(report.line())
            case Saved():
                self._line.say(f"saved {report.path}")

    def _show_steps(self, log: StepLog) -> None:
        now = time.monotonic()
        if self._line.has_bar:
            if self._every:
                self._line.say(log.line())
            last = log.step == log.steps
            if last or now - self._shown_at >= _LIVE_INTERVAL_S:
                self._shown_at = now
                label = f"epoch {log.epoch + 1:>{len(str(log.epochs))}}/{log.epochs}"
                self._line.move_bar(log.step, log.steps, _live(log), label)
        elif self._every or self._lines < _FIRST_LINES or self._is_due(now):
            self._shown_at = now
            self._lines += 1
            say(log.line())

    def _is_due(self, now: float) -> bool:
        return now - self._shown_at >= _LINE_INTERVAL_S

    def __enter__(self) -> Self:
        self._line.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._line.__exit__(kind, error, trace)


def _live(log: StepLog) -> str:
    """What the live line says of these steps: what matters most comes first, since a narrow
    terminal cuts the end off.
    """
    measure = f"reward {-log.loss:.3f}" if log.rewarded else f"loss {log.loss:.3f}"
    parts = [f"{log.step:,}/{log.steps:,} steps", measure, f"{per_second(log.steps_per_s)}/s"]
    if log.step == log.steps:
        parts.append("validating")
    elif log.seconds_left is not None:
        parts.append(f"at most {duration(log.seconds_left)} left")
    parts.append(f"{log.captions_per_s:,.0f} captions/s")
    return ", ".join(parts)
