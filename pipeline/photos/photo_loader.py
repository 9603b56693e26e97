"""Loading photos ahead of the encoder: threads read, digest, decode and resize batch after batch.

Most of the work is done in libraries that release Python's lock (file reads, BLAKE2b,
libjpeg-turbo, torch's resize), so the threads scale with the cores. A few batch-sized buffers
circulate between the threads and the encoder. For a GPU they are pinned, so that copies to it
overlap with its work.
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
from typing import NamedTuple, Self

from torch import Tensor

from cache.errors import CapError
from pipeline.photos.photo_file import ReadPhoto, read_photo
from pipeline.photos.preprocessing import empty_pixels
from pipeline.photos.witnesses import Witnesses

# How many photos a thread takes at once: few enough to keep all threads busy to the end, enough to
# make handing them over cheap.
_TASK_PHOTOS = 4
_BATCHES_AHEAD = 3
# A disk or network drive that delivers no photo for this long is assumed to be gone.
STALL_S = 60.0
_GLANCE_S = 1.0  # how often the time without a photo is looked at


class StalledError(CapError):
    """Raised when the disk has stopped delivering photos. The message is one line."""


class Silence:
    """How long nothing has come from a disk, while this process was running.

    A process that is suspended, by Ctrl-Z or with its machine, hears nothing either. So the time is
    counted in glances, none of which counts for much longer than it should have taken.
    """

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._glance = time.monotonic()
        self._heard = 0
        self.seconds = 0.0

    def is_stall(self, heard: int) -> bool:
        """Glance again, after at most a second. heard: how much has come so far."""
        since, self._glance = self._glance, time.monotonic()
        if heard != self._heard:
            self._heard, self.seconds = heard, 0.0
        else:
            self.seconds += min(self._glance - since, 2 * _GLANCE_S)
        return self.seconds > self._stall_s


class BatchRequest(NamedTuple):
    """A batch to load: the row of its first place, and the rows whose photos are wanted."""

    first: int
    rows: Sequence[int]  # at least `first`, ascending


@dataclass
class LoadedBatch:
    """The photos of rows `first` … `first + len(pixels) - 1`. Rows not requested are black.

    pixels: (R, V, 3, S, S) uint8, channels last in memory, valid until `PhotoLoader.release`.
    reads: digest and error of each requested row, without its pixels. decoded: the requested rows
    that have pixels.
    """

    first: int
    pixels: Tensor
    reads: dict[int, ReadPhoto] = field(default_factory=dict)
    decoded: set[int] = field(default_factory=set)


class PhotoLoader:
    """Iterates over loaded batches in order. A context manager: leaving it stops the threads.

    path_of: the photo of a row. batch_rows: the places of every batch, however few rows are
    requested. Iteration raises StalledError if no photo arrives for `stall_s` seconds, whose
    message ends with `advice`; VanishedError if the drive seems to be gone; and ShortageError. An
    error with one photo is in the `reads` of its batch.
    """

    def __init__(
        self,
        batches: Sequence[BatchRequest],
        path_of: Callable[[int], Path],
        *,
        batch_rows: int,
        image_size: int,
        views: tuple[str, ...],
        threads: int,
        pin_memory: bool = False,
        stall_s: float = STALL_S,
        advice: str = "what is done is kept, run the same command again to continue",
    ) -> None:
        self._batches = batches
        self._path_of = path_of
        self._batch_rows = batch_rows
        self._image_size, self._views = image_size, views
        self._pin_memory = pin_memory
        self._stall_s, self._advice = stall_s, advice
        self._free: list[Tensor] = []
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._finished = threading.Condition()
        self._photos = 0  # read by now; a few may go uncounted when threads count at once
        self._stopped = False
        self._witnesses = Witnesses([batch.rows for batch in batches], path_of)
        # Daemons, because a thread that hangs in a dead network drive must not keep the process
        # alive.
        self._threads = [
            threading.Thread(target=self._work, args=(i,), name=f"photos-{i}", daemon=True)
            for i in range(min(threads, sum(len(batch.rows) for batch in batches)))
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
        submitted = map(self._submit, self._batches)  # lazy: each is submitted when taken
        ahead = deque(islice(submitted, _BATCHES_AHEAD))
        while ahead:
            loading = ahead.popleft()
            self._wait(loading)
            ahead.extend(islice(submitted, 1))
            yield loading.batch

    def release(self, batch: LoadedBatch) -> None:
        """Return a batch's buffer for reuse. No device may still be reading it."""
        self._free.append(batch.pixels)

    def _submit(self, request: BatchRequest) -> _Loading:
        first, rows = request
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
        silence = Silence(self._stall_s)
        with self._finished:
            while loading.left and loading.failure is None:
                self._finished.wait(_GLANCE_S)
                if silence.is_stall(self._photos):
                    row = min(loading.left)
                    raise StalledError(
                        f"{self._path_of(row)}: nothing came from the disk for "
                        f"{silence.seconds:.0f} s; {self._advice}"
                    )
        if loading.failure is not None:
            raise loading.failure

    def _work(self, number: int) -> None:
        if number == 0:  # in a thread, because a drive may hang
            self._witnesses.look()
        while not self._stopped and (task := self._tasks.get()) is not None:
            batch = task.loading.batch
            for row in task.rows:
                if self._stopped:
                    return
                try:
                    self._load(batch, row)
                except BaseException as error:  # no fault of the photo: the caller raises it
                    task.loading.failure = error
                self._photos += 1
            with self._finished:
                task.loading.left.difference_update(task.rows)
                if not task.loading.left or task.loading.failure is not None:
                    self._finished.notify_all()

    def _load(self, batch: LoadedBatch, row: int) -> None:
        place = batch.pixels[row - batch.first]
        read = read_photo(self._path_of(row), self._image_size, self._views, out=place)
        if read.missing:
            self._witnesses.check(row)
        if read.pixels is None:
            place.zero_()
        else:
            batch.decoded.add(row)
        batch.reads[row] = ReadPhoto(None, read.digest, read.error)


@dataclass
class _Loading:
    """A batch that threads are working on."""

    batch: LoadedBatch
    left: set[int]  # rows not finished
    failure: BaseException | None = None


@dataclass(frozen=True)
class _Task:
    """Rows of a batch that one thread loads."""

    loading: _Loading
    rows: Sequence[int]
