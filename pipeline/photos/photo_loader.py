"""Photos ahead of the encoder: read, digested, decoded and resized by threads, batch after batch.

The threads do their work in libraries that release Python's lock (file reads, BLAKE2b,
libjpeg-turbo, torch's resize), so they scale with the cores. A few batch-sized buffers go round
between them and the encoder; on a GPU machine they are pinned, so that copies overlap with work.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from cache.errors import CapError
from pipeline.photos.photo_file import ReadPhoto, read_photo
from pipeline.photos.preprocessing import empty_pixels

# Photos that a thread takes at once: fewer hand-overs, still a fine grain.
_TASK_PHOTOS = 4
_BATCHES_AHEAD = 3
# A disk or network drive that finishes no photo for so long is taken to be gone.
STALL_S = 60.0


class StalledError(CapError):
    """Photos are not coming from the disk any more. One line."""


@dataclass
class LoadedBatch:
    """Photos of rows `first` … `first + len(pixels)`; those that were not asked for are black.

    pixels: (R, V, 3, S, S) uint8, channels last in memory, valid until `release`. reads: what
    became of each row asked for; their own pixels are gone.
    """

    first: int
    pixels: Tensor
    reads: dict[int, ReadPhoto] = field(default_factory=dict)
    decoded: set[int] = field(default_factory=set)


class PhotoLoader:
    """Iterates over loaded batches in order. A context manager; leaving it stops the threads.

    paths: the photo of a row. batches: (first row, rows wanted) of each. Raises StalledError
    where nothing comes for `stall_s` seconds; whatever is wrong with one photo is in its `reads`.
    """

    def __init__(
        self,
        batches: Sequence[tuple[int, Sequence[int]]],
        path_of: Callable[[int], Path],
        *,
        batch_rows: int,
        image_size: int,
        views: tuple[str, ...],
        threads: int,
        pin_memory: bool = False,
        stall_s: float = STALL_S,
    ) -> None:
        self._batches = batches
        self._path_of = path_of
        self._batch_rows = batch_rows
        self._image_size, self._views = image_size, views
        self._pin_memory = pin_memory
        self._stall_s = stall_s
        self._free: list[Tensor] = []
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._finished = threading.Condition()
        self._last_photo = time.monotonic()
        self._stopped = False
        # Daemons: a thread that hangs in a dead network drive must not keep the process alive.
        self._threads = [
            threading.Thread(target=self._work, name=f"photos-{i}", daemon=True)
            for i in range(min(threads, sum(len(rows) for _, rows in batches)))
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped = True
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + 0.5
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def __iter__(self) -> Iterator[LoadedBatch]:
        submitted = map(self._submit, self._batches)  # lazy: submitted when taken
        ahead = deque(islice(submitted, _BATCHES_AHEAD))
        while ahead:
            loading = ahead.popleft()
            self._wait(loading)
            ahead.extend(islice(submitted, 1))
            yield loading.batch

    def release(self, batch: LoadedBatch) -> None:
        """Give a batch's buffer back; nothing may read it any more, on any device."""
        self._free.append(batch.pixels)

    def _submit(self, wanted: tuple[int, Sequence[int]]) -> _Loading:
        first, rows = wanted
        pixels = self._free.pop() if self._free else None
        if pixels is None:
            count = self._batch_rows * len(self._views)
            flat = empty_pixels(count, self._image_size, pin_memory=self._pin_memory)
            pixels = flat.unflatten(0, (self._batch_rows, len(self._views)))
        loading = _Loading(LoadedBatch(first, pixels), set(rows))
        for place in set(range(len(pixels))) - {row - first for row in rows}:
            pixels[place] = 0
        for start in range(0, len(rows), _TASK_PHOTOS):
            self._tasks.put(_Task(loading, rows[start : start + _TASK_PHOTOS]))
        return loading

    def _wait(self, loading: _Loading) -> None:
        with self._finished:
            self._last_photo = max(self._last_photo, loading.since)
            while loading.left and loading.failure is None:
                self._finished.wait(1.0)
                silent_s = time.monotonic() - self._last_photo
                if silent_s > self._stall_s:
                    row = min(loading.left)
                    raise StalledError(
                        f"{self._path_of(row)}: the disk has given no photo for {silent_s:.0f} s; "
                        "what is done is kept, run the same command again to go on"
                    )
        if loading.failure is not None:
            raise loading.failure

    def _work(self) -> None:
        while not self._stopped and (task := self._tasks.get()) is not None:
            batch = task.loading.batch
            for row in task.rows:
                if self._stopped:
                    return
                try:
                    self._load(batch, row)
                except BaseException as error:  # ours, not the photo's: let the caller have it
                    task.loading.failure = error
                self._last_photo = time.monotonic()
            with self._finished:
                task.loading.left.difference_update(task.rows)
                if not task.loading.left or task.loading.failure is not None:
                    self._finished.notify_all()

    def _load(self, batch: LoadedBatch, row: int) -> None:
        place = batch.pixels[row - batch.first]
        read = read_photo(self._path_of(row), self._image_size, self._views, out=place)
        if read.pixels is None:
            place.zero_()
        else:
            batch.decoded.add(row)
        batch.reads[row] = ReadPhoto(None, read.digest, read.error)


@dataclass
class _Loading:
    batch: LoadedBatch
    left: set[int]
    failure: BaseException | None = None
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class _Task:
    loading: _Loading
    rows: Sequence[int]
