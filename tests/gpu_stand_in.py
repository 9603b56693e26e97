"""What stands in for a GPU where photos are decoded on one: kernels that run on the CPU, and a
decoder that keeps nvJPEG's contract.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from torch import Tensor

from pipeline.photos.gpu.resize import KERNELS, SOURCE
from tests.cuda_on_cpu import CpuDriver, build_for_the_cpu
from train.step.cuda.launch import c_arguments


class CpuKernel:
    """A kernel that runs on the CPU, on tensors of the CPU, before its launch returns."""

    def __init__(self, driver: CpuDriver, name: str) -> None:
        self.driver, self._name = driver, name

    def for_each_block(
        self, blocks: tuple[int, int, int], *arguments: Tensor | int | float
    ) -> None:
        (status,) = self.driver.cuLaunchKernel(
            self._name.encode(), *blocks, 256, 1, 1, 0, 0, c_arguments(arguments), 0
        )
        assert status == 0


@functools.cache
def resize_kernels() -> dict[str, CpuKernel]:
    """The kernels of `resize.cu`, built for the CPU. Skips the test where there is no compiler."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build resize.cu for the CPU")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "resize.so")
        driver = CpuDriver(build_for_the_cpu(SOURCE, dict.fromkeys(KERNELS, False), library))
    return {name: CpuKernel(driver, name) for name in KERNELS}


class StandInDecoder:
    """Decodes by libjpeg-turbo into memory of this process, as the hardware of a GPU would into its
    own: at once, and with one status for the batch.

    What it does not decode are the kinds that the hardware refuses, and files that are damaged.
    """

    def __init__(self) -> None:
        self.batches: list[int] = []  # the number of files of each call
        self.closed = False
        self.status = 0  # if not 0, what every call answers

    def decode(
        self,
        addresses: NDArray[np.uint64],
        lengths: NDArray[np.uint64],
        destinations: NDArray[np.uint64],
        pitches: NDArray[np.uint64],
        stream: int,
    ) -> int:
        assert not self.closed
        for values in (addresses, lengths, destinations, pitches):
            assert values.dtype == np.uint64
            assert values.shape == addresses.shape
        self.batches.append(len(addresses))
        if self.status:
            return self.status
        status = 0
        given = np.stack([addresses, lengths, destinations, pitches], 1)
        for address, length, destination, pitch in given.tolist():
            try:
                pixels = simplejpeg.decode_jpeg(ctypes.string_at(address, length), "RGB")
            except ValueError:
                status = 3  # a bad JPEG; the others are decoded or not, which nobody may rely on
                continue
            height, width, _ = pixels.shape
            assert pitch >= width * 3
            memory = np.ctypeslib.as_array(
                (ctypes.c_uint8 * (pitch * (height - 1) + width * 3)).from_address(destination)
            )
            rows = np.lib.stride_tricks.as_strided(memory, pixels.shape, (pitch, 3, 1))
            rows[...] = pixels
        return status

    def close(self) -> None:
        self.closed = True
