"""Chooses between the compiled kernels and PyTorch's operations."""

from __future__ import annotations

import functools
import logging

import torch

from train.step.cuda.compiled_kernels import compile_kernels
from train.step.cuda.kernel_check import check_kernels
from train.step.kernels import Kernels
from train.step.torch_kernels import TorchKernels

_log = logging.getLogger(__name__)


@functools.cache
def kernels_for(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The compiled kernels if they can be compiled and pass their check, else PyTorch's operations.

    dtype: of the products, float32 or bfloat16. A process decides once for each device and dtype.
    """
    if device.type != "cuda":
        return TorchKernels(device, dtype)
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
