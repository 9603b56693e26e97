"""Batches whose JPEGs a GPU decodes, ahead of the encoder.

A loader leaves most photos as the bytes of their files. A thread lets the GPU decode them into the
encoder's input, beside the pixels of those that readers have decoded. It waits for the GPU nearly
all the time, so another one takes batches from the loader meanwhile. Whatever the GPU refuses goes
back to the readers, so that the same photos are set aside for the same reasons as without a GPU.
The GPU's pixels are compared with the readers' for the whole first batch; if one differs, readers
decode everything.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from cache.errors import CapError
from pipeline.photos.gpu.decoder import GpuDecoder, JpegFile
from pipeline.photos.gpu.nvjpeg import NoHardwareError, NvjpegDecoder, NvjpegError
from pipeline.photos.photo_loader import LoadedBatch, PhotoLoader
from pipeline.photos.preprocessing import BILINEAR, empty_pixels
from train.step.cuda.launch import KernelError

_INPUTS = 4  # one is filled, one waits, and the encoder has two
_READING = 2  # batches whose files the GPU may still read
_EXIT_S = 2.0
_SWITCH_INTERVAL_S = 0.0005


class DecoderError(CapError):
    """Raised when JPEGs cannot be decoded where the user wants it. The message is one line."""


def gpu_decoder(
    choice: str,
    device: torch.device,
    image_size: int,
    views: tuple[str, ...],
    filter: str = BILINEAR,
) -> Callable[[], GpuDecoder] | None:
    """What makes the decoder of a GPU; None if readers decode.

    choice: `auto`, `cpu` or `gpu`. filter: see `preprocess`. Raises DecoderError if the
    last one cannot be had.
    """
    if choice == "cpu" or (choice == "auto" and device.type != "cuda"):
        return None
    try:
        if device.type != "cuda":
            raise NvjpegError("a CPU has none")
        hardware = NvjpegDecoder(device)
    except NvjpegError as error:
        if choice == "gpu":
            raise _absent(error) from None
        return None
    return lambda: GpuDecoder(device, image_size, views, filter=filter, batch_decoder=hardware)


def _absent(reason: Exception) -> DecoderError:
    return DecoderError(f"--decoder gpu: {_first_line(reason)}; use --decoder cpu or auto")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


class GpuBatches:
    """Iterates over the batches of a loader, in order, with their pixels on a device.

    A context manager, which also enters the loader. A batch is valid until `release`. Iteration
    raises what the loader's does. notices: messages for the user; whoever shows them clears the
    list.
    """

    def __init__(
        self,
        loader: PhotoLoader,
        make_decoder: Callable[[], GpuDecoder],
        *,
        device: torch.device,
        batch_rows: int,
        image_size: int,
        views: tuple[str, ...],
        required: bool = False,
    ) -> None:
        """make_decoder: is called by the thread that decodes, beside the first photos' reading.
        required: whether iteration raises DecoderError if the GPU cannot decode.
        """
        self._required = required
        self.notices: list[str] = []
        self._loader, self._make_decoder, self._device = loader, make_decoder, device
        self._decoder: GpuDecoder | None = None
        self._proven = False
        self._reading: deque[tuple[LoadedBatch, torch.cuda.Event | None]] = deque()
        self._stopped = False
        self._free: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        for _ in range(_INPUTS):
            pixels = empty_pixels(batch_rows * len(views), image_size, device=device)
            self._free.put(pixels.unflatten(0, (batch_rows, len(views))))
        self._ready: queue.SimpleQueue[
            tuple[LoadedBatch, torch.cuda.Event | None] | BaseException | None
        ] = queue.SimpleQueue()
        self._loaded: queue.Queue[LoadedBatch | BaseException | None] = queue.Queue(maxsize=1)
        self._threads = [
            threading.Thread(target=self._load, name="gpu-batches", daemon=True),
            threading.Thread(target=self._run, name="gpu-decoder", daemon=True),
        ]

    def __enter__(self) -> Self:
        self._loader.__enter__()
        # A thread that the GPU has let go must not wait for Python's lock as long as usual, 5 ms.
        self._switch_interval_s = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped = True
        self._free.put(None)
        # One thread may wait for room in this queue, or the other one for something in it.
        with contextlib.suppress(queue.Empty):
            self._loaded.get_nowait()
        with contextlib.suppress(queue.Full):
            self._loaded.put_nowait(None)
        self._threads[1].join(_EXIT_S)
        self._loader.__exit__(kind, error, trace)
        sys.setswitchinterval(self._switch_interval_s)

    def __iter__(self) -> Iterator[LoadedBatch]:
        while (item := self._ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            batch, decoded = item
            if decoded is not None:
                torch.cuda.current_stream(self._device).wait_event(decoded)
            yield batch

    def release(self, batch: LoadedBatch) -> None:
        """Return a batch's memory for reuse. No work that is still queued may read it."""
        self._free.put(batch.pixels)

    def _load(self) -> None:
        last: BaseException | None = None
        try:
            for batch in self._loader:
                self._loaded.put(batch)
                if self._stopped:
                    return
        except BaseException as error:  # for the thread that iterates
            last = error
        if not self._stopped:
            self._loaded.put(last)

    def _run(self) -> None:
        try:
            with self._current_device():
                self._open()
                while (batch := self._loaded.get()) is not None:
                    if isinstance(batch, BaseException):
                        raise batch
                    pixels = self._free.get()
                    if pixels is None or self._stopped:
                        return
                    self._ready.put(self._on_device(batch, pixels))
            self._ready.put(None)
        except BaseException as error:  # for the thread that iterates
            self._ready.put(error)
        finally:
            if self._decoder is not None:
                self._decoder.close()

    def _open(self) -> None:
        try:
            self._decoder = self._make_decoder()
        except (NvjpegError, KernelError, torch.OutOfMemoryError) as error:
            self._give_up(error)

    def _give_up(self, reason: Exception) -> None:
        """Let readers decode everything from now on. A GPU without a decoder is not worth a word.

        Raises DecoderError if the GPU is required.
        """
        if self._required:
            raise _absent(reason)
        if not isinstance(reason, NoHardwareError):
            self.notices.append(f"{self._device}: decoding on the CPU ({_first_line(reason)})")
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None
        self._loader.leave_no_files()

    def _on_device(
        self, batch: LoadedBatch, pixels: Tensor
    ) -> tuple[LoadedBatch, torch.cuda.Event | None]:
        """The batch with its pixels in `pixels`, and when they are there."""
        with self._stream():
            if len(batch.files) < len(pixels) or batch.decoded:
                pixels.copy_(batch.pixels, non_blocking=True)
            refused = self._decode(batch, pixels)
            if refused:
                self._loader.decode(batch, refused)
                for row in refused:
                    place = row - batch.first
                    pixels[place].copy_(batch.pixels[place], non_blocking=True)
            done = self._event()
        batch.decoded.update(batch.files)
        self._release_what_is_read(batch, done)
        on_device = LoadedBatch(batch.first, pixels, batch.digests, batch.errors, batch.decoded)
        return on_device, done

    def _release_what_is_read(self, batch: LoadedBatch, done: torch.cuda.Event | None) -> None:
        """Give the loader the memory of earlier batches back, and later that of this one.

        The GPU reads files and pixels of a batch until it is done with all of its work.
        """
        self._reading.append((batch, done))
        while len(self._reading) > _READING:
            read, done = self._reading.popleft()
            if done is not None:
                done.synchronize()
            self._loader.release(read)

    def _decode(self, batch: LoadedBatch, pixels: Tensor) -> list[int]:
        """Let the GPU decode the batch's files; the rows that it has refused, ascending."""
        rows = sorted(batch.files)
        if self._decoder is None or not rows:
            return rows
        files = [JpegFile(row - batch.first, *batch.files[row]) for row in rows]
        try:
            refused = self._decoder.decode(files, pixels)
        except (NvjpegError, KernelError) as error:
            self._give_up(error)
            return rows
        refused_rows = sorted(batch.first + place for place in refused)
        compared = [row for row in rows if row in batch.decoded and row not in refused_rows]
        if not self._proven and compared:
            self._proven = True
            places = [row - batch.first for row in compared]
            same = pixels[places].cpu().eq(batch.pixels[places]).flatten(1).all(1)
            if not same.all():
                wrong = f"{int((~same).sum())} of {len(same)} photos came out otherwise on the GPU"
                self._give_up(NvjpegError(wrong))
                return rows
        return refused_rows

    def _event(self) -> torch.cuda.Event | None:
        """What is queued so far; None on a CPU, which has done it."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _stream(self) -> contextlib.AbstractContextManager[object]:
        if self._device.type != "cuda" or self._decoder is None:
            return contextlib.nullcontext()
        return torch.cuda.stream(self._decoder.stream)

    def _current_device(self) -> contextlib.AbstractContextManager[object]:
        if self._device.type != "cuda":
            return contextlib.nullcontext()
        return torch.cuda.device(self._device)
