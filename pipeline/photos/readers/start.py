"""Starting reader processes. Imports little, so that they can start before torch is imported."""

from __future__ import annotations

import contextlib
import glob
import os
import subprocess
import sys
import tempfile
from multiprocessing import Pipe

from cache.share import cores

_EXIT_S = 0.3  # how long the readers' server may take to end them

# Threads share Python's lock. Up to this many decode as fast as processes, real photos of COCO.
MOST_THREADS = 4

# Started before it was known what they will read.
_spare: list[StartedReaders] = []


def reader_count(workers: int | None, device: str = "cpu") -> int:
    """`workers`, or else one reader per core that this process may use.

    device: the type of the encoder's. One core in eight is left to what feeds a GPU.
    """
    if workers:
        return workers
    usable = cores()
    return usable - usable // 8 if device == "cuda" else usable


def uses_processes(readers: int, device: str) -> bool:
    """Whether readers are processes. They cost a second import of torch, beside the first one.

    device: the type of the encoder's. A GPU waits for photos, a CPU seldom.
    """
    return device == "cuda" or readers > MOST_THREADS


class StartedReaders:
    """Reader processes that wait for their layout (`memory.Layout`) and then for tasks."""

    def __init__(self, count: int) -> None:
        self.memory = _make_memory()
        self.control, control = Pipe()
        pairs = [Pipe() for _ in range(count)]
        self.connections = [ours for ours, _ in pairs]
        theirs = [control, *(theirs for _, theirs in pairs)]
        numbers = [control.fileno(), self.memory, *(pipe.fileno() for pipe in theirs[1:])]
        self._process = _start_server(numbers)
        for pipe in theirs:  # so that reading fails once the other process has ended
            pipe.close()

    def ended(self, wait_s: float) -> list[tuple[int, int]]:
        """(number, exit code) of readers that have ended, if that is known within `wait_s`."""
        found: list[tuple[int, int]] = []
        try:
            while self.control.poll(0 if found else wait_s):
                found.append(self.control.recv())
        except (EOFError, OSError):  # the server has ended, with all of them
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(_EXIT_S)
                found = [(number, code) for number in range(len(self.connections))]
        return found

    def close(self) -> None:
        """End the processes, also those that hang in a dead drive."""
        for connection in (*self.connections, self.control):
            connection.close()
        os.close(self.memory)
        try:
            self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:  # it is still importing
            self._process.kill()
            self._process.wait()


def start_early(workers: int | None, device: str) -> None:
    """Start the reader processes that an extraction will use, as far as that can be told already.

    device: as the user names it. Several GPUs have readers of their own.
    """
    gpus = len(glob.glob("/dev/nvidia[0-9]*")) if device in ("auto", "cuda") else 1
    kind = "cuda" if device.startswith("cuda") or (device == "auto" and gpus) else "cpu"
    count = reader_count(workers, kind)
    if uses_processes(count, kind) and gpus <= 1 and "," not in device:
        _spare.append(StartedReaders(count))


def started_readers(count: int) -> StartedReaders:
    """Reader processes: those that were started early, if they are as many, else new ones."""
    while _spare:
        spare = _spare.pop()
        if len(spare.connections) == count:
            return spare
        spare.close()
    return StartedReaders(count)


def end_spare_readers() -> None:
    """End the processes that were started early and not used."""
    while _spare:
        _spare.pop().close()


def _make_memory() -> int:
    """The descriptor of shared memory without a name and of no size yet."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("cap photos", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _start_server(numbers: list[int]) -> subprocess.Popen[bytes]:
    """Start `server.main` with these descriptors.

    It is a fresh interpreter, because neither CUDA nor a BLAS with threads survives a fork. It has
    a session of its own, because a terminal sends Ctrl-C to every process of its session. It
    imports the same modules as this process. Its libraries start no threads, which a fork would not
    survive either.
    """
    path = list(map(os.path.abspath, sys.path))
    code = (
        f"import sys; sys.path[:] = {path}; from pipeline.photos.readers.server import main; main()"
    )
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code, ",".join(map(str, numbers))],
        pass_fds=numbers,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=os.environ | threads,
        start_new_session=True,
    )
