"""Devices: their names, what they are good at, and when they are out of memory."""

from __future__ import annotations

import torch

from cache.errors import CapError


class DeviceError(CapError):
    """Raised when a device is unknown or absent. The message is one line."""


def resolve_device(name: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or e.g. `cuda:1`. Raises DeviceError if it is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"no device {name!r}; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {name!r} is not supported; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"no device {name}; this machine has {torch.cuda.device_count()} GPUs")
    return device


def cpu_features() -> tuple[str, ...]:
    """The instruction sets of this CPU that PyTorch's kernels use, for example avx2, amx_bf16."""
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch found no memory for a tensor, on any device, or NumPy for an array."""
    phrases = ("not enough memory", "can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)
    )


def resolve_devices(names: str) -> list[torch.device]:
    """The devices for work that several devices can share.

    `cuda` means every GPU, and so does `auto` where there is a GPU; `cuda:0,cuda:2` means these
    two. All must be of one kind. Raises DeviceError.
    """
    devices = [resolve_device(name.strip()) for name in names.split(",")]
    if len({device.type for device in devices}) > 1:
        raise DeviceError(f"devices {names!r} are of two kinds; use CPUs or GPUs")
    if len(devices) == 1 and devices[0].type == "cuda" and devices[0].index is None:
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return devices
