"""The process that trains a sweep's trials one after the other, on orders from a pipe.

For each trial it receives a TrainConfig. After each epoch it sends an EpochScore and receives
whether to continue. At the end of the trial it sends Finished or Failed.
"""

from __future__ import annotations

import contextlib
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection

from cache.errors import CapError
from train.config import TrainConfig


@dataclass(frozen=True)
class EpochScore:
    cider: float


@dataclass(frozen=True)
class Finished:
    pass


@dataclass(frozen=True)
class Failed:
    """A trial that ended with an error."""

    reason: str
    in_every_trial: bool  # whatever its settings, any trial would fail for this reason


def work(pipe: Connection, threads: int) -> None:
    """Train until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    import torch

    from train.fit.run_folder import TrainError

    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            try:
                _train(pipe.recv(), pipe)
                pipe.send(Finished())
            except CapError as error:
                pipe.send(Failed(str(error), in_every_trial=not isinstance(error, TrainError)))


def _train(config: TrainConfig, pipe: Connection) -> None:
    from train.fit.reports import EpochLog
    from train.fit.run import train

    with contextlib.closing(train(config)) as reports:
        for report in reports:
            if isinstance(report, EpochLog):
                pipe.send(EpochScore(report.cider))
                if not pipe.recv():
                    break
