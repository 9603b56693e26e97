"""CUDA source to functions that can be launched, by the two C libraries that PyTorch brings or
needs anyway: NVRTC, the runtime compiler, and the driver. Users need neither a compiler nor the
CUDA toolkit (`torch.cuda._compile_kernel` asks for the toolkit's headers).

Only calls that have been in both libraries since CUDA 11.1 are used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_THREADS = 256  # of a block


class KernelError(RuntimeError):
    """A kernel cannot be compiled, loaded or launched here. One line."""


class Function:
    """A kernel on one device."""

    def __init__(
        self, driver: ctypes.CDLL, function: ctypes.c_void_p, device: torch.device
    ) -> None:
        self._driver = driver
        self._function = function
        self._device = device

    def for_each(self, count: int, *arguments: Tensor | int | float) -> None:
        """Launch with a thread for each of `count` things."""
        self._launch(-(-count // _THREADS), arguments)

    def for_each_row(self, rows: int, *arguments: Tensor | int | float) -> None:
        """Launch with a block for each row."""
        self._launch(rows, arguments)

    def _launch(self, blocks: int, arguments: Sequence[Tensor | int | float]) -> None:
        """On the current stream, so that it can be captured. ints become C ints, floats C floats,
        tensors the address of their first number: they must be contiguous and on the device.
        """
        values = [_as_c(argument) for argument in arguments]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        stream = torch.cuda.current_stream(self._device).cuda_stream
        _check_driver(
            self._driver,
            self._driver.cuLaunchKernel(
                self._function,
                *(ctypes.c_uint(n) for n in (blocks, 1, 1, _THREADS, 1, 1, 0)),
                ctypes.c_void_p(stream),
                addresses,
                None,
            ),
        )


def compile_source(source: str, architecture: str, options: Sequence[str] = ()) -> bytes:
    """Machine code for a GPU of an architecture as in `sm_90`. Raises KernelError."""
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    _check_nvrtc(
        nvrtc,
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None
        ),
    )
    try:
        given = [f"--gpu-architecture={architecture}".encode(), *(o.encode() for o in options)]
        array = (ctypes.c_char_p * len(given))(*given)
        if nvrtc.nvrtcCompileProgram(program, len(given), array):
            size = ctypes.c_size_t()
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            lines = log.value.decode(errors="replace").split("\n")
            raise KernelError(f"for {architecture}: {' '.join(lines)[:500]}")
        size = ctypes.c_size_t()
        _check_nvrtc(nvrtc, nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        code = ctypes.create_string_buffer(size.value)
        _check_nvrtc(nvrtc, nvrtc.nvrtcGetCUBIN(program, code))
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def load_functions(code: bytes, names: Sequence[str], device: torch.device) -> dict[str, Function]:
    """The `extern "C"` kernels of these names, for as long as the process lives.

    Raises KernelError.
    """
    driver = _driver()
    with torch.cuda.device(device):
        torch.zeros(1, device=device)  # PyTorch's context of this device is now this thread's
        module = ctypes.c_void_p()
        _check_driver(driver, driver.cuModuleLoadData(ctypes.byref(module), code))
        functions = {}
        for name in names:
            function = ctypes.c_void_p()
            _check_driver(
                driver,
                driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()),
            )
            functions[name] = Function(driver, function, device)
        return functions


def architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _as_c(argument: Tensor | int | float) -> Any:
    if isinstance(argument, Tensor):
        assert argument.is_contiguous()
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int(argument)


def _nvrtc() -> ctypes.CDLL:
    """NVRTC of PyTorch's own CUDA version; the process has it loaded already."""
    if torch.version.cuda is None:
        raise KernelError("this PyTorch is built without CUDA")
    # The second name is the toolkit's: where PyTorch is not from a wheel.
    return _library(f"libnvrtc.so.{torch.version.cuda.split('.')[0]}", "libnvrtc.so")


def _driver() -> ctypes.CDLL:
    return _library("libcuda.so.1")


def _library(*names: str) -> ctypes.CDLL:
    reasons = []
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            reasons.append(str(error))
    raise KernelError(reasons[0])


def _check_nvrtc(nvrtc: ctypes.CDLL, result: int) -> None:
    if result:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise KernelError(f"NVRTC: {nvrtc.nvrtcGetErrorString(result).decode()}")


def _check_driver(driver: ctypes.CDLL, result: int) -> None:
    if result:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(result, ctypes.byref(text))
        raise KernelError(f"CUDA driver: {(text.value or b'unknown error').decode()}")
