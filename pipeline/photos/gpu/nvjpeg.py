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
_STRICT = 1 << 2  # a truncated file is an error, not half a picture
_INTERPOLATE = 1 << 5  # chroma, as libjpeg does
_FLAGS = _NO_PIPELINE | _STRICT | _INTERPOLATE

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
    ) -> int:
        """Decode JPEGs to interleaved RGB. All arrays are (N,).

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

    Call it from one thread. Handle and state are made there, by the first call: made in another
    thread, they gave a failure of allocation.
    """

    def __init__(self, device: torch.device) -> None:
        """Raises NvjpegError if the library is not installed."""
        self._library = _load_library()
        self._library.nvjpegDecodeBatched.argtypes = [ctypes.c_void_p] * 6
        self._device = device
        self._handle: ctypes.c_void_p | None = None
        self._state: ctypes.c_void_p | None = None
        self._size = 0  # of the batches that the state is made for
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
    ) -> int:
        """As `BatchDecoder.decode`. Releases Python's lock, and returns when the files are read.

        Raises NvjpegError if it is not the fault of a file.
        """
        state = self._state or self._open()
        # A batch of another size costs as much as many photos. So it is filled up with small ones.
        count = -(-len(addresses) // _MULTIPLE) * _MULTIPLE
        if count != self._size:
            self._call("nvjpegDecodeBatchedInitialize", self._handle, state, count, 1,
                       _RGB_INTERLEAVED)  # fmt: skip
            self._size = count
        images = np.zeros(count, _IMAGE)
        images["channel"][:, 0] = self._filled(destinations, count, self._bin.data_ptr())
        images["pitch"][:, 0] = self._filled(pitches, count, _FILLER_SIDE * 3)
        addresses = self._filled(addresses, count, self._filler.ctypes.data)
        lengths = self._filled(lengths, count, len(self._filler))
        status: int = self._library.nvjpegDecodeBatched(
            self._handle, state, addresses.ctypes.data, lengths.ctypes.data, images.ctypes.data,
            stream,
        )  # fmt: skip
        if status:
            self._close_state()  # nobody says what it holds after a failure
        if status in _NOT_THE_FILES_FAULT:
            raise NvjpegError(f"nvjpegDecodeBatched: {_name(status)}")
        return status

    @staticmethod
    def _filled(values: NDArray[np.uint64], count: int, value: int) -> NDArray[np.uint64]:
        return np.pad(values, (0, count - len(values)), constant_values=value)

    def close(self) -> None:
        self._close_state()
        if self._handle is not None:
            self._library.nvjpegDestroy(self._handle)
            self._handle = None

    def _open(self) -> ctypes.c_void_p:
        torch.zeros(1, device=self._device)  # makes PyTorch's context that of this thread
        if self._handle is None:
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
        state = ctypes.c_void_p()
        self._call("nvjpegJpegStateCreate", self._handle, ctypes.byref(state))
        self._state, self._size = state, 0
        return state

    def _close_state(self) -> None:
        if self._state is not None:
            self._library.nvjpegJpegStateDestroy(self._state)
            self._state = None

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            kind = NoHardwareError if status == _NO_HARDWARE else NvjpegError
            raise kind(f"{name}: {_name(status)}")


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
