"""Several devices at once: one process each, which reads, decodes and encodes its own batches.

Processes and not threads, because Python's lock would be the limit: a thread holds it for some 30
microseconds a photo, which one fast GPU can bear and a machine full of them cannot. Only the
parent writes to the cache file; the workers read names from it and send features through a pipe.
They are given every n-th batch, so any number of devices computes the same batches.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cache.errors import CapError
from cache.store import FeatureCache
from pipeline.encoder import Encoder
from pipeline.encoding import Batches, EncodedRows, encode_batches

_EXIT_S = 0.3  # for a worker that was asked to end


class WorkerError(CapError):
    """A worker process cannot go on. One line."""


@dataclass(frozen=True)
class _Failure:
    text: str


@dataclass(frozen=True)
class _Share:
    """What one worker is told. Sent to a fresh interpreter, so it holds plain things only."""

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
    # Not forked: neither CUDA nor a BLAS with threads survives it.
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, tuple[_Share, BaseProcess]] = {}
    try:
        for share in shares:
            ours, theirs = context.Pipe(duplex=False)
            process: BaseProcess = context.Process(target=_work, args=(share, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            workers[ours] = share, process
        running = dict(workers)
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                share, process = running[connection]
                try:
                    item = connection.recv()
                except EOFError:
                    process.join()
                    raise WorkerError(
                        f"{share.device}: its process ended (exit code {process.exitcode}); "
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
            process.join(_EXIT_S)
            if process.is_alive():  # deep in a driver or a dead disk
                process.kill()


def _work(share: _Share, results: Connection) -> None:
    """A worker's life. Ends, too, when its parent does: nobody reads its pipe any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        for item in _encode_share(share):
            results.send(item)
        results.send(None)
    except CapError as error:
        results.send(_Failure(str(error)))
    except BrokenPipeError:
        os._exit(1)


def _encode_share(share: _Share) -> Iterator[EncodedRows | str]:
    cache = FeatureCache(share.cache)
    device = torch.device(share.device)
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
