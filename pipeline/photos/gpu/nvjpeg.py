"""The JPEG decoder in hardware that some NVIDIA GPUs have (A100, H100, H200 and others), through
nvJPEG's C interface.

Why this interface: one call decodes a batch, at 13,000 photos of 640×480 a second beside a backbone
that leaves nothing of the GPU idle. nvImageCodec, which wraps it, costs 10 µs of Python a photo;
TorchCodec does not interpolate chroma, so its pixels differ from libjpeg's.
"""

from __future__ import annotations

import ctypes
import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

# nvjpegBackend_t, nvjpegOutputFormat_t, and flags of nvjpegCreateEx.
_HARDWARE, _RGB_INTERLEAVED = 3, 5
# Without a pipeline of its own, nvJPEG's kernels for colours do not wait behind the backbone's:
# 10,800 photos a second instead of 400.
_NO_PIPELINE = 1
# Not used: NVJPEG_FLAGS_BITSTREAM_STRICT. It reads whole files first, which takes a quarter of the
# speed, and it finds only the truncated ones that have no end marker; whoever calls has looked for
# the marker.
_INTERPOLATE = 1 << 5  # chroma, as libjpeg does
_FLAGS = _NO_PIPELINE | _INTERPOLATE
STATES = 3  # batches that may be on their way at once

_STATUS = (
    *("success", "not initialized", "invalid parameter", "bad JPEG", "JPEG not supported"),
    *("no memory", "execution failed", "no such hardware", "internal error", "not implemented"),
    "incomplete JPEG",
)
_NO_HARDWARE = 7
# A file may be the reason of all others.
_NOT_THE_FILES_FAULT = (1, 5, 7, 9)

# What batches are filled up to, and the side in pixels of the photo that fills them.
_MULTIPLE, _FILLER_SIDE = 32, 32

# nvjpegImage_t: addresses of up to four planes, and the bytes of a row of each.
_IMAGE = np.dtype([("channel", "u8", 4), ("pitch", "u8", 4)])


class NvjpegError(RuntimeError):
    """Raised when the library or the hardware is not there or fails. The message is one line."""


class NoHardwareError(NvjpegError):
    """Raised when the GPU has no decoder for JPEGs."""


class BatchDecoder(Protocol):
    """A decoder of the memory of a GPU; `NvjpegDecoder`."""

    def decode(
        self,
        addresses: NDArray[np.uint64],
        lengths: NDArray[np.uint64],
        destinations: NDArray[np.uint64],
        pitches: NDArray[np.uint64],
        stream: int,
        state: int,
    ) -> int:
        """Decode JPEGs to interleaved RGB. All arrays are (N,).

        state: the decoder's memory that is used, 0 … STATES - 1; what it was used for before has to
        be done. The same holds for the files: they are read until what is queued here is done.
        addresses, lengths: of the files in the host's memory. destinations: addresses in the
        device's memory. pitches: bytes from one row to the next. Returns 0, or a status if any of
        the files cannot be decoded; then none is sure to be.

        The hardware ignores the order of the stream, and writes as soon as this is called: nothing
        that is still queued may read or write the destinations. The pixels are there for what is
        queued on the stream afterwards.
        """

    def close(self) -> None: ...


class NvjpegDecoder:
    """Implements `BatchDecoder` by the hardware.

    Call it from one thread. Handle and states are made there, by their first calls: made in another
    thread, they gave a failure of allocation.
    """

    def __init__(self, device: torch.device) -> None:
        """Raises NvjpegError if the library is not installed."""
        self._library = _load_library()
        self._library.nvjpegDecodeBatched.argtypes = [ctypes.c_void_p] * 6
        self._device = device
        self._handle: ctypes.c_void_p | None = None
        self._states = [_State() for _ in range(STATES)]
        file = io.BytesIO()
        Image.new("RGB", (_FILLER_SIDE, _FILLER_SIDE)).save(file, "JPEG", subsampling=0)
        self._filler = np.frombuffer(file.getvalue(), np.uint8)
        self._bin = torch.empty(_FILLER_SIDE**2 * 3, dtype=torch.uint8, device=device)

    def decode(
        self,
        addresses: NDArray[np.uint64],
        lengths: NDArray[np.uint64],
        destinations: NDArray[np.uint64],
        pitches: NDArray[np.uint64],
        stream: int,
        state: int,
    ) -> int:
        """As `BatchDecoder.decode`. Releases Python's lock.

        Raises NvjpegError if it is not the fault of a file.
        """
        self._open()
        used = self._states[state]
        if used.handle is None:
            used.handle = ctypes.c_void_p()
            self._call("nvjpegJpegStateCreate", self._handle, ctypes.byref(used.handle))
        # A batch of another size costs as much as many photos. So it is filled up with small ones.
        count = -(-len(addresses) // _MULTIPLE) * _MULTIPLE
        if count != used.size:
            self._call("nvjpegDecodeBatchedInitialize", self._handle, used.handle, count, 1,
                       _RGB_INTERLEAVED)  # fmt: skip
            used.size = count
        images = np.zeros(count, _IMAGE)
        images["channel"][:, 0] = self._filled(destinations, count, self._bin.data_ptr())
        images["pitch"][:, 0] = self._filled(pitches, count, _FILLER_SIDE * 3)
        addresses = self._filled(addresses, count, self._filler.ctypes.data)
        lengths = self._filled(lengths, count, len(self._filler))
        given = (values.ctypes.data for values in (addresses, lengths, images))
        status: int = self._library.nvjpegDecodeBatched(self._handle, used.handle, *given, stream)
        if status:
            self._close_state(used)  # nobody says what it holds after a failure
        if status in _NOT_THE_FILES_FAULT:
            raise NvjpegError(f"nvjpegDecodeBatched: {_name(status)}")
        return status

    @staticmethod
    def _filled(values: NDArray[np.uint64], count: int, value: int) -> NDArray[np.uint64]:
        return np.pad(values, (0, count - len(values)), constant_values=value)

    def close(self) -> None:
        for state in self._states:
            self._close_state(state)
        if self._handle is not None:
            self._library.nvjpegDestroy(self._handle)
            self._handle = None

    def _open(self) -> None:
        if self._handle is not None:
            return
        torch.zeros(1, device=self._device)  # makes PyTorch's context that of this thread
        handle = ctypes.c_void_p()
        self._call("nvjpegCreateEx", _HARDWARE, None, None, _FLAGS, ctypes.byref(handle))
        engines, cores = ctypes.c_uint(), ctypes.c_uint()
        self._call(
            "nvjpegGetHardwareDecoderInfo", handle, ctypes.byref(engines), ctypes.byref(cores)
        )
        if not engines.value:
            self._library.nvjpegDestroy(handle)
            raise NoHardwareError(f"{self._device} has no decoder for JPEGs")
        self._handle = handle

    def _close_state(self, state: _State) -> None:
        if state.handle is not None:
            self._library.nvjpegJpegStateDestroy(state.handle)
            state.handle, state.size = None, 0

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            kind = NoHardwareError if status == _NO_HARDWARE else NvjpegError
            raise kind(f"{name}: {_name(status)}")


@dataclass
class _State:
    """The decoder's memory for one batch, and the size of the batches that it is made for."""

    handle: ctypes.c_void_p | None = None
    size: int = 0


def _name(status: int) -> str:
    return _STATUS[status] if status < len(_STATUS) else f"status {status}"


def _load_library() -> ctypes.CDLL:
    """From one of NVIDIA's wheels, else the system's; for PyTorch's version of CUDA, if possible.

    Raises NvjpegError.
    """
    version = torch.version.cuda
    if version is None:
        raise NvjpegError("this PyTorch is built without CUDA")
    paths = {"13": "cu13/lib/libnvjpeg.so.13", "12": "nvjpeg/lib/libnvjpeg.so.12"}
    wheels = importlib.util.find_spec("nvidia")
    folders = (wheels.submodule_search_locations if wheels else None) or []
    for major in sorted(paths, key=lambda name: not version.startswith(name)):
        in_wheels = [str(Path(folder, paths[major])) for folder in folders]
        for path in [*in_wheels, f"libnvjpeg.so.{major}"]:
            try:
                return ctypes.CDLL(path)
            except OSError:
                continue
    raise NvjpegError("nvJPEG is not installed; pip install 'cap[gpu]' brings it")
