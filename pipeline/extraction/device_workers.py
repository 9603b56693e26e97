"""Several devices at once: one process each, which reads, decodes and encodes its own batches.

Processes and not threads, because Python's lock would be the limit: a thread holds it for some 30
microseconds a photo, which one fast GPU can bear and a machine full of them cannot. Only the
parent writes to the cache file; the workers read names from it and send features through a pipe.
They are given every n-th batch, so any number of devices computes the same batches.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cache.errors import CapError
from cache.store import FeatureCache
from pipeline.encoder.encoder import Encoder
from pipeline.extraction.encode_batches import Batches, EncodedRows, encode_batches

_EXIT_S = 0.3  # for a worker that was asked to end


class WorkerError(CapError):
    """A worker process cannot go on. One line."""


@dataclass(frozen=True)
class _Failure:
    text: str


@dataclass(frozen=True)
class _Share:
    """What one worker is told."""

    cache: Path
    order: NDArray[np.int64]
    batches: Batches
    images: Path
    weights: str
    device: str
    threads: int  # that decode
    compute_threads: int  # of torch, on a CPU


def encode_on_devices(
    cache: FeatureCache,
    order: NDArray[np.int64],
    batches: Batches,
    devices: Sequence[torch.device],
    *,
    images: Path,
    weights: str,
    threads: int,
) -> Iterator[EncodedRows | str]:
    """`encode_batches` on all of these devices side by side; batches come as they are ready.

    threads: decoding threads in all. Raises WorkerError; closing it ends the processes.
    """
    count = min(len(devices), len(batches))
    shares = [
        _Share(
            cache=cache.path,
            order=order,
            batches=batches[number::count],
            images=images,
            weights=weights,
            device=str(devices[number]),
            threads=max(1, threads // count),
            compute_threads=max(1, torch.get_num_threads() // count),
        )
        for number in range(count)
    ]
    workers: dict[Connection, tuple[_Share, subprocess.Popen[bytes]]] = {}
    try:
        for share in shares:
            ours, theirs = multiprocessing.Pipe()
            workers[ours] = share, _start(theirs)
            theirs.close()  # so that the end of the process is the end of the pipe
            ours.send(share)
        running = dict(workers)
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                share, process = running[connection]
                try:
                    item = connection.recv()
                except (EOFError, ConnectionResetError):
                    raise WorkerError(
                        f"{share.device}: its process ended (exit code {process.wait()}); "
                        "what is done is kept, run the same command again to go on"
                    ) from None
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
            except subprocess.TimeoutExpired:  # deep in a driver or a dead disk
                process.kill()


def _start(pipe: Connection) -> subprocess.Popen[bytes]:
    """A worker that will read its share from this pipe.

    A fresh interpreter, since neither CUDA nor a BLAS with threads survives a fork; and not one of
    multiprocessing's, which would run the caller's main module again. In a session of its own,
    since a terminal sends Ctrl-C to every process of one.
    """
    code = "from pipeline.extraction.device_workers import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(pipe.fileno())],
        pass_fds=[pipe.fileno()],
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        start_new_session=True,
    )


def main() -> None:
    """A worker's life. Ends, too, when its parent does: nobody reads its pipe any more."""
    pipe = Connection(int(sys.argv[1]))
    try:
        for item in _encode_share(pipe.recv()):
            pipe.send(item)
        pipe.send(None)
    except CapError as error:
        pipe.send(_Failure(str(error)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(1)


def _encode_share(share: _Share) -> Iterator[EncodedRows | str]:
    cache = FeatureCache(share.cache)
    device = torch.device(share.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # or pinned memory would take a corner of the first GPU
    encoder = Encoder.load(cache.encoder, device=device, weights=share.weights)
    torch.set_num_threads(share.compute_threads)
    return encode_batches(
        encoder,
        share.order,
        share.batches,
        images=share.images,
        paths=cache.paths,
        batch_rows=cache.batch_rows,
        threads=share.threads,
    )
