"""`cap bench beside`: what the commands lose when other processes want the same cores.

Busy processes do nothing but count. Whole commands run alone and beside them in turns, from the
prompt on. A fair share beside two busy processes on two cores is half: twice the time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cache.errors import CapError
from cache.share import share
from pipeline.bench.fresh_process import start_cap
from pipeline.bench.jpegs import write_coco_like_photos

_COUNTING = "while True: pass"
_EPOCHS = 4
_TRIALS = 4
_CAPTIONERS = (1, 2, 4, 8)
# A captioner of its own for each process, one photo a call, for as long as it is told.
_CAPTIONING = """
import sys, time
from pipeline import Captioner
model, seconds, photos = sys.argv[1], float(sys.argv[2]), sys.argv[3:]
captioner = Captioner.load(model, device="cpu")
captioner.caption(photos[0])
print("ready", flush=True)
sys.stdin.readline()
started, count = time.perf_counter(), 0
while time.perf_counter() - started < seconds:
    captioner.caption(photos[count % len(photos)], errors="raise")
    count += 1
print(count / (time.perf_counter() - started), flush=True)
"""


@dataclass(frozen=True)
class Beside:
    """Seconds of a command, the median of several runs."""

    command: str
    alone_s: float
    beside_s: float

    @property
    def ratio(self) -> float:
        return self.beside_s / self.alone_s


@dataclass(frozen=True)
class BesideBench:
    processes: int  # that are busy
    commands: tuple[Beside, ...]
    captioners: dict[int, float]  # photos per second of so many processes together
    machine: str  # the share of it

    def table(self) -> str:
        lines = [
            f"{self.machine}; beside {self.processes} busy processes",
            f"{'':<10}{'alone':>10}{'beside':>10}",
        ]
        lines += [
            f"{each.command:<10}{each.alone_s:>8.1f} s{each.beside_s:>8.1f} s   "
            f"({each.ratio:.1f} times as long)"
            for each in self.commands
        ]
        one = self.captioners.get(1)
        lines += [
            f"{count} captioner{'s' if count > 1 else ''}: {rate:.1f} photos/s"
            + (f" ({rate / one:.0%} of one)" if one and count > 1 else "")
            for count, rate in self.captioners.items()
        ]
        return "\n".join(lines)


def bench_beside(
    *,
    processes: int = 2,
    rounds: int = 3,
    backbone: str = "resnet50",
    photos: int = 48,
    seconds: float = 10.0,
    captioners: tuple[int, ...] = _CAPTIONERS,
    progress: Callable[[int, int, float, str], None] = lambda *_: None,
) -> BesideBench:
    """Run extraction, training, a sweep and prediction alone and beside busy processes, then
    captioners. Without Optuna there is no sweep.

    On the CPU, in a temporary folder, with random weights. seconds: how long captioners are
    measured. progress: is told how many steps are done and how many there are, 0 for the rate, and
    what is being done. Raises CapError if a command fails.
    """
    commands = ["extract", "train", "sweep", "predict"]
    if importlib.util.find_spec("optuna") is None:
        commands.remove("sweep")
    steps = 2 * len(commands) * rounds + len(captioners)
    done = 0

    def tell(what: str) -> None:
        nonlocal done
        progress(done, steps, 0, what)
        done += 1

    with tempfile.TemporaryDirectory(prefix="cap-bench-") as name:
        folder = Path(name)
        (folder / "photos").mkdir()
        write_coco_like_photos(folder / "photos", photos)
        names = sorted(str(path) for path in (folder / "photos").iterdir())
        _write_captions(folder / "captions.csv", names)
        taken: dict[tuple[str, bool], list[float]] = {}
        for _ in range(rounds):
            for command in commands:
                for beside in (False, True):
                    tell(f"{command} {'beside others' if beside else 'alone'}")
                    with _busy(processes if beside else 0):
                        seconds_taken = _run(command, folder, backbone)
                    taken.setdefault((command, beside), []).append(seconds_taken)
        rates = {}
        for count in captioners:
            tell(f"{count} captioners")
            rates[count] = _rate(count, folder / "run", names, seconds)
    progress(steps, steps, 0, "")
    return BesideBench(
        processes=processes,
        commands=tuple(
            Beside(
                command,
                statistics.median(taken[command, False]),
                statistics.median(taken[command, True]),
            )
            for command in commands
        ),
        captioners=rates,
        machine=str(share()),
    )


def _write_captions(path: Path, names: list[str]) -> None:
    lines = [
        f"{os.path.basename(name)},photo number {number} shows thing {number % 7} and {number % 5}"
        for number, name in enumerate(names)
        for _ in range(5)
    ]
    path.write_text("\n".join(["image,caption", *lines]) + "\n")


@contextlib.contextmanager
def _busy(count: int) -> Iterator[None]:
    """So many processes that want a core each."""
    counting = [subprocess.Popen([sys.executable, "-c", _COUNTING]) for _ in range(count)]
    try:
        yield
    finally:
        for process in counting:
            process.kill()
            process.wait()


def _run(command: str, folder: Path, backbone: str) -> float:
    """Seconds that a command takes from the prompt on."""
    arguments: dict[str, tuple[object, ...]] = {
        "extract": (
            *("extract-features", "--images", folder / "photos", "--out", folder / "x.h5"),
            *("--captions", folder / "captions.csv", "--backbone", backbone),
            *("--weights", "random", "--overwrite", "--device", "cpu"),
        ),
        "train": (
            *("train", "--from-cache", folder / "x.h5", "--out", folder / "run", "--overwrite"),
            *("--recipe", "classic", "--epochs", _EPOCHS, "--batch-size", 32, "--min-count", 1),
            *("--device", "cpu"),
        ),
        "sweep": (
            *("sweep", "--from-cache", folder / "x.h5"),
            *("--out", folder / f"sweep-{time.monotonic_ns()}"),  # a sweep goes on in its folder
            *("--trials", _TRIALS, "--epochs", 1, "--min-count", 1, "--device", "cpu"),
        ),
        "predict": ("predict", folder / "photos", "--model", folder / "run", "--device", "cpu"),
    }
    started = time.perf_counter()
    with start_cap(*arguments[command]) as process:
        _, errors = process.communicate()
    if process.returncode:
        reason = (errors.strip().splitlines() or ["it said nothing"])[-1]
        raise CapError(f"a fresh `cap {arguments[command][0]}` failed ({reason})")
    return time.perf_counter() - started


def _rate(count: int, model: Path, photos: list[str], seconds: float) -> float:
    """Photos per second of so many processes together, each with a captioner of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    command = [sys.executable, "-P", "-c", _CAPTIONING, str(model), str(seconds), *photos]
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )

    try:
        while len(started) < count:
            started.append(start())
        for process in started:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise CapError("a process with a captioner ended before it was ready")
        for process in started:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        rates = []
        for process in started:
            assert process.stdout is not None
            rates.append(float(json.loads(process.stdout.readline())))
        return sum(rates)
    finally:
        for process in started:
            process.kill()
            process.communicate()
