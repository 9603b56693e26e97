"""Describes the machine of a measurement, without which its figures mean nothing."""

from __future__ import annotations

import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from cache.share import share
from train.device import cpu_features


@dataclass(frozen=True)
class Machine:
    """The hardware and versions behind a benchmark."""

    cpu: str
    cores: int  # that this process may use
    all_cores: int
    memory_gb: float  # that this process may use
    threads: int  # used by PyTorch
    cpu_features: tuple[str, ...]  # from `train.device.cpu_features`
    gpu: str | None
    torch: str
    python: str

    def summary(self) -> str:
        features = f" ({', '.join(self.cpu_features)})" if self.cpu_features else ""
        gpu = f"; {self.gpu}" if self.gpu else ""
        return (
            f"{self.cpu}{features}, {self.cores} of {self.all_cores} cores, "
            f"{self.threads} threads, {self.memory_gb:.0f} GB of memory{gpu}; "
            f"torch {self.torch}, Python {self.python}"
        )


def describe_machine(device: torch.device) -> Machine:
    """The machine as this process sees it, with the GPU's name if `device` is a GPU."""
    found = share()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return Machine(
        cpu=_cpu_name(),
        cores=found.cores,
        all_cores=found.all_cores,
        memory_gb=found.memory_bytes / 1e9,
        threads=torch.get_num_threads(),
        cpu_features=cpu_features(),
        gpu=gpu,
        torch=torch.__version__,
        python=platform.python_version(),
    )


def peak_rss_mb() -> float:
    """The peak memory (resident set size) of this process so far, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
