"""Photos to a feature cache: read and decode in threads, encode in batches, write as they come."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
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
    QueuedFeatures,
    choose_precision,
    load_backbone,
)
from pipeline.loading import LoadedBatch, PhotoLoader
from pipeline.photos import read_photo
from train.device import resolve_device
from train.vocab import build_caption_table

# A CPU is at its best with a few megabytes of activations a layer, a GPU with many.
_BATCH_PHOTOS = {"cpu": 16, "cuda": 256}
_FLUSH_INTERVAL_S = 2.0
_PRECISION_CHECK_PHOTOS = 8


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
        batch_rows=min(config.batch_size or _BATCH_PHOTOS[device.type], len(photos)),
    )
    with open_writer(
        config.out, skeleton, library_versions=library_versions(), overwrite=config.overwrite
    ) as writer:
        if writer.cache.batch_rows != skeleton.batch_rows:
            yield Notice(f"going on with the cache's own batch size, {writer.cache.batch_rows}")
        del photos, skeleton  # the cache knows it all, in a tenth of the memory
        if config.retry_unreadable:
            yield Notice(f"trying {writer.retry_unreadable():,} unreadable photos again")
        yield from _fill(writer, encoder, config)


def decoding_threads(workers: int | None) -> int:
    """As many as the cores this process may use, unless told otherwise."""
    return workers or len(os.sched_getaffinity(0))


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
    writer: CacheWriter, encoder: Encoder, config: ExtractConfig
) -> Generator[Notice | Progress, None, None]:
    """Work through the pending rows batch by batch, loading a few batches ahead.

    Every photo is encoded at its own place of a batch of one shape, with black where a row is done
    already or unreadable: features may depend in the last bit on both, and with both fixed an
    interrupted run computes what an unbroken one does.
    """
    cache, status = writer.cache, writer.status
    batches = [
        (first, (first + np.flatnonzero(part == PENDING)).tolist())
        for first in range(0, len(cache), cache.batch_rows)
        if (part := status[first : first + cache.batch_rows]).min() == PENDING
    ]
    before = int((status != PENDING).sum())
    start = last_flush = time.perf_counter()

    def progress() -> Progress:
        done, unreadable = int((status == DONE).sum()), int((status == UNREADABLE).sum())
        return Progress(
            done=done,
            unreadable=unreadable,
            total=len(cache),
            new=done + unreadable - before,
            elapsed_s=time.perf_counter() - start,
        )

    loader = PhotoLoader(
        batches,
        lambda row: config.images / cache.paths[row],
        batch_rows=cache.batch_rows,
        image_size=encoder.record.image_size,
        views=encoder.record.views,
        threads=decoding_threads(config.workers),
        pin_memory=encoder.device.type == "cuda",
    )
    running: _Encoded | None = None  # queued on the device while the next batch comes
    yield progress()
    with loader:
        for batch in loader:
            encoded = _encode(encoder, batch)
            if running is not None:
                running.store(writer)
                loader.release(running.batch)
            running = encoded
            if time.perf_counter() - last_flush > _FLUSH_INTERVAL_S:
                writer.flush()
                last_flush = time.perf_counter()
            while encoder.notices:
                yield Notice(encoder.notices.pop(0))
            yield progress()
        if running is not None:
            running.store(writer)
    writer.flush()
    yield progress()


@dataclass(frozen=True)
class _Encoded:
    """A batch whose features are computed, or queued on a GPU, but not yet in the file."""

    features: QueuedFeatures | None  # (R · V, D), of every place; None if all are black
    batch: LoadedBatch

    def store(self, writer: CacheWriter) -> None:
        batch = self.batch
        for row, read in batch.reads.items():
            if read.error:
                writer.set_unreadable(row, read.error, read.digest)
        if self.features is None:
            return
        rows = np.array(sorted(batch.decoded))
        places = batch.pixels.shape[:2]  # (R, V)
        features = self.features.wait().reshape(*places, -1)[rows - batch.first]
        if not np.isfinite(features).all():
            bad = rows[~np.isfinite(features).all(axis=(1, 2))]
            raise ExtractError(
                f"{writer.cache.paths[bad[0]]}: its features are not finite in "
                f"{writer.cache.encoder.precision}; use --precision float32 --overwrite"
            )
        writer.write(rows, features, np.stack([batch.reads[row].digest for row in rows.tolist()]))


def _encode(encoder: Encoder, batch: LoadedBatch) -> _Encoded:
    if not batch.decoded:
        return _Encoded(None, batch)
    return _Encoded(encoder.queue(batch.pixels.flatten(0, 1)), batch)
