"""What threads that read photos manage.

Each thread works on its own share of the photos for a given time. The rates are added up, so that
nobody waits for the slowest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.photos.photo_file import file_digest, read_file, read_photo
from pipeline.photos.preprocessing import empty_pixels


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


def _share(paths: Sequence[Path], number: int, count: int) -> Sequence[Path]:
    return paths[number::count] or paths


def _rate(work: Callable[[int], object], at_least_s: float) -> float:
    done, started = 0, time.perf_counter()
    while not done or time.perf_counter() - started < at_least_s:
        work(done)
        done += 1
    return done / (time.perf_counter() - started)
