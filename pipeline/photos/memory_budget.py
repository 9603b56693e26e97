"""A bound on the memory that photos take while they are decoded, shared by all readers.

A photo of 13,000×13,000 takes two gigabytes, an ordinary one a hundredth of that. So readers are
held back by bytes, not by their number.
"""

from __future__ import annotations

import functools
import multiprocessing
import threading
from collections.abc import Callable, MutableSequence
from types import TracebackType
from typing import Protocol, Self

from cache.share import memory_bytes

_LEAST_BYTES = 2 << 30
_FILE_BYTES = 1 << 30
_FREE_SHARE = 1 / 64  # of a budget that processes share
_SHARE_OF_MEMORY = 1 / 16  # a machine with many cores has memory for more photos at once

# The state of a budget: bytes in use, and as at a counter the next number to be drawn and the one
# that is served.
_USED, _NEXT, _SERVED = range(3)


class _Condition(Protocol):
    """What a budget needs of `threading.Condition` and `multiprocessing.Condition`."""

    def __enter__(self) -> bool: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...
    def wait_for(self, predicate: Callable[[], bool]) -> bool: ...
    def notify_all(self) -> None: ...


class MemoryBudget:
    """Bytes that readers reserve and give back. A larger reservation waits until no other is left.

    Reservations are granted in the order in which they were asked for, so that a large photo is not
    overtaken for ever. A reader that waits holds nothing of this budget, so readers cannot block
    each other.
    """

    def __init__(
        self,
        size_bytes: int,
        changed: _Condition | None = None,
        state: MutableSequence[int] | None = None,
        free_bytes: int = 0,
    ) -> None:
        """changed, state (three zeros): shared ones, for a budget of several processes. free_bytes:
        reservations of no more than this are free, because asking takes time.
        """
        self.size_bytes, self.free_bytes = size_bytes, free_bytes
        self._changed = threading.Condition() if changed is None else changed
        self._state = [0, 0, 0] if state is None else state
        self._left: set[int] = set()  # numbers whose threads were interrupted while they waited

    def reservation(self) -> Reservation:
        """A reservation of no bytes yet. A context manager that gives them back at its end."""
        return Reservation(self)

    def take(self, size: int) -> None:
        """Wait until this many bytes can be had."""
        state = self._state
        with self._changed:
            number = state[_NEXT]
            state[_NEXT] += 1
            try:
                self._changed.wait_for(lambda: state[_SERVED] == number and self._fits(size))
                state[_USED] += size
            finally:
                self._left.add(number)
                while state[_SERVED] in self._left:
                    self._left.remove(state[_SERVED])
                    state[_SERVED] += 1
                self._changed.notify_all()

    def give_back(self, size: int) -> None:
        with self._changed:
            self._state[_USED] -= size
            self._changed.notify_all()

    @property
    def used_bytes(self) -> int:
        return self._state[_USED]

    @property
    def waiting(self) -> int:
        """How many reservations are being waited for."""
        return self._state[_NEXT] - self._state[_SERVED]

    def _fits(self, size: int) -> bool:
        used = self._state[_USED]
        return not used or used + size <= self.size_bytes


class Reservation:
    """The bytes that one photo has reserved."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._size = 0

    def change(self, size: int) -> None:
        """Give back what is reserved, then wait until this many bytes can be had instead."""
        self._release()
        if size > self._budget.free_bytes:
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


_shared: dict[str, MemoryBudget] = {}


def share_budgets() -> None:
    """From here on this process and those that are forked from it have one budget of each kind."""
    fork = multiprocessing.get_context("fork")
    for name, size in (("pixels", _pixel_bytes()), ("files", _FILE_BYTES)):
        free = int(size * _FREE_SHARE)
        _shared[name] = MemoryBudget(size, fork.Condition(), fork.RawArray("q", 3), free)


def pixel_budget() -> MemoryBudget:
    """The budget for photos that are being decoded: a sixteenth of the memory of the machine or of
    the container, and at least two gigabytes.
    """
    return _shared.get("pixels") or _own_budgets()[0]


def file_budget() -> MemoryBudget:
    """The budget for the bytes of their files.

    It is another one, because the size of a photo is known only once its file is read. A reader
    waits for pixels while it holds a file, and never the other way round.
    """
    return _shared.get("files") or _own_budgets()[1]


@functools.cache
def _own_budgets() -> tuple[MemoryBudget, MemoryBudget]:
    return MemoryBudget(_pixel_bytes()), MemoryBudget(_FILE_BYTES)


def _pixel_bytes() -> int:
    return max(_LEAST_BYTES, int(memory_bytes() * _SHARE_OF_MEMORY))
