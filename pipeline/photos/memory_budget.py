"""A bound on the memory that photos take while they are decoded, shared by all threads.

A photo of 13,000×13,000 takes two gigabytes, an ordinary one a hundredth of that. So threads are
held back by bytes, not by their number.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self

_LEAST_BYTES = 2 << 30
_FILE_BYTES = 1 << 30
_SHARE_OF_MEMORY = 1 / 16  # a machine with many cores has memory for more photos at once


class MemoryBudget:
    """Bytes that threads reserve and give back. A larger reservation waits until no other is left.

    Reservations are granted in the order in which they were asked for, so that a large photo is not
    overtaken for ever. A thread that waits holds nothing of this budget, so threads cannot block
    each other.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._used = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    def reservation(self) -> Reservation:
        """A reservation of no bytes yet. A context manager that gives them back at its end."""
        return Reservation(self)

    def take(self, size: int) -> None:
        """Wait until this many bytes can be had."""
        with self._changed:
            turn = object()
            self._waiting.append(turn)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is turn and self._fits(size))
                self._used += size
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()

    def give_back(self, size: int) -> None:
        with self._changed:
            self._used -= size
            self._changed.notify_all()

    def _fits(self, size: int) -> bool:
        return not self._used or self._used + size <= self.size_bytes


class Reservation:
    """The bytes that one photo has reserved."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._size = 0

    def change(self, size: int) -> None:
        """Give back what is reserved, then wait until this many bytes can be had instead."""
        self._release()
        self._budget.take(size)
        self._size = size

    def _release(self) -> None:
        if self._size:
            self._budget.give_back(self._size)
            self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()


@functools.cache
def pixel_budget() -> MemoryBudget:
    """The budget of this process for photos that are being decoded: a sixteenth of the memory of
    the machine or of the container, and at least two gigabytes.
    """
    return MemoryBudget(max(_LEAST_BYTES, int(_memory_bytes() * _SHARE_OF_MEMORY)))


@functools.cache
def file_budget() -> MemoryBudget:
    """The budget of this process for the bytes of their files.

    It is another one, because the size of a photo is known only once its file is read. A thread
    waits for pixels while it holds a file, and never the other way round.
    """
    return MemoryBudget(_FILE_BYTES)


def _memory_bytes() -> int:
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or one without a limit ("max")
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(sizes)
