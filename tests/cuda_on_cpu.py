"""Builds the source of GPU kernels for the CPU, where their threads run one after the other."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.conftest import ROOT


def build_for_the_cpu(
    source: Path, kernels: Mapping[str, bool], library: Path, options: Sequence[str] = ()
) -> Path:
    """Build a library of the kernels with these names; of each, whether it has barriers."""
    launches = " ".join(f"LAUNCH({name}, {str(has).lower()})" for name, has in kernels.items())
    subprocess.run(
        [
            *("g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-x", "c++"),
            *(f'-DSOURCE="{source.name}"', f"-DLAUNCHES={launches}", f"-I{source.parent}"),
            *(*options, str(ROOT / "tests" / "cuda_on_cpu.h"), "-o", str(library)),
        ],
        check=True,
    )
    return library


class CpuDriver:
    """Takes launches as `cuda.bindings.driver` does and runs them on the CPU."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def cuLaunchKernel(self, function: bytes, *rest: Any) -> tuple[int]:
        *sizes, _stream, (values, types), _extra = rest
        arguments = [c_type(value) for value, c_type in zip(values, types, strict=True)]
        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        return (self._library.cuLaunchKernel(function, *sizes, None, addresses, None),)
