"""Compiles CUDA source and launches its kernels with `cuda-bindings`, NVIDIA's Python interface to
NVRTC, the runtime compiler, and to the driver. PyTorch's CUDA wheels depend on it, so users install
nothing: no compiler and no CUDA toolkit (`torch.cuda._compile_kernel` asks for the toolkit's
headers).

NVIDIA's `cuda-core`, one layer up, compiles to the same bytes. But it is one more package of 18 MB,
and importing it takes 0.07 s and 17 MB of memory. PyTorch 2.14 itself imports most of
`cuda-bindings`; the rest takes 0.002 s and 0.5 MB.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_THREADS = 256  # per block


class KernelError(RuntimeError):
    """Raised when a kernel cannot be compiled, loaded or launched here. The message is one line."""


class Function:
    """A kernel on one device."""

    def __init__(self, driver: Any, function: Any, device: torch.device) -> None:
        """driver: the module `cuda.bindings.driver`; function: its handle of the kernel."""
        self._driver = driver
        self._function = function
        self._device = device

    def for_each(self, count: int, *arguments: Tensor | int | float) -> None:
        """Launch one thread per item; the last block may have more threads than items."""
        self._launch((-(-count // _THREADS), 1, 1), arguments)

    def for_each_row(self, rows: int, *arguments: Tensor | int | float) -> None:
        """Launch one block per row."""
        self._launch((rows, 1, 1), arguments)

    def for_each_block(
        self, blocks: tuple[int, int, int], *arguments: Tensor | int | float
    ) -> None:
        """Launch this many blocks of 256 threads along x, y and z."""
        self._launch(blocks, arguments)

    def _launch(
        self, blocks: tuple[int, int, int], arguments: Sequence[Tensor | int | float]
    ) -> None:
        """Launch on the current stream, so that CUDA graphs can capture it. Raises KernelError."""
        stream = torch.cuda.current_stream(self._device).cuda_stream
        _call(
            self._driver.cuLaunchKernel, self._function,
            *blocks,  # the grid
            _THREADS, 1, 1,  # a block
            0,  # bytes of dynamic shared memory
            stream, c_arguments(arguments), 0,
        )  # fmt: skip


def compile_source(
    source: str, architecture: str, options: Sequence[str] = (), name: str = "kernels.cu"
) -> bytes:
    """Compile to machine code for GPUs of one architecture, such as `sm_90`.

    name: of the file, for messages. Raises KernelError.
    """
    _, nvrtc = _bindings()
    program = _call(nvrtc.nvrtcCreateProgram, source.encode(), name.encode(), 0, None, None)
    try:
        given = [f"--gpu-architecture={architecture}".encode(), *(o.encode() for o in options)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(given), given)
        if status:
            log = bytearray(_call(nvrtc.nvrtcGetProgramLogSize, program))
            _call(nvrtc.nvrtcGetProgramLog, program, log)
            lines = log.decode(errors="replace").rstrip("\0").splitlines()
            raise KernelError(f"for {architecture}: {' '.join([status.name, *lines])[:500]}")
        code = bytearray(_call(nvrtc.nvrtcGetCUBINSize, program))
        _call(nvrtc.nvrtcGetCUBIN, program, code)
        return bytes(code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def load_functions(code: bytes, names: Sequence[str], device: torch.device) -> dict[str, Function]:
    """Load the `extern "C"` kernels with these names. They stay loaded until the process ends.

    Raises KernelError.
    """
    driver, _ = _bindings()
    with torch.cuda.device(device):
        torch.zeros(1, device=device)  # makes PyTorch's context on the device this thread's context
        module = _call(driver.cuModuleLoadData, code)
        return {
            name: Function(driver, _call(driver.cuModuleGetFunction, module, name.encode()), device)
            for name in names
        }


def architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def c_arguments(
    arguments: Sequence[Tensor | int | float],
) -> tuple[tuple[int | float, ...], tuple[type[Any], ...]]:
    """What a kernel is given: values, and their C types.

    An int becomes a C int, a float a C float, a tensor the address of its first number. Tensors
    must be contiguous and on the device.
    """
    values = tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
    return values, tuple(_c_type(argument) for argument in arguments)


def _c_type(argument: Tensor | int | float) -> type[Any]:
    if isinstance(argument, Tensor):
        assert argument.is_contiguous()
        return ctypes.c_void_p
    return ctypes.c_float if isinstance(argument, float) else ctypes.c_int


def _bindings() -> tuple[Any, Any]:
    """The modules `driver` and `nvrtc`. Imported here because CPU-only PyTorch comes without them.

    Raises KernelError.
    """
    if torch.version.cuda is None:
        raise KernelError("this PyTorch is built without CUDA")
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as error:
        raise KernelError(f"cannot import cuda-bindings: {_first_line(error)}") from error
    return driver, nvrtc


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of cuda-bindings and return its output, if it has one. Raises KernelError."""
    try:
        status, *outputs = function(*arguments)
    except (RuntimeError, ValueError) as error:  # no library, or a status newer than the bindings
        raise KernelError(f"{function.__name__}: {_first_line(error)}") from error
    if status:
        raise KernelError(f"{function.__name__}: {status.name}")
    return outputs[0] if outputs else None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
