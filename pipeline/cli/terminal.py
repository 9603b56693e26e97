"""What the commands write: results on stdout; progress, notices and errors on stderr."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterable
from enum import IntEnum
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress

_BAR_INTERVAL_S, _LINE_INTERVAL_S = 0.1, 5.0
_BAR_WIDTH = 40

# What would break a line or steer a terminal: control characters, Unicode's own line breaks.
_CONTROLS = r"\x00-\x1f\x7f-\x9f\u2028\u2029"
_CONTROL = re.compile(f"[{_CONTROLS}]")
_CONTROL_OR_BACKSLASH = re.compile(rf"[{_CONTROLS}\\]")


def print_json(value: object, indent: int | None = 1) -> None:
    """Write JSON to stdout: on one line if `indent` is None."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    # A name that is not UTF-8 contains halves of surrogate pairs. Raw bytes would make a file that
    # no program reads as JSON; `\udcff` is JSON, and Python's `os.fsencode` makes the bytes of it.
    print(text.encode("utf-8", "backslashreplace").decode("utf-8"), flush=True)


class Verbosity(IntEnum):
    """What is written to stderr: errors, notices and progress, also what asks for nothing."""

    QUIET = 0
    USUAL = 1
    VERBOSE = 2


_verbosity = Verbosity.USUAL  # of this process, which has one stderr


def set_verbosity(verbosity: Verbosity) -> None:
    """From now on write this much to stderr."""
    global _verbosity
    _verbosity = verbosity


def say(text: str) -> None:
    """Write a notice, one line, to stderr, unless that is to be quiet."""
    if _verbosity >= Verbosity.USUAL:
        complain(text)


def say_all(notices: Iterable[str]) -> None:
    """`say` each of them."""
    for notice in notices:
        say(notice)


def mention(text: str) -> None:
    """Write a line that asks for nothing to stderr, if that is to be verbose."""
    if _verbosity >= Verbosity.VERBOSE:
        complain(text)


def complain(text: str) -> None:
    """Write an error, one line, to stderr.

    Nothing happens if that fails, as when the terminal is closed or a log's disk is full: the work
    goes on.
    """
    with contextlib.suppress(OSError):
        sys.stderr.write(text + "\n")  # in one call: a Ctrl-C between two would join two lines
        sys.stderr.flush()


def one_line(text: str) -> str:
    r"""The text without line breaks and other control characters, which become `\n`, `\x1b`, …"""
    return _CONTROL.sub(_escape, text)


def one_field(text: str) -> str:
    r"""Like `one_line`, for a field of a line whose fields are separated by tabs.

    A backslash becomes two, so that no two texts become the same.
    """
    return _CONTROL_OR_BACKSLASH.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


def duration(seconds: float) -> str:
    """`7 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class ProgressLine:
    """Progress with rate and time left: a bar on a terminal, elsewhere a line every 5 seconds.

    The rate is the caller's. It should be that of this run alone, so that a resumed job is not
    flattered by what an earlier run did. after_s: nothing is shown before, and nothing at all of
    work that is done by then.
    """

    def __init__(
        self, label: str, unit: str, after_s: float = 0.0, *, vanishes: bool = False
    ) -> None:
        """vanishes: the bar is gone in the end."""
        self._label, self._unit = label, unit
        self._start, self._after_s = time.monotonic(), after_s
        self._done = False  # the last line is written
        shown = _verbosity >= Verbosity.USUAL and sys.stderr.isatty()
        self._bar = _bar(label, transient=vanishes) if shown else None
        self._last = 0.0

    def update(self, done: int, total: int, per_s: float, note: str = "") -> None:
        """Show how far the work is; too soon after the last time, show nothing."""
        now = time.monotonic()
        self._done = self._done and done >= total
        written = self._bar is None and self._done
        if now - self._start < self._after_s or written:
            return
        interval = _LINE_INTERVAL_S if self._bar is None else _BAR_INTERVAL_S
        if done < total and now - self._last < interval:
            return
        self._last, self._done = now, done >= total
        parts = [f"{done:,}/{total:,} {self._unit}"]
        if per_s > 0:
            # A bar needs the room, and has the unit on the same line.
            parts.append(f"{per_s:,.1f}{'' if self._bar else ' ' + self._unit}/s")
            if done < total:
                parts.append(f"{duration((total - done) / per_s)} left")
        text = ", ".join(parts + [note] * bool(note))
        if self._bar is None:
            say(f"{self._label}: {text}")
            return
        self.move_bar(done, total, text)

    @property
    def has_bar(self) -> bool:
        """Whether there is a bar, as on a terminal."""
        return self._bar is not None

    def move_bar(self, done: int, total: int, text: str, label: str | None = None) -> None:
        """Show the bar at once, with this text at its end. label: another one than so far."""
        if self._bar is None:
            return
        (task,) = self._bar.task_ids
        label = self._label if label is None else label
        with contextlib.suppress(OSError):  # as in `say`
            self._bar.update(task, completed=done, total=total, text=text, description=label)
            if self._bar.live.is_started:
                self._bar.refresh()
            else:
                self._bar.start()
                self._bar.console.show_cursor()  # rich hides it, and a kill would leave it hidden

    def update_timed(self, done: int, total: int) -> None:
        """`update` with the rate since the start."""
        elapsed_s = time.monotonic() - self._start
        self.update(done, total, done / elapsed_s if elapsed_s > 0 else 0.0)

    def say(self, text: str, write: Callable[[str], None] = say) -> None:
        """Write a line to stderr, above the bar. write: `say`, or `mention` for a detail."""
        if self._bar is None or (write is mention and _verbosity < Verbosity.VERBOSE):
            write(text)
        else:
            with contextlib.suppress(OSError):
                self._bar.console.print(text, soft_wrap=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()


def _bar(label: str, *, transient: bool = False) -> Progress | None:
    """rich's progress bar, with the field `text` at its end; None if the terminal cannot move."""
    # rich takes 25 ms to import; only a bar is worth them.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    if not console.is_interactive:  # as with TERM=dumb
        return None
    label_column = Column(min_width=len(label), no_wrap=True)  # where it is narrow, the bar shrinks
    bar = Progress(
        TextColumn("{task.description}", markup=False, table_column=label_column),
        BarColumn(_BAR_WIDTH),
        TextColumn("{task.fields[text]}", markup=False),
        console=console,
        auto_refresh=False,
        transient=transient,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    bar.add_task(label, text="")
    return bar
