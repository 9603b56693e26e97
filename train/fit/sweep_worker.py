"""The process that trains a sweep's trials, one after the other, as it is told through a pipe.

It receives a TrainConfig a trial, or None to end. It sends an EpochScore after each epoch and waits
for whether to go on; then Finished, or Failed.
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
    """A trial came to nothing. every: and so would every other, whatever its settings."""

    reason: str
    every: bool


def work(pipe: Connection, threads: int) -> None:
    """Train until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's affair
    import torch

    from train.fit.run import TrainError

    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while (config := pipe.recv()) is not None:
            try:
                _train(config, pipe)
                pipe.send(Finished())
            except CapError as error:
                pipe.send(Failed(str(error), every=not isinstance(error, TrainError)))


def _train(config: TrainConfig, pipe: Connection) -> None:
    from train.fit.run import EpochLog, train

    with contextlib.closing(train(config)) as reports:
        for report in reports:
            if isinstance(report, EpochLog):
                pipe.send(EpochScore(report.cider))
                if not pipe.recv():
                    break
