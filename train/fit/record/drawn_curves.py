"""Draws a run's curves while it trains, in a process of its own.

matplotlib takes a second to import and draw, in which a GPU does an eighth of an epoch of COCO's
size. The process is started when the first epoch has ended, or for the first picture, and draws on
request. It ends when its standard input does, so also when this process is killed.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

NAME = "curves.png"
_INTERVAL_S = 30.0  # between pictures while training goes on
_PATIENCE_S = 30.0  # for the last picture; it takes a second where all is well
_CODE = (
    "import sys; sys.path[:] = {path!r}; from train.fit.record.curves import serve; serve({run!r})"
)


class DrawnCurves:
    """Draws the curves of a run now and then, and when training ends. A context manager waits for
    the last picture, and ends the process.
    """

    def __init__(self, run: Path, notice: Callable[[str], object] | None) -> None:
        """run: its folder. notice: called with one line if a picture cannot be drawn, which ends
        nothing; None: draw nothing.
        """
        self._run, self._notice = run, notice
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = 0  # pictures
        self._answers = b""  # a line for each picture
        self._drawn_at = time.monotonic()

    def prepare(self) -> None:
        """Start the process, so that it is ready for the first picture."""
        if self._notice is None or self._process is not None:
            return
        # Threads of OpenBLAS would disturb training.
        quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        code = _CODE.format(path=sys.path, run=os.fspath(self._run.absolute()))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | quiet,
                start_new_session=True,  # Ctrl-C is for this process
            )
        except OSError as error:
            self._fail(f"cannot start a process ({error.strerror})")

    def draw_if_due(self) -> None:
        """Have a picture drawn, unless the last one is recent or not done yet."""
        now = time.monotonic()
        if self._notice is None or now - self._drawn_at < _INTERVAL_S:
            return
        self._drawn_at = now
        self._read_answers()
        if self._answers.count(b"\n") == self._asked:
            self._ask()

    def draw_last(self) -> None:
        """Have the last picture drawn. Leaving the context waits for it."""
        self._ask()

    def _ask(self) -> None:
        self.prepare()
        if self._notice is None or self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended; its exit code tells
            self._process.stdin.write(b"draw\n")
            self._process.stdin.flush()
        self._asked += 1

    def _read_answers(self) -> None:
        """Take in what the process has answered so far."""
        if self._process is None:
            return
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        os.set_blocking(fd, False)
        with contextlib.suppress(BlockingIOError):
            while part := os.read(fd, 4096):
                self._answers += part
        os.set_blocking(fd, True)

    def _fail(self, reason: str) -> None:
        """Give the notice, and draw no more."""
        if self._notice is not None:
            self._notice(f"{self._run / NAME}: not drawn ({reason})")
        self._notice = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        try:
            rest, _ = process.communicate(timeout=_PATIENCE_S)
            lines = (self._answers + rest).decode("utf-8", "replace").splitlines()
            last = lines[-1] if lines else ""
            if last.startswith("failed: "):
                self._fail(last.removeprefix("failed: "))
            elif len(lines) < self._asked:
                self._fail(f"the process that draws ended with code {process.returncode}")
        except subprocess.TimeoutExpired:
            self._fail(f"it took longer than {_PATIENCE_S:.0f} s")
        finally:
            process.kill()  # has no effect on one that has ended
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()
