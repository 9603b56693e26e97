"""What readers of photos manage: by threads of one process, and by processes.

Each thread or process works on its own share of the photos for a given time. The rates are added
up, so that nobody waits for the slowest.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch

from pipeline.bench.jpegs import BenchError
from pipeline.photos.photo_file import file_digest, read_file, read_photo
from pipeline.photos.preprocessing import empty_pixels

_END_S = 2.0


def rate_by_threads(
    count: int, work: Callable[[int], Callable[[int], object]], at_least_s: float
) -> float:
    """Items per second that `count` threads manage together.

    work: called with the number of a thread, gives what that thread calls with one item after the
    other: 0, 1, 2, …
    """
    with ThreadPoolExecutor(count) as threads:
        return sum(threads.map(lambda number: _rate(work(number), at_least_s), range(count)))


def reading(paths: Sequence[Path], count: int) -> Callable[[int], Callable[[int], object]]:
    """For `rate_by_threads`: read files and digest their bytes."""

    def work(number: int) -> Callable[[int], object]:
        mine = _share(paths, number, count)
        return lambda item: file_digest(read_file(mine[item % len(mine)]))

    return work


def decoding(
    paths: Sequence[Path], size: int, count: int
) -> Callable[[int], Callable[[int], object]]:
    """For `rate_by_threads`: read, digest, decode and resize photos, as an extraction does."""

    def work(number: int) -> Callable[[int], object]:
        mine, out = _share(paths, number, count), empty_pixels(1, size)
        return lambda item: read_photo(mine[item % len(mine)], size, ("full",), out=out)

    return work


class ReaderProcesses:
    """`count` processes that do what `decoding` does. A context manager.

    paths: of the photos. size: of their pixels. Raises BenchError if a process ends.
    """

    def __init__(self, paths: Sequence[Path], size: int, count: int) -> None:
        self._paths, self._size, self._count = paths, size, count
        self._pipes: list[Connection] = []
        self._ending = contextlib.ExitStack()

    def __enter__(self) -> ReaderProcesses:
        # From a process that has only imported modules: neither CUDA nor a BLAS with threads
        # survives a fork of this one.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        with contextlib.ExitStack() as started:
            for number in range(self._count):
                share = _share(self._paths, number, self._count)
                self._pipes.append(started.enter_context(_process(context, share, self._size)))
            self._ending = started.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.close()

    def rate(self, at_least_s: float) -> float:
        """Photos per second of all processes together."""
        try:
            for pipe in self._pipes:
                pipe.send(at_least_s)
            return float(sum(pipe.recv() for pipe in self._pipes))
        except (EOFError, OSError):
            raise BenchError("a reader process ended; is there memory for them?") from None


@contextlib.contextmanager
def _process(context: ForkServerContext, share: Sequence[Path], size: int) -> Iterator[Connection]:
    """Start a reader, once it is ready; and end it."""
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, share, size), daemon=True)
    process.start()
    theirs.close()  # so that reading fails once the process has ended
    try:
        ours.recv()
        yield ours
    except EOFError:
        raise BenchError("a reader process cannot start; is there memory for it?") from None
    finally:
        ours.close()
        process.join(_END_S)
        process.kill()


def _serve(pipe: Connection, share: Sequence[Path], size: int) -> None:
    """Measure as often as asked for, until the parent closes its end, or has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to this process, too
    torch.set_num_threads(1)  # the other cores have readers of their own
    work = decoding(share, size, 1)(0)
    with contextlib.suppress(EOFError, ConnectionError):
        pipe.send(None)
        while True:
            pipe.send(_rate(work, pipe.recv()))


def _share(paths: Sequence[Path], number: int, count: int) -> Sequence[Path]:
    return paths[number::count] or paths


def _rate(work: Callable[[int], object], at_least_s: float) -> float:
    done, started = 0, time.perf_counter()
    while not done or time.perf_counter() - started < at_least_s:
        work(done)
        done += 1
    return done / (time.perf_counter() - started)
