"""Decodes JPEGs on a GPU and resizes them there, into the input of the encoder.

    files in the host's memory → photos of their own sizes, in a ring of buffers → every view

The hardware writes as soon as it is called, whatever the stream still has to do. So the photos go
into buffers that belong to this module alone, each of which is used again only after the host has
waited for the kernels that read it. Only kernels write the output, in the order of the stream.

The size of a photo is that of its header, as `pipeline.photos.jpeg_header.gpu_size` reads it: the
decoder reads the same segment of the same bytes, in a file without anything unusual before it. To
ask nvJPEG as well would only parse the header twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.photos.gpu.nvjpeg import STATES, BatchDecoder, NvjpegDecoder
from pipeline.photos.gpu.resize import (
    ALIGNMENT,
    MOST_PHOTOS,
    BatchResize,
    Launched,
    Layout,
    compile_resize,
)
from pipeline.photos.preprocessing import BILINEAR

_BUFFERS = 3
# One file that it does not take fails a whole batch of the decoder. The bad one is searched by
# halves, down to so many: for these few the CPU is faster than more calls.
_FEW = 8


class JpegFile(NamedTuple):
    """A file to decode. place: its row of the output. address, length: of its bytes in the host's
    memory. height, width: as `gpu_size` says.
    """

    place: int
    address: int
    length: int
    height: int
    width: int


class GpuDecoder:
    """Call it from one thread.

    stream: on which pixels are computed; None on a CPU, where all is done when `decode` returns.
    """

    def __init__(
        self,
        device: torch.device,
        image_size: int,
        views: tuple[str, ...],
        *,
        filter: str = BILINEAR,
        batch_decoder: BatchDecoder | None = None,
        kernels: Mapping[str, Launched] | None = None,
        scratch_bytes: int = 720 << 20,
    ) -> None:
        """batch_decoder, kernels: the GPU's own, if None. scratch_bytes: of the device's memory for
        decoded photos; a third of it is the most that one photo may take. Columns of photos take up
        to two thirds as much beside it, tables 64 MB. Raises NvjpegError or KernelError.
        """
        self.image_size, self.views = image_size, views
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
            self.stream = torch.cuda.Stream(device, priority=-5)  # before the backbone's kernels
        self.device = device
        self._batch_decoder = NvjpegDecoder(device) if batch_decoder is None else batch_decoder
        kernels = compile_resize(device) if kernels is None else kernels
        self._resize = BatchResize(device, image_size, views, kernels, filter)
        self._buffer_bytes = scratch_bytes // _BUFFERS
        self._column_bytes = self._buffer_bytes // 2 * self._resize.column_sets
        self._columns = torch.empty(self._column_bytes, dtype=torch.uint8, device=device)
        self._ring = [_Buffer(self._buffer_bytes, device) for _ in range(_BUFFERS)]
        if self.stream is not None:
            # The memory may be that of tensors still in use. Not `torch.cuda.synchronize`: a CUDA
            # graph may be captured meanwhile.
            torch.cuda.current_stream(device).synchronize()
        self._turn = self._state = 0
        # When the decoder has read and written what it was given, for each of its states.
        self._decoded = [_event() if device.type == "cuda" else None for _ in range(STATES)]

    def decode(self, files: Sequence[JpegFile], out: Tensor) -> list[int]:
        """Queue the pixels of every view of each file into `out[place]`.

        out: (R, V, 3, S, S) uint8 on the device, channels last in memory; whatever is queued on it
        must be done before the work of `stream`. Returns the places of the files that were refused,
        whose rows of `out` are as before; the CPU has the word for them. The bytes of the files
        must stay until what is queued on `stream` is done. Raises NvjpegError if the decoder fails.
        """
        self._check(out)
        if not files:
            return []
        table = np.array(files, np.int64)  # (N, 5)
        places, _, _, heights, widths = table.T
        if places.min() < 0 or places.max() >= len(out):
            raise IndexError(f"place {places.max()} of {len(out)}")
        refused: list[int] = []
        with self._on_stream():
            layout = self._resize.layout(heights, widths)
            fits = (layout.kinds >= 0) & (layout.photo_bytes + ALIGNMENT <= self._buffer_bytes)
            fits &= layout.column_bytes <= self._column_bytes
            refused += places[~fits].tolist()
            table = table[fits]
            layout = _rows(layout, fits)
            for group in self._groups(layout):
                refused += self._decode_group(table[group], _rows(layout, group), out)
        return refused

    def close(self) -> None:
        """Wait for what is queued, and free decoder and buffers. It cannot be used again."""
        if self.stream is not None:
            self.stream.synchronize()
        self._batch_decoder.close()
        self._ring.clear()
        self._columns = torch.empty(0, dtype=torch.uint8)

    def _check(self, out: Tensor) -> None:
        shape = (len(self.views), 3, self.image_size, self.image_size)
        last = out.permute(0, 1, 3, 4, 2) if out.dim() == 5 else out
        right = out.shape[1:] == shape and out.dtype is torch.uint8 and last.is_contiguous()
        if not right or out.device != self.device:
            raise ValueError(f"pixels of (R, {shape}), uint8 and channels last, are expected")

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _groups(self, layout: Layout) -> list[slice]:
        """Runs of photos that fit into one buffer, and whose columns fit beside."""
        count = len(layout.kinds)
        photos, columns = np.cumsum(layout.photo_bytes), np.cumsum(layout.column_bytes)
        groups, start = [], 0
        while start < count:
            before = (photos[start - 1], columns[start - 1]) if start else (0, 0)
            end = min(
                int(np.searchsorted(photos, before[0] + self._buffer_bytes - ALIGNMENT, "right")),
                int(np.searchsorted(columns, before[1] + self._column_bytes, "right")),
                start + MOST_PHOTOS,
            )
            groups.append(slice(start, end))
            start = end
        return groups

    def _decode_group(self, table: NDArray[np.int64], layout: Layout, out: Tensor) -> list[int]:
        """The places refused. table: (N, 5), the fields of JpegFile."""
        buffer = self._ring[self._turn]
        self._turn = (self._turn + 1) % _BUFFERS
        if buffer.free is not None:
            buffer.free.synchronize()
        ends = np.cumsum(layout.photo_bytes)
        photos = buffer.address + ends - layout.photo_bytes
        given = np.stack([table[:, 1], table[:, 2], photos, layout.pitches]).astype(np.uint64)
        good = self._decode_halves(given)
        if good.any():
            rows = out.data_ptr() + table[good, 0] * (out.stride(0) * out.element_size())
            self._resize.resize(_rows(layout, good), photos[good], rows, self._columns)
        if buffer.free is not None:
            buffer.free.record(self.stream)
        return table[~good, 0].tolist()  # type: ignore[no-any-return]

    def _decode_halves(self, given: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which files were decoded. given: (4, N), the arguments of `BatchDecoder.decode`."""
        count = given.shape[1]
        if not self._decode_batch(given):
            return np.ones(count, np.bool_)
        if count <= _FEW:
            return np.zeros(count, np.bool_)
        halves = np.array_split(given, 2, axis=1)
        return np.concatenate([self._decode_halves(half) for half in halves])

    def _decode_batch(self, given: NDArray[np.uint64]) -> int:
        addresses, lengths, destinations, pitches = given
        self._state = (self._state + 1) % STATES
        done = self._decoded[self._state]
        if self.stream is None or done is None:
            return self._batch_decoder.decode(addresses, lengths, destinations, pitches, 0, 0)
        done.synchronize()
        status = self._batch_decoder.decode(
            *(addresses, lengths, destinations, pitches), self.stream.cuda_stream, self._state
        )
        done.record(self.stream)
        return status


class _Buffer:
    """Memory for decoded photos. free: when the kernels have read it; None on a CPU."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=device)
        self.address = -(-self.memory.data_ptr() // ALIGNMENT) * ALIGNMENT
        self.free = _event() if device.type == "cuda" else None


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(blocking=True)  # a thread that waits leaves its core to others


def _rows(layout: Layout, chosen: NDArray[np.bool_] | slice) -> Layout:
    return Layout(*(values[chosen] for values in layout))
