"""Extraction on several devices: one worker process each reads, decodes and encodes its batches.

They are processes, not threads, because a thread holds Python's lock for some 30 microseconds per
photo: one fast GPU can wait for that, a machine full of GPUs cannot. Only the parent writes to the
cache file. The workers read names from it and send features through pipes. Each of n workers gets
every n-th batch, so any number of devices computes the same batches.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cache.errors import CapError
from cache.store import FeatureCache
from pipeline.encoder.encoder import load_recorded
from pipeline.extraction.encode_batches import encode_batches
from pipeline.extraction.feature_checks import EncodedBatch
from pipeline.photos.photo_loader import BatchRequest
from pipeline.photos.sources.source import Source

_EXIT_S = 0.3  # how long a worker that was asked to end may take


class WorkerError(CapError):
    """Raised when a worker process cannot continue. The message is one line."""


@dataclass(frozen=True)
class _Failure:
    """What a worker sends when it cannot continue."""

    text: str


@dataclass(frozen=True)
class _WorkerTask:
    """What one worker is sent: its batches, and how to encode them."""

    cache: Path
    order: NDArray[np.int64]
    batches: Sequence[BatchRequest]
    source: Source
    weights: str
    device: str
    readers: int
    decoder: str
    compute_threads: int  # of torch, on a CPU


def encode_on_devices(
    cache: FeatureCache,
    order: NDArray[np.int64],
    batches: Sequence[BatchRequest],
    devices: Sequence[torch.device],
    *,
    source: Source,
    weights: str,
    readers: int,
    decoder: str = "auto",
) -> Iterator[EncodedBatch | str]:
    """`encode_batches` on several devices side by side. Batches come in the order they are ready.

    readers: of all devices together. decoder: as for `encode_batches`. Raises WorkerError. Closing
    the iterator ends the processes.
    """
    count = min(len(devices), len(batches))
    tasks = [
        _WorkerTask(
            cache=cache.path,
            order=order,
            batches=batches[number::count],
            source=source,
            weights=weights,
            device=str(devices[number]),
            readers=max(1, readers // count),
            decoder=decoder,
            compute_threads=max(1, torch.get_num_threads() // count),
        )
        for number in range(count)
    ]
    workers: dict[Connection, tuple[_WorkerTask, subprocess.Popen[bytes]]] = {}
    try:
        for task in tasks:
            ours, theirs = multiprocessing.Pipe()
            workers[ours] = task, _start(theirs)
            theirs.close()  # so that reading fails once the process has ended
        # Only now, because sending waits until the worker reads, and it first imports torch.
        for pipe, (task, process) in workers.items():
            try:
                pipe.send(task)
            except (BrokenPipeError, ConnectionResetError):
                raise _ended(task, process) from None
        running = dict(workers)
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                task, process = running[connection]
                try:
                    item = connection.recv()
                except (EOFError, ConnectionResetError):
                    raise _ended(task, process) from None
                if item is None:
                    del running[connection]
                elif isinstance(item, _Failure):
                    raise WorkerError(item.text)
                else:
                    yield item
    finally:
        for connection, (_, process) in workers.items():
            connection.close()
            process.terminate()
        for _, process in workers.values():
            try:
                process.wait(_EXIT_S)
            except subprocess.TimeoutExpired:  # it hangs in a driver or waits for a dead disk
                process.kill()


def _ended(task: _WorkerTask, process: subprocess.Popen[bytes]) -> WorkerError:
    return WorkerError(
        f"{task.device}: its process ended (exit code {process.wait()}); "
        "what is done is kept, run the same command again to continue"
    )


def _start(pipe: Connection) -> subprocess.Popen[bytes]:
    """Start a worker that reads its task from this pipe.

    It is a fresh interpreter, because neither CUDA nor a BLAS with threads survives a fork, and not
    one of multiprocessing's, because that would run the caller's main module again. It has a
    session of its own, because a terminal sends Ctrl-C to every process of its session. It imports
    the same modules as this process: with -P, Python does not look in the working folder first.
    """
    code = "from pipeline.extraction.device_workers import main; main()"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code, str(pipe.fileno())],
        pass_fds=[pipe.fileno()],
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        start_new_session=True,
    )


def main() -> None:
    """Run a worker. It also ends when its parent has ended, because its pipe is then closed."""
    warnings.filterwarnings("ignore", module=r"PIL|pillow_heif")  # as in the parent
    pipe = Connection(int(sys.argv[1]))
    try:
        for item in _encode(pipe.recv()):
            pipe.send(item)
        pipe.send(None)
    except CapError as error:
        pipe.send(_Failure(str(error)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(1)


def _encode(task: _WorkerTask) -> Iterator[EncodedBatch | str]:
    cache = FeatureCache(task.cache)
    device = torch.device(task.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else pinned memory would take memory of the first GPU
    record = cache.encoder
    backbone = load_recorded(record, task.weights)
    torch.set_num_threads(task.compute_threads)
    return encode_batches(
        backbone,
        record,
        device,
        task.order,
        task.batches,
        source=task.source,
        paths=cache.paths,
        batch_rows=cache.batch_rows,
        readers=task.readers,
        decoder=task.decoder,
    )
