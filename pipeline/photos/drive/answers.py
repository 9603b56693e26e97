"""Asking a disk that may not answer, as a network drive whose server is gone."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from pipeline.photos.drive.silence import STALL_S, StalledError

T = TypeVar("T")


class _Asked(Generic[T]):
    """A call in a thread of its own, which a dead drive may keep for ever."""

    def __init__(self, ask: Callable[[], T]) -> None:
        self._ask = ask
        self._answer: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()
        # A daemon, because it must not keep the process alive.
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._answer.put(self._ask())
        except BaseException as error:  # for the caller
            self._answer.put(error)

    def wait(self, stall_s: float | None) -> T:
        answer = self._answer.get(timeout=stall_s)
        if isinstance(answer, BaseException):
            raise answer
        return answer


def answer_of(ask: Callable[[], T]) -> T:
    """What `ask` returns or raises. Ctrl-C ends the waiting, even if the system call goes on."""
    return _Asked(ask).wait(None)


def prompt_answer_of(ask: Callable[[], T], name: str, stall_s: float = STALL_S) -> T:
    """Like `answer_of`, for what takes a moment. name: what is asked for, for the error message.

    Raises StalledError if there is no answer within `stall_s` seconds.
    """
    try:
        return _Asked(ask).wait(stall_s)
    except queue.Empty:
        raise StalledError(
            f"{name}: no answer from the disk for {stall_s:.0f} s; see whether the drive is "
            "connected, then run the same command again"
        ) from None
