"""The process that trains a sweep's trials one after the other, on orders from a pipe.

For each trial it receives a TrainConfig. It sends a SweepNotice if there is one. After each epoch
it sends an EpochScore and receives whether to continue. At the end of the trial it sends Finished
or Failed. It ends at once when the process that started it ends, however that happens.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection

from cache.errors import CapError
from train.config import TrainConfig

_DYING_S = 5.0  # a process whose pipe is closed has ended, or is about to


@dataclass(frozen=True)
class EpochScore:
    cider: float
    best: bool  # whether this epoch's model became the trial's best.cap


@dataclass(frozen=True)
class Finished:
    pass


@dataclass(frozen=True)
class Failed:
    """A trial that ended with an error."""

    reason: str
    in_every_trial: bool  # whatever its settings, any trial would fail for this reason


class Worker:
    """A new process that trains what it is sent, as the sweep sees it.

    When it has died, `pipe.recv` raises EOFError or another OSError.
    """

    def __init__(self, threads: int) -> None:
        """threads: of PyTorch, for each operation."""
        context = get_context("spawn")  # a fork would share the state of torch's threads
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, threads), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, message: object) -> None:
        """Send an order or an answer. If the process has died, the next `pipe.recv` tells."""
        with contextlib.suppress(OSError):
            self.pipe.send(message)

    def terminate(self) -> None:
        self._process.terminate()

    def end(self) -> str:
        """End the process if it has not ended by itself. Returns how it ended."""
        self._process.join(_DYING_S)
        self._process.terminate()
        self._process.join()
        self.pipe.close()
        code = self._process.exitcode or 0
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


def work(pipe: Connection, threads: int) -> None:
    """Train until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    from train.fit.record.run_folder import TrainError

    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            try:
                _train(pipe.recv(), pipe)
                pipe.send(Finished())
            except CapError as error:
                pipe.send(Failed(str(error), in_every_trial=not isinstance(error, TrainError)))


def _end_with_parent() -> None:
    """Wait for the end of the parent process, then end this one, in the middle of an epoch too."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _train(config: TrainConfig, pipe: Connection) -> None:
    from train.fit.reports import EpochLog, Started, SweepNotice
    from train.fit.run import train

    with contextlib.closing(train(config, saves_within_epochs=False)) as reports:
        for report in reports:
            if isinstance(report, Started) and report.notices():
                pipe.send(SweepNotice("\n".join(report.notices())))
            if isinstance(report, EpochLog):
                pipe.send(EpochScore(report.cider, report.best))
                if not pipe.recv():
                    break
