"""Photos of several requests, captioned together.

A photo is decoded by one of a few threads as soon as it has arrived, and then waits for the
networks, which belong to a thread of their own. While they compute one batch, the next one gathers.
If they are idle, a photo goes ahead at once, unless others are being decoded just then: those are
waited for, some milliseconds at most.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.captioner.captioner import Captioner, TimedBatch
from pipeline.captioner.predictions import Prediction
from pipeline.captioner.serve.metrics import Metrics
from pipeline.photos.decoding import ImageError, picture_size
from pipeline.photos.readers.start import MOST_THREADS, reader_count

T = TypeVar("T")


class TooManyPixels(Exception):
    """Raised for a photo that is larger than the server decodes. The message is the reason."""


@dataclass(frozen=True)
class Captioned:
    """The prediction for one photo, and how it came about."""

    prediction: Prediction
    batch: int  # photos that were captioned together with it, itself among them
    seconds: dict[str, float]  # of decode, wait, encode and search


@dataclass(eq=False)
class _Waiting:
    name: str
    pixels: Tensor  # (V, 3, S, S)
    since: float
    answer: asyncio.Future[tuple[Prediction, TimedBatch, int, float]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Batcher:
    """Captions the photos of one event loop with one captioner. Call `start` in that loop."""

    def __init__(
        self,
        captioner: Captioner,
        *,
        batch: int,
        max_pixels: int,
        gather_s: float,
        metrics: Metrics,
    ) -> None:
        self.captioner = captioner
        self._batch, self._max_pixels, self._gather_s = batch, max_pixels, gather_s
        self._metrics = metrics
        self._decoders = ThreadPoolExecutor(min(MOST_THREADS, reader_count(None)), "decode")
        self._networks = ThreadPoolExecutor(1, "networks")
        self._waiting: deque[_Waiting] = deque()
        self._decoding = 0  # photos that will wait soon
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.failure: BaseException | None = None  # of the last batch
        self.doubt = captioner.doubt()

    @property
    def waiting(self) -> int:
        """Photos that are decoded and not captioned yet."""
        return len(self._waiting)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Ends the threads. Photos that still wait get no caption: stop asking first."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for waiting in self._waiting:
            waiting.answer.cancel()
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._networks.shutdown(wait=False, cancel_futures=True)

    async def caption(self, name: str, data: bytes) -> Captioned:
        """The caption of a photo. Cancelling this takes the photo out of the queue.

        name: the prediction's `path`. data: the bytes of a file. Raises TooManyPixels, ImageError,
        ShortageError, or whatever the networks raise.
        """
        begun = time.perf_counter()
        self._decoding += 1
        try:
            pixels = await self._in(self._decoders, partial(self._decode, data))
        finally:
            self._decoding -= 1
            self._changed.set()
        decoded = time.perf_counter()
        waiting = _Waiting(name, pixels, decoded)
        self._waiting.append(waiting)
        self._changed.set()
        try:
            prediction, timed, batch, begun_computing = await waiting.answer
        except asyncio.CancelledError:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            raise
        seconds = {
            "decode": decoded - begun,
            "wait": begun_computing - decoded,
            "encode": timed.encode_s,
            "search": timed.search_s,
        }
        return Captioned(prediction, batch, seconds)

    def _decode(self, data: bytes) -> Tensor:
        width, height = picture_size(data)
        if width * height > self._max_pixels:
            raise TooManyPixels(
                f"too large: {width}×{height} pixels; at most {self._max_pixels:,} pixels are taken"
            )
        read = self.captioner.decode(data)
        if read.pixels is None:
            raise ImageError(read.error)
        return read.pixels

    async def _run(self) -> None:
        while True:
            await self._gather()
            count = min(len(self._waiting), self._batch)
            photos = [self._waiting.popleft() for _ in range(count)]
            if not photos:  # their clients have left meanwhile
                continue
            begun = time.perf_counter()
            try:
                timed = await self._in(self._networks, partial(self._compute, photos))
            except Exception as error:
                self.failure = error
                for photo in photos:
                    if not photo.answer.done():
                        photo.answer.set_exception(error)
                continue
            self.failure = None
            self._metrics.batch_done()
            for photo, prediction in zip(photos, timed.predictions, strict=True):
                if not photo.answer.done():  # its client may have left
                    photo.answer.set_result((prediction, timed, len(photos), begun))

    async def _gather(self) -> None:
        """Wait until there is a batch to compute."""
        while not self._waiting:
            self._changed.clear()
            await self._changed.wait()
        try:
            async with asyncio.timeout(self._gather_s):
                while self._waiting and self._decoding and len(self._waiting) < self._batch:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pass

    def _compute(self, photos: list[_Waiting]) -> TimedBatch:
        pixels = torch.stack([photo.pixels for photo in photos])
        timed = self.captioner.caption_decoded([photo.name for photo in photos], pixels)
        self.doubt = self.captioner.doubt()
        return timed

    def warm_up(self) -> None:
        """Caption gray photos, so that the first real ones are as fast as the others. Call it
        before `start`. On a GPU, batches of every size have a graph of their own.
        """
        on_gpu = self.captioner.encoder.device.type == "cuda"
        for photos in range(1, self._batch + 1 if on_gpu else 2):
            self.captioner.warm_up(photos)

    async def _in(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, work)
