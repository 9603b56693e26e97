"""Run by test_cuda_launch.py with a `libcuda.so.1` that runs the kernels on the CPU: checks them
when cuda-bindings loads and launches them.
"""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace
from typing import Any

import torch

from train.step.cuda.compiled_kernels import NAMES, CompiledKernels
from train.step.cuda.kernel_check import check_kernels
from train.step.cuda.launch import KernelError, load_functions
from train.step.torch_kernels import TorchKernels

CPU = torch.device("cpu")


def main(dtype: torch.dtype) -> None:
    pretended: Any = torch.cuda
    pretended.device = contextlib.nullcontext
    pretended.current_stream = lambda device: SimpleNamespace(cuda_stream=0x7F0000000010)
    kernels = CompiledKernels(load_functions(b"code", NAMES, CPU))
    kernels.product = TorchKernels(CPU, dtype).product  # type: ignore[method-assign]
    check_kernels(kernels, CPU, dtype)
    print("the kernels pass their check")
    try:
        load_functions(b"code", ["unknown"], CPU)["unknown"].for_each(1, torch.zeros(1))
    except KernelError as error:
        print(error)


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]))
