"""Photos to a feature cache: read and decode in threads, encode in batches, write as they come."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from cache.errors import CapError
from cache.record import Skeleton, Strings
from cache.store import DONE, PENDING, UNREADABLE, FeatureCache
from cache.writer import CacheWriter, open_writer
from pipeline.config import ExtractConfig
from pipeline.datasets import Photo, read_photos
from pipeline.encoder import (
    Backbone,
    Encoder,
    choose_precision,
    load_backbone,
)
from pipeline.photos import ReadPhoto, read_photo
from train.device import resolve_device
from train.vocab import build_caption_table

_BATCHES_AHEAD = 3
_FLUSH_INTERVAL_S = 2.0
_PRECISION_CHECK_PHOTOS = 16


class ExtractError(CapError):
    """An extraction cannot go on. One line."""


@dataclass(frozen=True)
class Notice:
    """Something the user should know; one line."""

    text: str


@dataclass(frozen=True)
class Progress:
    """How far an extraction is, over all runs of the command so far."""

    done: int
    unreadable: int
    total: int
    new: int  # photos handled by this run
    elapsed_s: float  # of this run, from its first photo

    @property
    def photos_per_s(self) -> float:
        return self.new / self.elapsed_s if self.elapsed_s > 0 else 0.0


def library_versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "torchvision", "pillow", "simplejpeg")}


def extract(config: ExtractConfig) -> Generator[Notice | Progress, None, None]:
    """Make the cache, or finish one that was begun. Yields notices and progress; the last item is
    the final progress. Closing the generator keeps what is done.

    Raises DatasetError, EncoderError, CacheError or ExtractError.
    """
    photos = read_photos(
        config.images,
        config.captions,
        split=config.split,
        only=config.only,
        limit=config.limit,
    )
    device = resolve_device(config.device)
    backbone = load_backbone(config.backbone, config.weights)
    existing = None if config.overwrite else _existing_cache(config.out)
    precision, notices = _precision(config, backbone, photos, device, existing)
    yield from (Notice(text) for text in notices)
    encoder = Encoder(
        backbone,
        device=device,
        precision=precision,
        image_size=config.image_size,
        views=config.views,
    )
    skeleton = Skeleton(
        image_ids=Strings.pack(photo.image_id for photo in photos),
        paths=Strings.pack(photo.path for photo in photos),
        captions=build_caption_table([photo.captions for photo in photos]),
        encoder=encoder.record,
        batch_rows=min(config.batch_size, len(photos)),
    )
    with open_writer(
        config.out, skeleton, library_versions=library_versions(), overwrite=config.overwrite
    ) as writer:
        if writer.cache.batch_rows != skeleton.batch_rows:
            yield Notice(f"going on with the cache's own batch size, {writer.cache.batch_rows}")
        if config.retry_unreadable:
            yield Notice(f"trying {writer.retry_unreadable():,} unreadable photos again")
        yield from _fill(writer, encoder, config.images, config.workers)


def _existing_cache(path: Path) -> FeatureCache | None:
    return FeatureCache(path) if path.is_file() else None


def _precision(
    config: ExtractConfig,
    backbone: Backbone,
    photos: Sequence[Photo],
    device: torch.device,
    existing: FeatureCache | None,
) -> tuple[str, list[str]]:
    if config.precision != "auto":
        return config.precision, []
    if existing is not None:  # whatever was chosen then is what the other rows have
        return existing.encoder.precision, []
    pixels: list[torch.Tensor] = []
    for photo in photos[: 4 * _PRECISION_CHECK_PHOTOS]:
        read = read_photo(config.images / photo.path, config.image_size, ("full",))
        if read.pixels is not None:
            pixels.append(read.pixels)
        if len(pixels) == _PRECISION_CHECK_PHOTOS:
            break
    if not pixels:
        return "float32", ["none of the first photos can be decoded; computing in float32"]
    return choose_precision(backbone, torch.cat(pixels), device=device)


def _fill(
    writer: CacheWriter, encoder: Encoder, images: Path, workers: int | None
) -> Generator[Progress, None, None]:
    """Work through the pending rows batch by batch, decoding a few batches ahead."""
    cache, status = writer.cache, writer.status
    size, views = encoder.record.image_size, encoder.record.views
    first_rows = [
        first
        for first in range(0, len(cache), cache.batch_rows)
        if (status[first : first + cache.batch_rows] == PENDING).any()
    ]
    before = int((status != PENDING).sum())
    start = last_flush = time.perf_counter()

    def progress() -> Progress:
        handled = int((status != PENDING).sum())
        return Progress(
            done=int((status == DONE).sum()),
            unreadable=int((status == UNREADABLE).sum()),
            total=len(cache),
            new=handled - before,
            elapsed_s=time.perf_counter() - start,
        )

    pool = ThreadPoolExecutor(workers or os.cpu_count(), thread_name_prefix="decode")

    def submit(first: int) -> tuple[int, dict[int, Future[ReadPhoto]]]:
        rows = range(first, min(first + cache.batch_rows, len(cache)))
        return first, {
            row: pool.submit(read_photo, images / cache.paths[row], size, views)
            for row in rows
            if status[row] == PENDING
        }

    submitted = map(submit, first_rows)  # lazy: a batch is submitted when it is taken
    waiting = deque(islice(submitted, _BATCHES_AHEAD))
    running: _Batch | None = None  # queued on the device while the next batch is gathered
    try:
        yield progress()
        while waiting:
            first, futures = waiting.popleft()
            reads = {row: future.result() for row, future in futures.items()}
            waiting.extend(islice(submitted, 1))
            batch = _encode(encoder, first, cache.batch_rows, reads)
            if running is not None:
                running.store(writer)
            running = batch
            if time.perf_counter() - last_flush > _FLUSH_INTERVAL_S:
                writer.flush()
                last_flush = time.perf_counter()
            yield progress()
        if running is not None:
            running.store(writer)
        writer.flush()
        yield progress()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class _Batch:
    """Rows whose features are computed, or queued on a GPU, but not yet in the file."""

    features: torch.Tensor | None  # (R, V, D) float16, for the rows that could be decoded
    reads: dict[int, ReadPhoto]

    def store(self, writer: CacheWriter) -> None:
        for row, read in self.reads.items():
            if read.pixels is None:
                writer.set_unreadable(row, read.error, read.digest)
        if self.features is None:
            return
        rows = [row for row, read in self.reads.items() if read.pixels is not None]
        features = self.features.cpu().numpy()
        if not np.isfinite(features).all():
            raise ExtractError(
                f"features of {writer.cache.paths[rows[0]]} or its neighbours are not finite in "
                f"{writer.cache.encoder.precision}; use --precision float32 --overwrite"
            )
        writer.write(np.array(rows), features, np.stack([self.reads[row].digest for row in rows]))


def _encode(encoder: Encoder, first: int, batch_rows: int, reads: dict[int, ReadPhoto]) -> _Batch:
    """Encode one batch with every photo at its own place, black where there is none.

    A photo's features may depend in the last bit on the shape of the batch and on its place in it;
    with both fixed, an interrupted run computes what an unbroken one does.
    """
    size, views = encoder.record.image_size, encoder.record.views
    pixels = torch.zeros(
        (batch_rows, len(views), 3, size, size),
        dtype=torch.uint8,
        pin_memory=encoder.device.type == "cuda",
    )
    places = []
    for row, read in reads.items():
        if read.pixels is not None:
            pixels[row - first] = read.pixels
            places.append(row - first)
    if not places:
        return _Batch(None, reads)
    features = encoder.encode(pixels.flatten(0, 1)).unflatten(0, (batch_rows, len(views)))
    return _Batch(features[places], reads)
