"""The steps of `gpu_check.py`: each runs in a child process, which may fail or hang without harm.

A module has its steps in STEPS: a name and a function from a Run to figures, which raises
AssertionError if something is wrong. One child runs several steps of one module, one after the
other, since starting takes seconds on a GPU. If it ends or takes too long, its process group is
killed, and another child goes on with the next step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
NO_TIME = "no time left"
_START_S = 30.0  # that a child may take before its first step: it imports torch
_GLANCE_S = 0.5  # how often the time that is left is looked at
_DUMP_S = 1.0  # that a child gets to write where it is, before it is killed


@dataclass(frozen=True)
class Run:
    """What all steps work with."""

    device: str  # as PyTorch names it, with a number
    work: Path  # a folder for files, the same for all steps
    backbone: str
    photos: int  # of the largest extraction
    small: bool  # to try the steps on a CPU


def run_steps(
    module: str, limits: Mapping[str, float], run: Run, left_s: Callable[[], float]
) -> Iterator[tuple[str, Figures]]:
    """The figures of each step, in order. `ok` is False for a step that failed, hung or came to no
    turn.

    limits: the seconds that each step may take, by its name. left_s: the seconds that all steps
    have left.
    """
    pending = list(limits)
    while pending and left_s() > 0:
        log = run.work / f"{module}.log"
        with _Child(module, pending, run, log) as child:
            started, beginning = time.perf_counter(), True
            while pending:
                allowed = limits[pending[0]] + (_START_S if beginning else 0.0)
                try:
                    line = child.read_line(allowed, left_s)
                except TimeoutError:
                    error = f"was not done after {time.perf_counter() - started:.0f} s"
                    child.dump()
                    yield pending.pop(0), _failure(error, started, log)
                    break
                if line is None:
                    error = f"its process ended ({child.exit_code()})"
                    yield pending.pop(0), _failure(error, started, log)
                    break
                yield pending.pop(0), json.loads(line)
                started, beginning = time.perf_counter(), False
    for name in pending:
        yield name, {"ok": False, "error": NO_TIME}


def _failure(error: str, started: float, log: Path) -> Figures:
    where = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    seconds = round(time.perf_counter() - started, 1)
    return {"ok": False, "error": error, "where": where, "seconds": seconds}


class _Child:
    """A process that runs steps; a context manager that ends it and all that it has started."""

    def __init__(self, module: str, names: list[str], run: Run, log: Path) -> None:
        options = dataclasses.asdict(run) | {"work": str(run.work)}
        command = [sys.executable, __file__, module, json.dumps(options), *names]
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # nothing is written; see `_end_with_the_parent`
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,  # and so a process group
            )
        self._read = b""

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def read_line(self, limit_s: float, left_s: Callable[[], float]) -> bytes | None:
        """The next line, or None at the end. Raises TimeoutError after `limit_s` seconds, or once
        `left_s` says that none are left.
        """
        assert self._process.stdout is not None
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._read:
            left = min(deadline - time.monotonic(), left_s())
            if left <= 0:
                raise TimeoutError
            if not select.select([self._process.stdout], [], [], min(left, _GLANCE_S))[0]:
                continue
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                return None
            self._read += part
        line, _, self._read = self._read.partition(b"\n")
        return line

    def dump(self) -> None:
        """Let it write to its log where it is."""
        self._process.send_signal(signal.SIGUSR1)
        time.sleep(_DUMP_S)

    def exit_code(self) -> int:
        return self._process.wait()


def run_step(step: Callable[[Run], Figures], run: Run) -> Figures:
    started = time.perf_counter()
    try:
        result: Figures = {"ok": True, **step(run)}
    except Exception as error:  # the other steps are still worth running
        result = {
            "ok": False,
            "error": f"{type(error).__name__}: {error}"[:2000],
            "where": traceback.format_exc(limit=-5)[-2000:],
        }
    return result | {"seconds": round(time.perf_counter() - started, 1)}


def _end_with_the_parent() -> None:
    """Kill this process group once the parent has ended: then its end of stdin is closed."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Run steps of a module in this process, and write a line of JSON for each."""
    faulthandler.register(signal.SIGUSR1)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the steps print goes to the log
    module, options, *names = sys.argv[1:]
    given = json.loads(options)
    run = Run(**given | {"work": Path(given["work"])})
    steps: dict[str, Callable[[Run], Figures]] = importlib.import_module(module).STEPS
    for name in names:
        print(f"--- {name}", file=sys.stderr, flush=True)
        print(json.dumps(run_step(steps[name], run)), file=out, flush=True)


if __name__ == "__main__":
    main()
