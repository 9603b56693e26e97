"""Remote photos are asked for ahead of their decoding, several at once.

Photos that lie side by side in one container are one request.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple, TypeVar

from pipeline.photos.sources.places import Part, Place, StoredObject, address_of
from pipeline.photos.sources.remote import fetch

T = TypeVar("T")

_REQUESTS = 16  # at once, of one process
_MOST_BYTES = 128 << 20  # asked for ahead, of one process
_GAP_BYTES = 64 << 10  # between photos of one request
_REQUEST_BYTES = 16 << 20


class _Span(NamedTuple):
    """Bytes that one request brings."""

    address: str
    start: int | None  # None: the whole object
    size: int


class DaemonThreads:
    """Threads that do what they are given, a few things at once. They keep no process alive, as
    those of `concurrent.futures` do: a request may hang.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._threads = 0

    def submit(self, do: Callable[[], T]) -> Future[T]:
        """A future of what `do` returns or raises."""
        future: Future[T] = Future()
        self._tasks.put(partial(_run, do, future))
        with self._lock:
            if self._threads < self._most:
                self._threads += 1
                threading.Thread(target=self._work, name="requests", daemon=True).start()
        return future

    def end(self) -> None:
        """Let the threads end once they have nothing to do."""
        for _ in range(self._threads):
            self._tasks.put(_end)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not _end:
            task()


def _end() -> None:
    """Ends a thread that gets it."""


def _run(do: Callable[[], T], future: Future[T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(do())
    except BaseException as error:  # for whoever waits
        future.set_exception(error)


class Ahead:
    """Fetches photos before they are wanted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = DaemonThreads(_REQUESTS)
        self._bytes = 0

    def begin(self, places: Sequence[Place]) -> Fetched | None:
        """Ask for photos; None if none of them is remote, or too much was asked for already."""
        remote = [p for p in places if isinstance(p, (Part, StoredObject)) and address_of(p)]
        if not remote:
            return None
        size = sum(max(0, place.size) for place in remote)
        with self._lock:
            if self._bytes and self._bytes + size > _MOST_BYTES:
                return None
            self._bytes += size
        fetched = Fetched(self, size)
        for span, within in _spans(remote):
            future = self._threads.submit(partial(fetch, *span))
            for place in within:
                fetched.add(place, future, span)
        return fetched

    def given_back(self, size: int) -> None:
        with self._lock:
            self._bytes -= size


class Fetched:
    """Photos that were asked for. Whoever has taken what he wants closes it."""

    def __init__(self, ahead: Ahead, size: int) -> None:
        self._ahead, self._size = ahead, size
        self._futures: dict[Place, tuple[Future[bytes], _Span]] = {}

    def add(self, place: Place, future: Future[bytes], span: _Span) -> None:
        self._futures[place] = future, span

    def take(self, place: Place) -> bytes | None:
        """The bytes of a photo, once they are there; None if it was not asked for. Raises what
        `fetch` raises.
        """
        found = self._futures.pop(place, None)
        if found is None:
            return None
        future, span = found
        data = future.result()
        if not isinstance(place, Part) or (span.start, span.size) == (place.start, place.size):
            return data
        assert span.start is not None
        begin = place.start - span.start
        return data[begin : begin + place.size]

    def close(self) -> None:
        for future, _ in self._futures.values():
            future.cancel()
        self._futures.clear()
        self._ahead.given_back(self._size)
        self._size = 0


def _spans(places: Sequence[Part | StoredObject]) -> list[tuple[_Span, list[Place]]]:
    """Requests that bring these photos, with the photos of each."""
    found: list[tuple[_Span, list[Place]]] = []
    parts = [place for place in places if isinstance(place, Part)]
    for part in sorted(set(parts), key=lambda part: (part.container, part.start)):
        if found and found[-1][0].address == part.container:
            span, within = found[-1]
            assert span.start is not None
            size = max(span.size, part.start + part.size - span.start)
            gap = part.start - span.start - span.size
            if gap <= _GAP_BYTES and size <= _REQUEST_BYTES:
                found[-1] = span._replace(size=size), [*within, part]
                continue
        found.append((_Span(part.container, part.start, part.size), [part]))
    objects = [place for place in dict.fromkeys(places) if isinstance(place, StoredObject)]
    return found + [(_Span(each.address, None, each.size), [each]) for each in objects]
