"""The peak of memory of a process and its children, on the host and on a GPU, watched from here."""

from __future__ import annotations

import threading
from collections import defaultdict
from pathlib import Path

import torch

_INTERVAL_S = 0.1
_PROC = Path("/proc")


class PeakMemory:
    """Watches a process and all its children while the `with` block runs, from `watch` on.

    device: where its memory on a GPU is looked at, if that is a GPU, as the difference from what
    was in use before the `with` block.
    """

    def __init__(self, device: torch.device) -> None:
        self._pid, self._device = 0, device
        self._gpu_before = self._gpu_used()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.host_mb = 0.0  # 10^6 bytes
        self.gpu_mb: float | None = 0.0 if device.type == "cuda" else None

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def watch(self, pid: int) -> None:
        self._pid = pid

    def _watch(self) -> None:
        while True:
            if self._pid:
                self.host_mb = max(self.host_mb, tree_memory_mb(self._pid))
            if self.gpu_mb is not None:
                self.gpu_mb = max(self.gpu_mb, (self._gpu_used() - self._gpu_before) / 1e6)
            if self._done.wait(_INTERVAL_S):
                return

    def _gpu_used(self) -> int:
        if self._device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free


def tree_memory_mb(pid: int) -> float:
    """The memory of a process and all its children now, in MB (10^6 bytes); 0 if it has ended.

    The memory of each process's own is added up. Of shared memory and mapped files only the
    process with the most counts, since the others map the same. Asking the kernel for shares (PSS)
    would hold up the processes that are measured.
    """
    children = defaultdict(list)
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            children[_field(entry, "PPid")].append(int(entry.name))
    own = shared = files = 0
    pending = [pid]
    while pending:
        process = pending.pop()
        pending += children[process]
        folder = _PROC / str(process)
        own += _field(folder, "RssAnon")
        shared = max(shared, _field(folder, "RssShmem"))
        files = max(files, _field(folder, "RssFile"))
    return (own + shared + files) * 1024 / 1e6


def _field(process: Path, name: str) -> int:
    """A number of a process's status; 0 if the process has ended."""
    try:
        for line in (process / "status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0
