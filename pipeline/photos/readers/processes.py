"""Readers that are processes: every core decodes, and Python's lock is not in the way.

They put pixels, or files that a GPU decodes, into shared memory. One thread of this process hands
out tasks and takes answers.
"""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
import threading
from collections import deque
from typing import Any

import torch

from cache.errors import CapError
from pipeline.photos.preprocessing import BILINEAR
from pipeline.photos.readers.memory import BUFFERS, Layout, map_memory
from pipeline.photos.readers.spool import Spool
from pipeline.photos.readers.start import started_readers
from pipeline.photos.readers.task import Buffer, FileInMemory, Loaded, Task
from pipeline.photos.sources.places import Cell, shown

_AHEAD = 2  # tasks that a reader has at once, so that it need not wait for the next
_EXIT_S = 0.2  # how long to wait for the end of the readers, which comes in any case
_REASON_S = 1.0  # how long to wait for the exit code of a reader that has ended


class ReaderError(CapError):
    """Raised when a reader process has ended. The message is one line."""


class ProcessReaders:
    """Implements `Readers`."""

    def __init__(
        self,
        count: int,
        *,
        batch_rows: int,
        image_size: int,
        views: tuple[str, ...],
        pin_memory: bool = False,
        files: bool = False,
        filter: str = BILINEAR,
    ) -> None:
        """pin_memory: whether a GPU copies the pixels. files: whether a task may want the files
        that a GPU can decode. filter: see `preprocess`.
        """
        self._layout = Layout.of(batch_rows, views, image_size, files=files, filter=filter)
        self._pin_memory = pin_memory
        self._count = count
        self._buffers = 0
        self._photos = 0
        self._tasks: deque[Task] = deque()
        self._spool = Spool(self._hand_on)
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._closing = False
        self._failure: BaseException | None = None
        self._pinned: list[int] = []  # addresses
        self._thread = threading.Thread(target=self._run, name="readers", daemon=True)

    def start(self) -> None:
        self._started = started_readers(self._count)
        self._memory = map_memory(self._started.memory, self._layout)
        for connection in self._started.connections:
            connection.send(self._layout)
        self._given: list[deque[Task]] = [deque() for _ in self._started.connections]
        self._thread.start()

    def new_buffer(self) -> Buffer:
        number = self._buffers
        assert number < BUFFERS
        self._buffers += 1
        layout = self._layout
        start = layout.pixels_at(number)
        memory = self._memory[start : start + layout.batch_rows * layout.photo_bytes]
        if self._pin_memory:
            self._pin(memory.ctypes.data, layout.pinned_bytes)
        shape = layout.batch_rows, len(layout.views), layout.image_size, layout.image_size, 3
        return Buffer(number, torch.from_numpy(memory).view(shape).permute(0, 1, 4, 2, 3))

    def submit(self, task: Task) -> None:
        if any(isinstance(photo.path, Cell) for photo in task.wanted):
            self._spool.submit(task)
        else:
            self._hand_on(task)

    def _hand_on(self, task: Task) -> None:
        self._tasks.append(task)
        self._wake_up()

    def photos_heard(self) -> int:
        return self._photos

    def close(self) -> None:
        self._closing = True
        self._spool.close()
        self._wake_up()
        if self._thread.ident is not None:  # else it was never started
            self._thread.join(_EXIT_S)

    def _wake_up(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it has been woken and not looked yet
            self._wake.send(b"x")

    def _run(self) -> None:
        """Hand out tasks and take answers, until `close`. Then end the readers."""
        try:
            self._serve()
        finally:
            self._started.close()
            self._unpin()

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ, None)
            for number, connection in enumerate(self._started.connections):
                selector.register(connection, selectors.EVENT_READ, number)
            while not self._closing:
                for key, _ in selector.select():
                    if key.data is None:
                        self._woken.recv(1 << 16)
                        continue
                    try:
                        self._take_answer(key.data)
                    except (EOFError, OSError):
                        if self._closing:
                            return
                        selector.unregister(key.fileobj)
                        self._fail(key.data)
                self._hand_out()

    def _hand_out(self) -> None:
        if self._failure is not None:
            while self._tasks:
                self._tasks.popleft().finished(self._failure)
            return
        for count in range(_AHEAD):  # idle readers first
            for given, connection in zip(self._given, self._started.connections, strict=True):
                if len(given) > count:
                    continue
                if not self._tasks:
                    return
                task = self._tasks.popleft()
                given.append(task)
                # If the reader has ended, the selector will tell.
                with contextlib.suppress(OSError):
                    connection.send((task.buffer.number, list(map(tuple, task.wanted))))

    def _take_answer(self, number: int) -> None:
        answer: tuple[Any, ...] | Exception = self._started.connections[number].recv()
        if self._failure is not None:
            return  # the task has failed with the others
        task = self._given[number].popleft()
        self._photos += len(task.wanted)
        if isinstance(answer, Exception):
            task.finished(answer)
            return
        digests, errors, missing, decoded, files = answer
        base = self._memory.ctypes.data
        in_memory = {row: FileInMemory(base + at, *more) for row, (at, *more) in files.items()}
        task.finished(Loaded(digests, errors, missing, decoded, in_memory))

    def _fail(self, number: int) -> None:
        """A reader has ended: all that it and the others have to do fails."""
        codes = dict(self._started.ended(_REASON_S))
        path = next((shown(task.wanted[0].path) for task in self._given[number]), "")
        near = f" while it read {path} or one of the next" if path else ""
        self._failure = ReaderError(
            f"a process that reads photos ended ({_reason(codes.get(number))}){near}; "
            "what is done is kept, run the same command again to continue"
        )
        for given in self._given:
            while given:
                given.popleft().finished(self._failure)

    def _pin(self, address: int, size: int) -> None:
        """Tell CUDA of memory that it may copy from on its own, while other work goes on."""
        status = torch.cuda.cudart().cudaHostRegister(address, size, 0)
        if int(status) == 0:  # else copies wait, and are as good
            self._pinned.append(address)

    def _unpin(self) -> None:
        if self._pinned:
            torch.cuda.synchronize()  # copies may be on their way
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop())


def _reason(code: int | None) -> str:
    if code is None:
        return "for an unknown reason"
    if code != -signal.SIGKILL:
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    return "killed, perhaps because memory ran out"
