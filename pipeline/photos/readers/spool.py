"""Photos of Parquet files for readers that are processes.

A row group is read as a whole. If every reader read it, a machine would read each file as often as
it has cores, and hold as many row groups. So one thread of the main process reads, and leaves the
photos in memory that the readers map: to them they are parts of a file.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import threading
from collections.abc import Callable

from pipeline.photos.readers.task import Task, Wanted
from pipeline.photos.sources.places import Cell, Part
from pipeline.photos.sources.reading import bytes_of


class Spool:
    """Leaves the photos of tasks in memory and hands the tasks on, in their order."""

    def __init__(self, hand_on: Callable[[Task], None]) -> None:
        self._hand_on = hand_on
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._rooms: dict[int, _Room] = {}  # by number of the buffer

    def submit(self, task: Task) -> None:
        if self._thread is None:
            # A daemon, because a drive or a network may hang.
            self._thread = threading.Thread(target=self._run, name="spool", daemon=True)
            self._thread.start()
        self._tasks.put(task)

    def close(self) -> None:
        self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                wanted = [self._kept(task.buffer.number, photo) for photo in task.wanted]
            except BaseException as error:  # the caller raises it
                task.finished(error)
            else:
                self._hand_on(dataclasses.replace(task, wanted=wanted))
        for room in self._rooms.values():
            os.close(room.number)

    def _kept(self, buffer: int, wanted: Wanted) -> Wanted:
        cell = wanted.path
        if not isinstance(cell, Cell):
            return wanted
        data = bytes_of(cell)
        if not data:  # the reader says so
            return wanted
        room = self._rooms.setdefault(buffer, _Room())
        start = room.write(wanted.row - wanted.place, data)
        path = f"/proc/{os.getpid()}/fd/{room.number}"
        return wanted._replace(path=Part(path, cell.name, start, len(data)))


class _Room:
    """Memory without a name for the photos of one buffer."""

    def __init__(self) -> None:
        self.number = os.memfd_create("cap rows", os.MFD_CLOEXEC)
        self._batch = -1
        self._end = 0

    def write(self, batch: int, data: bytes) -> int:
        """Where the data are from now on. batch: another one than before frees its room, because
        the buffer is used again only when everybody is done with it.
        """
        if batch != self._batch:
            os.truncate(self.number, 0)
            self._batch, self._end = batch, 0
        start, view = self._end, memoryview(data)
        while view:
            written = os.pwrite(self.number, view, self._end)
            self._end += written
            view = view[written:]
        return start
