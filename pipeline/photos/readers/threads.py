"""Readers that are threads of this process.

Most of the work is done in libraries that release Python's lock (file reads, BLAKE2b,
libjpeg-turbo, torch's resize). Up to four threads scale with the cores; more wait for the lock.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time

from pipeline.photos.photo_file import read_photo
from pipeline.photos.preprocessing import BILINEAR, empty_pixels
from pipeline.photos.readers.task import Buffer, Loaded, Task, note
from pipeline.photos.sources.ahead import Fetched
from pipeline.photos.sources.reading import begin_reading

_EXIT_S = 0.5  # how long threads that were asked to end may take


class ThreadReaders:
    """Implements `Readers`. They leave no file in memory: every photo is decoded."""

    def __init__(
        self,
        count: int,
        *,
        batch_rows: int,
        image_size: int,
        views: tuple[str, ...],
        pin_memory: bool = False,
        filter: str = BILINEAR,
    ) -> None:
        self._batch_rows, self._image_size, self._views = batch_rows, image_size, views
        self._pin_memory, self._filter = pin_memory, filter
        self._tasks: queue.SimpleQueue[tuple[Task, Fetched | None] | None] = queue.SimpleQueue()
        self._photos = 0  # a few may go uncounted when threads count at once
        self._buffers = 0
        self._stopped = False
        # Daemons, because a thread that hangs in a dead network drive must not keep the process
        # alive.
        self._threads = [
            threading.Thread(target=self._work, name=f"photos-{number}", daemon=True)
            for number in range(count)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def new_buffer(self) -> Buffer:
        shape = self._batch_rows, len(self._views)
        pixels = empty_pixels(shape[0] * shape[1], self._image_size, pin_memory=self._pin_memory)
        self._buffers += 1
        return Buffer(self._buffers - 1, pixels.unflatten(0, shape))

    def submit(self, task: Task) -> None:
        # Already now, so that many requests are on their way while few photos are decoded.
        self._tasks.put((task, begin_reading([photo.path for photo in task.wanted])))

    def photos_heard(self) -> int:
        return self._photos

    def close(self) -> None:
        self._stopped = True
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + _EXIT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(queue.Empty):
            while True:
                given = self._tasks.get_nowait()
                if given is not None and given[1] is not None:
                    given[1].close()  # what was asked for and is not wanted any more

    def _work(self) -> None:
        while not self._stopped and (given := self._tasks.get()) is not None:
            task, fetched = given
            try:
                loaded = self._load(task, fetched)
            except BaseException as error:  # no fault of the photo: the caller raises it
                task.finished(error)
            else:
                task.finished(loaded)
            finally:
                if fetched is not None:
                    fetched.close()

    def _load(self, task: Task, fetched: Fetched | None) -> Loaded:
        loaded = Loaded(b"", {}, [], [], {})
        digests = []
        for wanted in task.wanted:
            if self._stopped:
                break
            place = task.buffer.pixels[wanted.place]
            read = read_photo(
                wanted.path, self._image_size, self._views, place, self._filter, fetched
            )
            digests.append(read.digest.tobytes())
            note(loaded, wanted.row, read)
            if read.pixels is None:
                place.zero_()
            self._photos += 1
        return loaded._replace(digests=b"".join(digests))
