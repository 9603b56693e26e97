"""Chooses between the compiled kernels and PyTorch's operations."""

from __future__ import annotations

import functools
import logging
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from train.step.cuda.compiled_kernels import compile_kernels
from train.step.cuda.kernel_check import check_kernels
from train.step.kernels import Kernels
from train.step.torch_kernels import TorchKernels

_log = logging.getLogger(__name__)


def begin_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Let a thread compile and check the kernels that `kernels_for` will return.

    This takes some tenths of a second, most of it without Python's lock. Does nothing on a CPU.
    """
    if device.type == "cuda":
        _begun(_with_index(device), dtype)


def kernels_for(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The compiled kernels if they can be compiled and pass their check, else PyTorch's operations.

    dtype: of the products, float32 or bfloat16. A process decides once for each device and dtype.
    """
    if device.type != "cuda":
        return TorchKernels(device, dtype)
    return _begun(_with_index(device), dtype).result()


@functools.cache
def _begun(device: torch.device, dtype: torch.dtype) -> Future[Kernels]:
    executor = ThreadPoolExecutor(1)
    begun = executor.submit(_choose, device, dtype)
    executor.shutdown(wait=False)
    return begun


def _with_index(device: torch.device) -> torch.device:
    """`cuda` means the current device."""
    if device.index is not None:
        return device
    return torch.device(device.type, torch.cuda.current_device())


def _choose(device: torch.device, dtype: torch.dtype) -> Kernels:
    try:
        compiled = compile_kernels(device, dtype)
        check_kernels(compiled, device, dtype)
    except (RuntimeError, OSError, AttributeError) as error:
        _log.warning(
            "%s: training with PyTorch's operations, slower than compiled kernels (%s)",
            device, error,
        )  # fmt: skip
        return TorchKernels(device, dtype)
    return compiled
