"""Naming a device."""

from __future__ import annotations

import torch

from cache.errors import CapError


class DeviceError(CapError):
    """A device is unknown or absent. One line."""


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:1` → a device that works here. Raises DeviceError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"no device {name!r}; there are auto, cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {name!r} is not supported; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"no device {name}; this machine has {torch.cuda.device_count()} GPUs")
    return device


def cpu_features() -> tuple[str, ...]:
    """The instruction sets of this CPU that PyTorch's kernels look for, as in avx2, amx_bf16."""
    has = torch.cpu.get_capabilities().get
    features = {
        "avx2": has("avx2"),
        "avx512": all(has(f"avx512_{part}") for part in ("f", "vl", "bw", "dq")),
        "avx512_bf16": has("avx512_bf16"),
        "amx_bf16": has("amx_bf16"),
    }
    return tuple(name for name, present in features.items() if present)


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpu_features())


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch, on any device, found no memory for a tensor."""
    signs = ("not enough memory", "can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def resolve_devices(names: str) -> list[torch.device]:
    """Like `resolve_device`, for work that several devices can share.

    `cuda`, or `auto` where there is one, is every GPU; `cuda:0,cuda:2` are these. All are of one
    kind. Raises DeviceError.
    """
    devices = [resolve_device(name.strip()) for name in names.split(",")]
    if len({device.type for device in devices}) > 1:
        raise DeviceError(f"devices {names!r} are of two kinds; use CPUs or GPUs")
    if len(devices) == 1 and devices[0].type == "cuda" and devices[0].index is None:
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return devices
