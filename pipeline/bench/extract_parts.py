"""The parts of an extraction, each to be measured alone. See `cap bench extract`."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cache.record import EncoderRecord
from cache.share import cores
from pipeline.bench.jpegs import BenchError
from pipeline.bench.reading import decoding, rate_by_threads, reading
from pipeline.encoder.encoder import Encoder, normalizer
from pipeline.encoder.weights import load_backbone
from pipeline.photos.decoding import decode
from pipeline.photos.gpu.decoder import GpuDecoder, JpegFile
from pipeline.photos.jpeg_header import gpu_size, read_header
from pipeline.photos.photo_file import read_photo
from pipeline.photos.photo_loader import BatchRequest, PhotoLoader
from pipeline.photos.preprocessing import empty_pixels
from train import private_torch
from train.allocator import keep_freed_memory

_PLAIN_BATCH = 32
_MOST_BATCHES = 4096  # that are loaded in one measurement
_RESIZED = 64  # photos that are held at full size, 59 MB at 640×480
_GPU_PHOTOS = 4096  # files in memory for the GPU's decoder, 0.7 GB


class Parts:
    """The parts. Each method measures one and returns photos per second.

    paths: of the photos. at_least_s: how long each measurement takes. A context manager, since
    processes that read wait until they are measured. Raises BenchError if no photo can be read.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        record: EncoderRecord,
        batch_rows: int,
        device: torch.device,
        at_least_s: float,
    ) -> None:
        self._paths, self._device, self._at_least_s = paths, device, at_least_s
        self._batch_rows, self._size = batch_rows, record.image_size
        self.cores = cores()
        loaded = [(path, read_photo(path, self._size, ("full",)).pixels) for path in self._first()]
        self._readable = [path for path, pixels in loaded if pixels is not None]
        if not self._readable:
            raise BenchError(f"{paths[0]} and the next photos: none can be decoded")
        photos = [pixels for _, pixels in loaded if pixels is not None]
        self._pixels = torch.cat(photos).to(device, memory_format=torch.channels_last)
        backbone = load_backbone(record.backbone, record.weights)
        self._encoder = Encoder(backbone, device=device, precision=record.precision)
        self._plain = backbone.network.to(device)
        self._normalize = normalizer(device, torch.float32, backbone.preprocessing)
        self._ending = contextlib.ExitStack()
        self.gpu_decoder_note = ""  # why there is none, or which photos it takes
        self._plain_backbone()
        for _ in range(3):  # a GPU captures its graph at the second call
            self._fast_backbone()

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.close()

    def read(self) -> float:
        """Reading files and digesting their bytes, on all cores."""
        work = reading(self._paths, self.cores)
        return rate_by_threads(self.cores, work, self._at_least_s)

    def decode_by_threads(self, threads: int) -> float:
        """Reading, digesting, decoding and resizing."""
        work = decoding(self._paths, self._size, threads)
        return rate_by_threads(threads, work, self._at_least_s)

    def decode_by_processes(self) -> float:
        """The same work by reader processes, as an extraction starts them, on all cores."""
        rows = range(_MOST_BATCHES * self._batch_rows)
        batches = [
            BatchRequest(first, rows[first : first + self._batch_rows])
            for first in rows[:: self._batch_rows]
        ]
        loader = PhotoLoader(
            batches,
            lambda row: str(self._paths[row % len(self._paths)]),
            batch_rows=self._batch_rows,
            image_size=self._size,
            views=("full",),
            readers=self.cores,
            processes=True,
        )
        with loader:
            loaded = iter(loader)
            loader.release(next(loaded))  # with it the readers have started
            photos, started = 0, time.perf_counter()
            for batch in loaded:
                photos += self._batch_rows
                loader.release(batch)
                if time.perf_counter() - started >= self._at_least_s:
                    break
            return photos / (time.perf_counter() - started)

    def resize(self) -> float:
        """Resizing decoded photos on the CPU, on all cores."""
        photos = self._at_full_size

        def work(number: int) -> Callable[[int], None]:
            out = empty_pixels(1, self._size)
            return lambda item: private_torch.resize_into(photos[item % len(photos)], out)

        return rate_by_threads(self.cores, work, self._at_least_s)

    def decode_on_gpu(self) -> float | None:
        """Decoding and resizing on the GPU, from bytes in memory to the encoder's input; None if
        that is not possible here.
        """
        decode_some = self._decode_on_gpu
        if decode_some is None:
            return None
        return _rate(decode_some, self._device, self._at_least_s)

    def plain_loop(self) -> float:
        """Decoding a batch by Pillow, then encoding it, as in the tutorials, with torch's
        defaults.
        """
        return _rate(self._plain_loop, self._device, self._at_least_s)

    def plain_backbone(self) -> float:
        """Eager float32, with pixels that are on the device already."""
        return _rate(self._plain_backbone, self._device, self._at_least_s)

    def fast_backbone(self) -> float:
        """Fused, in the record's precision, with pixels that are on the device already."""
        return _rate(self._fast_backbone, self._device, self._at_least_s)

    def _first(self) -> Sequence[Path]:
        return self._paths[: self._batch_rows]

    @functools.cached_property
    def _at_full_size(self) -> list[Tensor]:
        """(1, 3, H, W) each, channels last in memory."""
        photos = (decode(path.read_bytes()) for path in self._readable[:_RESIZED])
        return [torch.from_numpy(photo).permute(2, 0, 1).unsqueeze(0) for photo in photos]

    @functools.cached_property
    def _decode_on_gpu(self) -> Callable[[], int] | None:
        """Decodes one batch after the other; returns how many photos it has decoded."""
        if self._device.type != "cuda":
            self.gpu_decoder_note = f"the device is {self._device}"
            return None
        try:
            decoder = GpuDecoder(self._device, self._size, ("full",))
        except RuntimeError as error:  # no library, or no hardware
            self.gpu_decoder_note = str(error)
            return None
        self._ending.callback(decoder.close)
        files = [path.read_bytes() for path in self._paths[:_GPU_PHOTOS]]
        taken = [
            (data, size) for data in files if (size := gpu_size(read_header(data))) is not None
        ]
        if not taken:
            self.gpu_decoder_note = "it takes none of these photos"
            return None
        share = len(taken) / len(files)
        self.gpu_decoder_note = f"{share:.0%} of the photos; the others are left to the CPU"
        batches = []
        for start in range(0, len(taken), self._batch_rows):
            part = enumerate(taken[start : start + self._batch_rows])
            batches.append(
                [
                    JpegFile(place, np.frombuffer(data, np.uint8).ctypes.data, len(data), *size)
                    for place, (data, size) in part
                ]
            )
        flat = torch.empty(
            (self._batch_rows, 1, self._size, self._size, 3), dtype=torch.uint8, device=self._device
        )
        out = flat.permute(0, 1, 4, 2, 3)
        rounds = itertools.cycle(batches)

        self._held = taken  # the batches hold addresses only

        def decode_some() -> int:
            batch = next(rounds)
            return len(batch) - len(decoder.decode(batch, out))

        decode_some()
        return decode_some

    @torch.no_grad()
    def _plain_loop(self) -> int:
        photos = []
        keep_freed_memory(False)  # torch's default
        for path in self._readable[:_PLAIN_BATCH]:
            with Image.open(path) as image:
                small = image.convert("RGB").resize((self._size,) * 2, Image.Resampling.BILINEAR)
            photos.append(torch.from_numpy(np.array(small)).permute(2, 0, 1))
        images = self._normalize(torch.stack(photos).to(self._device)).contiguous()
        self._plain(images).cpu()
        return len(photos)

    @torch.no_grad()
    def _plain_backbone(self) -> int:
        keep_freed_memory(False)
        self._plain(self._normalize(self._pixels[:_PLAIN_BATCH]).contiguous())
        return min(_PLAIN_BATCH, len(self._pixels))

    def _fast_backbone(self) -> int:
        keep_freed_memory()
        self._encoder.encode(self._pixels)
        return len(self._pixels)


def _rate(part: Callable[[], int], device: torch.device, at_least_s: float) -> float:
    """Photos per second over as many calls as take `at_least_s` seconds.

    A GPU is waited for every few calls only: its decoder and its streams may work ahead.
    """
    photos = calls = 0
    started = time.perf_counter()
    while not calls or time.perf_counter() - started < at_least_s:
        photos += part()
        calls += 1
        if device.type == "cuda" and calls % 8 == 0:
            torch.cuda.synchronize(device)
    if device.type == "cuda":  # else only queueing the work is measured
        torch.cuda.synchronize(device)
    return photos / (time.perf_counter() - started)
