"""A pool of workers on a cluster of Ray. Everything that knows of Ray is here.

Each worker is an actor. A call of it is a generator of messages that stream back while it works. An
actor that dies is not restarted by Ray but by the job, which alone knows whether its shard has
advanced. Ray is imported when a pool is opened.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from cache.errors import CapError
from cache.share import cores
from pipeline.extraction.distributed.messages import Died, Ended, Here, Message, Settings

if TYPE_CHECKING:
    from pipeline.extraction.distributed.worker import ShardWorker

_CONNECT_S, _PROBE_S = 10.0, 30.0
_MOST_LETTERS = 200  # of a reason
_STORE_BYTES = 512 << 20  # of an instance that is started here; it holds the photos' names
_MOST_CPUS = 8  # of a worker on CPUs, if the user does not say
_PARTS = (*range(_MOST_CPUS, 0, -1), 0.5, 0.25, 0.125)  # of CPUs, if many workers are asked for


class ClusterError(CapError):
    """Raised when the cluster cannot be reached, or has not what is asked for.

    The message is one line.
    """


@dataclass(frozen=True)
class Node:
    """What a machine of the cluster has, used or not."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Ask:
    """What a job asks the cluster for."""

    workers: int
    cpus: float  # of each worker
    gpus: float

    def __str__(self) -> str:
        count = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        gpus = f"{self.gpus:g} GPU{'' if self.gpus == 1 else 's'} and " if self.gpus else ""
        each = "" if self.workers == 1 else " each"
        return f"{count} of {gpus}{self.cpus:g} CPU{'' if self.cpus == 1 else 's'}{each}"


def ask_for(
    nodes: Sequence[Node], *, workers: int | None, gpus: float | None, cpus: float | None
) -> Ask:
    """What to ask a cluster of these nodes for. None: as much as it has.

    gpus, cpus: of each worker. With GPUs, a worker gets its share of the CPUs beside them, which
    read and decode. On CPUs, a worker is as large as the smallest node, up to eight CPUs, or as
    small as `workers` of them need.
    """
    if gpus is None:
        gpus = 1.0 if any(node.gpus >= 1 for node in nodes) else 0.0
    if gpus:
        fit = [node for node in nodes if node.gpus >= gpus]
        shares = [math.floor(node.cpus / math.floor(node.gpus / gpus)) for node in fit]
        cpus = cpus or max(1, min(shares, default=1))
        return Ask(workers or max(1, _slots(nodes, cpus, gpus)), cpus, gpus)
    if cpus is None and workers is None:
        sizes = [math.floor(node.cpus) for node in nodes if node.cpus]  # a head may have none
        cpus = max(1, min([_MOST_CPUS, *sizes]))
    elif cpus is None:
        fitting = (part for part in _PARTS if _slots(nodes, part, 0) >= (workers or 1))
        cpus = next(fitting, 1)
    return Ask(workers or max(1, _slots(nodes, cpus, 0)), cpus, 0.0)


def _slots(nodes: Sequence[Node], cpus: float, gpus: float) -> int:
    """How many workers of this size fit."""
    return sum(
        int(min(node.cpus // cpus, node.gpus // gpus if gpus else math.inf)) for node in nodes
    )


class Actor:
    """What Ray runs: a `ShardWorker` in a process of its own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._worker: ShardWorker | None = None

    def call(self, method: str, arguments: tuple[Any, ...]) -> Iterator[Message]:
        """The messages of a method of the worker; of `place`, before anything heavy is imported."""
        if method == "place":
            yield Here(socket.gethostname(), os.getpid())
            return
        if self._worker is None:
            from train.torch_import import import_torch, share_machine

            share_machine()
            import_torch()
            from pipeline.extraction.distributed.worker import ShardWorker

            self._worker = ShardWorker(self._settings)
        yield from self._worker.call(method, arguments)


class RayPool:
    """Workers on a cluster. `with` connects; its end ends the workers, and what was started here.

    While it is open, what Ray's threads print to stdout is dropped: many lines for each process
    that dies, of which the job has heard already.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._handles: dict[int, Any] = {}
        self._calls: dict[Any, int] = {}  # the worker of each generator that is running
        self._asked: Ask | None = None
        self._settings: Settings | None = None
        self._next = 0
        self._alive_since: dict[int, float] = {}
        self._alive_s = 0.0  # of workers that are gone
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Raises ClusterError."""
        # `auto` and tests: an instance that this process is connected to already is used, and kept.
        self._ray = _imported_ray()
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(_WithoutRay(sys.stdout)))
            if not self._ray.is_initialized():
                self._connect()
                stack.callback(self._shut_down)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._stack:
            for worker in list(self._handles):
                self.end(worker)

    def _connect(self) -> None:
        ray = self._ray
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
        try:
            if self._address != "auto":
                _check_reachable(self._address)
                ray.init(address=self._address, **quiet)
                return
            try:
                ray.init(address="auto", **quiet)
            except ConnectionError:
                if os.environ.get("RAY_ADDRESS"):
                    raise
                ray.init(
                    num_cpus=cores(),
                    include_dashboard=False,
                    object_store_memory=_STORE_BYTES,
                    **quiet,
                )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ClusterError(f"--ray {self._address}: cannot connect ({reason})") from None

    def _shut_down(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # messages that Ray has held back
            self._ray.shutdown()

    def nodes(self) -> list[Node]:
        """The living machines of the cluster."""
        with self._lost_cluster():
            found = self._ray.nodes()
        return [
            Node(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
            for node in found
            if node["Alive"]
        ]

    @contextlib.contextmanager
    def _lost_cluster(self) -> Iterator[None]:
        try:
            yield
        except (self._ray.exceptions.RayError, ConnectionError, RuntimeError) as error:
            raise ClusterError(
                f"--ray {self._address}: the cluster does not answer any more "
                f"({_last_of(str(error))}); what is done is kept, run the same command again"
            ) from None

    def in_words(self) -> str:
        """What the cluster has, and how much of it is free."""
        nodes = self.nodes()
        with self._lost_cluster():
            free = self._ray.available_resources()
        parts = [
            f"{sum(getattr(node, name) for node in nodes):g} {kind}s ({free.get(kind, 0.0):g} free)"
            for kind, name in (("CPU", "cpus"), ("GPU", "gpus"))
        ]
        count = "1 machine" if len(nodes) == 1 else f"{len(nodes)} machines"
        return f"the cluster has {' and '.join(parts)} on {count}"

    def start(self, ask: Ask, settings: Settings) -> list[int]:
        """Ask for workers. Each sends its `Here` when it runs. Returns their numbers."""
        self._asked, self._settings = ask, settings
        return [self.add() for _ in range(ask.workers)]

    def add(self) -> int:
        """Ask for one worker more. Returns its number."""
        assert self._asked is not None
        number, self._next = self._next, self._next + 1
        actor = self._ray.remote(Actor).options(
            num_cpus=self._asked.cpus,
            num_gpus=self._asked.gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )
        self._handles[number] = actor.remote(self._settings)
        self.call(number, "place")
        return number

    def call(self, worker: int, method: str, *arguments: object) -> None:
        """Let a worker do something. Its messages come from `wait`, the last one is `Ended`."""
        handle = self._handles[worker]
        stream = handle.call.options(num_returns="streaming").remote(method, arguments)
        self._calls[stream] = worker

    def wait(self, timeout_s: float) -> list[tuple[int, Message]]:
        """The messages that have come, after some time none. A dead worker is no longer in the
        pool.
        """
        ray = self._ray
        if not self._calls:
            time.sleep(timeout_s)
            return []
        streams = list(self._calls)
        with self._lost_cluster():
            ready, _ = ray.wait(streams, num_returns=len(streams), timeout=0, fetch_local=False)
            if not ready:
                ready, _ = ray.wait(streams, timeout=timeout_s, fetch_local=False)
        found: list[tuple[int, Message]] = []
        for stream in ready:
            worker = self._calls[stream]
            try:
                message: Message = ray.get(next(stream))
            except StopIteration:
                del self._calls[stream]
                message = Ended()
            except ray.exceptions.RayTaskError as error:
                self.end(worker)
                message = Died(_last_of(str(error)))
            except ray.exceptions.RayError as error:
                self.end(worker)
                message = Died(_reason(error))
            if isinstance(message, Here):
                self._alive_since[worker] = time.monotonic()
            found.append((worker, message))
        return found

    def end(self, worker: int) -> None:
        """End a worker at once."""
        handle = self._handles.pop(worker, None)
        if handle is None:
            return
        for stream in [stream for stream, owner in self._calls.items() if owner == worker]:
            del self._calls[stream]
        if worker in self._alive_since:
            self._alive_s += time.monotonic() - self._alive_since.pop(worker)
        with contextlib.suppress(Exception):  # it is dead already, or the cluster is gone
            self._ray.kill(handle)

    def worker_seconds(self) -> float:
        """For how long workers have run, all together."""
        now = time.monotonic()
        return self._alive_s + sum(now - since for since in self._alive_since.values())


class _WithoutRay(io.TextIOBase):
    """A stream without what Ray's threads write to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if not threading.current_thread().name.startswith("ray_"):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


def _imported_ray() -> Any:
    """Ray, which reports nothing to anybody. Raises ClusterError if it is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ClusterError("--ray needs Ray: pip install 'cap[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's default of today, said because Ray warns of another one to come.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    return ray


def _check_reachable(address: str) -> None:
    """Raise ClusterError if nobody listens at HOST:PORT. Ray itself would wait much longer."""
    host, colon, port = address.rpartition(":")
    if "://" in address:
        raise ClusterError(
            f"--ray {address}: is not HOST:PORT; run this command on a machine of the cluster, for "
            "example by `ray job submit`"
        )
    if not colon or not port.isdigit():
        raise ClusterError(f"--ray {address}: is neither auto nor HOST:PORT, as in 10.0.0.5:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ClusterError(f"--ray {address}: nobody answers there ({reason})") from None
    # Where something else answers, Ray would wait for two minutes and write about it to stderr. A
    # process of its own can be stopped.
    code = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False, logging_level='CRITICAL')"
    try:
        probe = subprocess.run(
            [sys.executable, "-P", "-c", code, address],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ClusterError(
            f"--ray {address}: what answers there is no cluster of Ray, or does not answer within "
            f"{_PROBE_S:g} s"
        ) from None
    if probe.returncode:
        raise ClusterError(f"--ray {address}: cannot connect ({_last_of(probe.stderr)})")


def _reason(error: Exception) -> str:
    """Why a worker is gone, on one line, from Ray's many."""
    kind, text = type(error).__name__, str(error)
    if kind == "OutOfMemoryError":
        return "its machine ran out of memory"
    if kind == "NodeDiedError" or "node was terminated" in text:
        return "its machine is gone"
    if kind == "ActorUnavailableError":
        return "it does not answer any more"
    if "creation task" in text:  # as where this package is not installed
        return _last_of(str(error))
    _, found, rest = text.partition("The actor is dead because ")
    if found:
        text = rest.partition(". Some common causes")[0]
    return " ".join(text.split())[:_MOST_LETTERS] or kind


def _last_of(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:_MOST_LETTERS] if lines else "it does not say why"
