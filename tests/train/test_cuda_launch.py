"""kernels.cu compiled by NVRTC, which needs no GPU, and launched with a driver that runs it on the
CPU.
"""

from __future__ import annotations

import ctypes
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import ROOT
from tests.train.test_cuda_objective import CPU, LOW, library_for_the_cpu
from train.step.cuda.compiled_kernels import NAMES, SOURCE, CompiledKernels
from train.step.cuda.kernel_check import check_kernels
from train.step.cuda.launch import Function, KernelError, compile_source, load_functions
from train.step.torch_kernels import TorchKernels


@pytest.fixture(scope="module")
def nvrtc() -> Any:
    """cuda-bindings' module of this name, where its library is installed too."""
    if torch.version.cuda is None:
        pytest.skip("PyTorch without CUDA")
    module = pytest.importorskip("cuda.bindings.nvrtc")
    try:
        module.nvrtcVersion()
    except RuntimeError as error:
        pytest.skip(f"no NVRTC: {error}")
    return module


@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_kernels_compile_for_a_gpu(
    architecture: str, dtype: torch.dtype, nvrtc: object
) -> None:
    options = ["-DBFLOAT16"] if dtype is torch.bfloat16 else []
    code = compile_source(SOURCE.read_text(encoding="utf-8"), architecture, options)
    assert code.startswith(b"\x7fELF")
    assert all(name.encode() in code for name in NAMES)


def test_source_that_does_not_compile_says_where(nvrtc: object) -> None:
    expected = r'^for sm_90: .*kernels\.cu\(2\): .*identifier "x" is undefined'
    with pytest.raises(KernelError, match=expected) as caught:
        compile_source("\n__device__ int f() { return x; }\n", "sm_90")
    assert "\n" not in str(caught.value)


def test_an_architecture_that_nvrtc_does_not_know_is_named(nvrtc: object) -> None:
    with pytest.raises(KernelError, match=r"^for sm_1: .*invalid value for --gpu-architecture"):
        compile_source("", "sm_1")


def test_a_missing_nvrtc_is_a_kernel_error_of_one_line(
    nvrtc: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nvrtcCreateProgram(*arguments: object) -> None:
        raise RuntimeError("Failure finding libnvrtc.so\nsearched in …")

    monkeypatch.setattr(nvrtc, "nvrtcCreateProgram", nvrtcCreateProgram)
    with pytest.raises(KernelError, match=r"^nvrtcCreateProgram: Failure finding libnvrtc\.so$"):
        compile_source("", "sm_90")


def test_a_missing_cuda_bindings_is_a_kernel_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(KernelError, match=r"^cannot import cuda-bindings: "):
        compile_source("", "sm_90")
    with pytest.raises(KernelError, match=r"^cannot import cuda-bindings: "):
        load_functions(b"", NAMES, CPU)


def test_a_pytorch_without_cuda_needs_no_cuda_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    module = runpy.run_path(str(ROOT / "train" / "step" / "cuda" / "launch.py"))
    with pytest.raises(module["KernelError"], match=r"^this PyTorch is built without CUDA$"):
        module["compile_source"]("", "sm_90")


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launches."""

    def __init__(self) -> None:
        self.launches: list[tuple[Tensor | int | float, ...]] = []

    def for_each(self, count: int, *arguments: Tensor | int | float) -> None:
        self.launches.append(arguments)

    for_each_row = for_each


class Recorded(TorchKernels):
    """PyTorch's operations; `compiled` is called with the same arguments first."""

    def __init__(self, compiled: CompiledKernels, dtype: torch.dtype) -> None:
        super().__init__(CPU, dtype)
        self._compiled = compiled

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name not in NAMES:
            return method

        def call(*arguments: Any, **options: Any) -> None:
            getattr(self._compiled, name)(*arguments, **options)
            method(*arguments, **options)

        return call


def parameters_of_kernels() -> dict[str, list[str]]:
    """The types of each kernel's parameters in kernels.cu, without `const`: `float*`, `int`."""
    source = re.sub("//.*", "", SOURCE.read_text(encoding="utf-8"))
    found = re.findall(r'extern "C" __global__ void (\w+)\((.*?)\)\s*\{', source, re.DOTALL)
    return {
        name: [
            re.sub(r"\w+$", "", parameter.strip()).removeprefix("const ").strip()
            for parameter in parameters.split(",")
        ]
        for name, parameters in found
    }


@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_each_launch_has_the_arguments_that_its_kernel_declares(dtype: torch.dtype) -> None:
    recorders = {name: Recorder() for name in NAMES}
    check_kernels(Recorded(CompiledKernels(recorders), dtype), CPU, dtype)
    kinds: dict[str, type | torch.dtype] = {
        "int": int,
        "float": float,
        "int*": torch.int32,
        "long long*": torch.int64,
        "float*": torch.float32,
        "low_t*": dtype,
    }
    declared = parameters_of_kernels()
    assert sorted(declared) == sorted(NAMES)
    for name, recorder in recorders.items():
        assert recorder.launches, name
        for launch in recorder.launches:
            given = [
                argument.dtype if isinstance(argument, Tensor)
                else int if isinstance(argument, bool) else type(argument)
                for argument in launch
            ]  # fmt: skip
            assert given == [kinds[parameter] for parameter in declared[name]], name


def test_a_launch_names_the_current_stream_and_the_c_type_of_each_argument(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def cuLaunchKernel(*arguments: object) -> tuple[int]:
        calls.append(arguments)
        return (0,)

    stream = SimpleNamespace(cuda_stream=0x7F0000000010)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    function = Function(SimpleNamespace(cuLaunchKernel=cuLaunchKernel), "handle", CPU)
    tensor = torch.zeros(3)
    function.for_each(257, tensor, 5, True, 0.5)
    function.for_each_row(7, 2.0)
    values = (tensor.data_ptr(), 5, True, 0.5)
    types = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_float)
    assert calls == [
        ("handle", 2, 1, 1, 256, 1, 1, 0, stream.cuda_stream, (values, types), 0),
        ("handle", 7, 1, 1, 256, 1, 1, 0, stream.cuda_stream, ((2.0,), (ctypes.c_float,)), 0),
    ]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build kernels.cu for the CPU")
def test_arguments_arrive_as_cuda_bindings_passes_them(nvrtc: object, tmp_path: Path) -> None:
    """In a process of its own, because the driver is loaded once for all."""
    library_for_the_cpu(torch.bfloat16, tmp_path).rename(tmp_path / "libcuda.so.1")
    found = subprocess.run(
        [sys.executable, "-m", "tests.train.launch_process", "bfloat16"],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.splitlines() == [
        "the kernels pass their check",
        "cuLaunchKernel: CUDA_ERROR_INVALID_VALUE",
    ], found.stderr
