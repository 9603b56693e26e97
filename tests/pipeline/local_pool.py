"""A pool of workers in this process, in the place of a cluster: what a job decides, without Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Self

from pipeline.extraction.distributed.messages import (
    Died,
    Ended,
    Failed,
    Here,
    Message,
    Settings,
    ShardTask,
)
from pipeline.extraction.distributed.pool import Ask, Node
from pipeline.extraction.distributed.worker import ShardWorker

# Sees each message before the job does, with the worker and its shard, and may return another one.
Fault = Callable[[int, int, Message], Message]


HERE = Here("here", 1)


class LocalPool:
    """Each `wait` takes one message from each worker, in turn."""

    def __init__(self, fault: Fault = lambda worker, shard, message: message) -> None:
        self.fault = fault
        self.starts: Callable[[int], bool] = lambda worker: True  # whether a worker starts at all
        self.calls: list[tuple[int, str, int]] = []  # (worker, method, shard)
        self.added = 0
        self._workers: dict[int, ShardWorker] = {}
        self._running: dict[int, tuple[int, Iterator[Message]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in list(self._workers):
            self.end(worker)

    def nodes(self) -> list[Node]:
        return [Node(2, 0)]

    def in_words(self) -> str:
        return "the cluster has 2 CPUs"

    def start(self, ask: Ask, settings: Settings) -> list[int]:
        self._settings = settings
        return [self.add() for _ in range(ask.workers)]

    def add(self) -> int:
        number, self.added = self.added, self.added + 1
        self._workers[number] = ShardWorker(self._settings)
        if self.starts(number):
            self.call(number, "place")
        return number

    def call(self, worker: int, method: str, *arguments: object) -> None:
        task = arguments[0] if arguments else None
        shard = task.shard.number if isinstance(task, ShardTask) else 0
        self.calls.append((worker, method, shard))
        messages = self._workers[worker].call(method, arguments)
        self._running[worker] = shard, iter([HERE]) if method == "place" else messages

    def wait(self, timeout_s: float) -> list[tuple[int, Message]]:
        if not self._running:
            time.sleep(min(timeout_s, 0.02))
        found: list[tuple[int, Message]] = []
        for worker, (shard, stream) in list(self._running.items()):
            message = next(stream, None)
            if message is None:
                del self._running[worker]
                message = Ended()
            message = self.fault(worker, shard, message)
            if isinstance(message, Died):
                self.end(worker)
            elif isinstance(message, Failed) and worker in self._running:
                self._running[worker] = shard, iter(())  # it has no more to say
            found.append((worker, message))
        return found

    def end(self, worker: int) -> None:
        if worker in self._running:
            close = getattr(self._running.pop(worker)[1], "close", None)
            if close is not None:
                close()
        self._workers.pop(worker, None)

    def worker_seconds(self) -> float:
        return 1800.0
