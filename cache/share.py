"""The share of a machine that this process may use: cores and memory.

A container with 2 of 64 cores sees 64. What it may use is in its cgroups, of version 1 or 2, and in
its affinity mask. Whoever starts threads or processes, or sizes a buffer, asks here.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/")


@dataclass(frozen=True)
class Share:
    """What a process may use, and what the machine has."""

    cores: int
    all_cores: int
    memory_bytes: int
    all_memory_bytes: int

    def __str__(self) -> str:
        gigabytes = [size / 1e9 for size in (self.memory_bytes, self.all_memory_bytes)]
        return (
            f"{self.cores} of {self.all_cores} cores and {gigabytes[0]:.1f} of "
            f"{gigabytes[1]:.1f} GB of memory"
        )


def share() -> Share:
    """The share of this process as it is now."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Share(
        cores=cores(),
        all_cores=os.cpu_count() or 1,
        memory_bytes=memory_bytes(),
        all_memory_bytes=memory,
    )


def cores(root: Path = _ROOT) -> int:
    """The cores that this process may use, at least 1: those of its affinity mask, or fewer if a
    quota of a cgroup is less. A part of a core counts as a whole one.

    root: the root of the file system, for tests.
    """
    return max(1, math.ceil(min(cores_in_mask(), _quota(root))))


def cores_in_mask() -> int:
    """The cores of the affinity mask, or of the machine where there is none."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    return (os.cpu_count() or 1) if affinity is None else len(affinity(0))


def memory_bytes(root: Path = _ROOT) -> int:
    """The memory of the machine, or of the cgroup if that has less."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for folder in _folders(root, "memory"):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # no such file, or no limit: "max"
                sizes.append(int((folder / name).read_text()))
    return min(size for size in sizes if size > 0)


def _quota(root: Path) -> float:
    """The least quota of cores of this process's cgroups and of those above them."""
    quotas = [math.inf]
    for folder in _folders(root, "cpu"):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (folder / "cpu.max").read_text().split()  # of version 2
            quotas.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            microseconds = int((folder / "cpu.cfs_quota_us").read_text())  # of version 1
            period_us = int((folder / "cpu.cfs_period_us").read_text())
            quotas.append(microseconds / period_us if microseconds > 0 else math.inf)
    return min(quotas)


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's cgroups with a controller, each with all above it.

    Where a container has a view of its own, its cgroup is at the top of what it sees.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    top = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            mounts = [top, top / "unified"]
        elif controller in controllers.split(","):
            mounts = [top / controllers, top / controller]
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in mounts:
            for length in range(len(parts), -1, -1):
                yield mount.joinpath(*parts[:length])
