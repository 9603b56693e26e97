"""What a person sees while waiting: progress, notices and summaries, all on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

_PLAIN_INTERVAL_S = 5.0


def say(text: str) -> None:
    sys.stderr.write(text + "\n")  # in one: a Ctrl-C in between would join two lines
    sys.stderr.flush()


def duration(seconds: float) -> str:
    """`7 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class ProgressLine:
    """Progress with rate and time left: one moving line on a terminal, else a line now and then.

    The rate is that of this run alone, so a resumed job is not flattered by what was there.
    """

    def __init__(self, label: str, unit: str) -> None:
        self._label, self._unit = label, unit
        self._live = sys.stderr.isatty()
        self._last = 0.0
        self._width = 0

    def update(self, done: int, total: int, per_s: float, note: str = "") -> None:
        now = time.monotonic()
        if done < total and now - self._last < (0.1 if self._live else _PLAIN_INTERVAL_S):
            return
        self._last = now
        left = f", {duration((total - done) / per_s)} left" if per_s > 0 and done < total else ""
        rate = f", {per_s:,.1f} {self._unit}/s" if per_s > 0 else ""
        text = f"{self._label}: {done:,}/{total:,} {self._unit}{rate}{left}{note}"
        if self._live:
            print("\r" + text.ljust(self._width), end="", file=sys.stderr, flush=True)
            self._width = len(text)
        else:
            say(text)

    def clear(self) -> None:
        """Start a fresh line, so that what is said next does not overwrite the moving one."""
        if self._live and self._width:
            print(file=sys.stderr, flush=True)
            self._width = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.clear()
