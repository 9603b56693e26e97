"""Extraction: from photos to a feature cache, or on with a cache that was begun.

Rows of known photos are copied from an older cache; the others are encoded and written as they
come.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch
from numpy.typing import NDArray

from cache.errors import CapError
from cache.record import CacheError, EncoderRecord, Skeleton, Strings, photos_sha256, texts_sha256
from cache.store import DONE, UNREADABLE, FeatureCache
from cache.writer import CacheWriter, check_place, open_writer
from pipeline.captions.dataset import read_photos
from pipeline.captions.records import Photo
from pipeline.encoder.backbone import Backbone
from pipeline.encoder.encoder import Encoder, encoder_record
from pipeline.encoder.precision import choose_precision, fast_precisions
from pipeline.encoder.weights import load_backbone
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.device_workers import encode_on_devices
from pipeline.extraction.encode_batches import EncodedBatch, encode_batches, pending_batches
from pipeline.extraction.reuse import KnownPhotos, copy_known, new_rows, open_known
from pipeline.extraction.shards import shard_of, unlike_siblings
from pipeline.photos.image_ids import NumberId
from pipeline.photos.photo_loader import BatchRequest, PhotoLoader
from train.captions.script import misfit
from train.captions.tokenizer import build_caption_table
from train.device import resolve_devices

# A CPU is fastest with a few megabytes of activations per layer, a GPU with many.
_BATCH_PHOTOS = {"cpu": 16, "cuda": 256}
_FLUSH_INTERVAL_S = 2.0
_PRECISION_CHECK_PHOTOS = 8


class ExtractError(CapError):
    """Raised when an extraction cannot continue. The message is one line."""


@dataclass(frozen=True)
class Notice:
    """A message for the user, one line."""

    text: str


@dataclass(frozen=True)
class Progress:
    """How far an extraction is, counting all runs of the command so far."""

    done: int
    unreadable: int
    total: int
    new: int  # photos that this run has encoded, copied or found unreadable
    elapsed_s: float  # of this run, from its first photo

    @property
    def photos_per_s(self) -> float:
        return self.new / self.elapsed_s if self.elapsed_s > 0 else 0.0


def library_versions() -> dict[str, str]:
    return {
        name: version(name)
        for name in ("torch", "torchvision", "pillow", "pillow-heif", "simplejpeg")
    }


def extract(config: ExtractConfig) -> Generator[Notice | Progress, None, None]:
    """Make a cache, or finish one that was begun.

    Yields notices and progress; the last item is the final progress. Closing the generator keeps
    what is done. Raises FolderError, DatasetError, ShardError, DeviceError, EncoderError,
    CacheError, StalledError, VanishedError, ShortageError, WorkerError or ExtractError.
    """
    check_place(config.out)
    understood: list[str] = []
    photos = read_photos(
        config.images,
        config.captions,
        split=config.split,
        only=config.only,
        limit=config.limit,
        image_column=config.image_column,
        caption_column=config.caption_column,
        say=understood.append,
    )
    yield from (Notice(text) for text in understood)
    unfit = misfit([text for photo in photos for text in photo.captions], config.tokenizer)
    if unfit is not None:
        yield Notice(unfit)
    devices = resolve_devices(config.device)
    backbone = load_backbone(config.backbone, config.weights)
    precision, notices = _choose_precision(config, backbone, photos, devices[0])
    yield from (Notice(text) for text in notices)
    record = encoder_record(backbone, config.image_size, config.views, precision)
    skeleton = _skeleton(config, photos, record, devices[0])
    del photos  # the skeleton holds the same in a third of the memory
    yield from (Notice(text) for text in unlike_siblings(config.out, skeleton))
    known = _open_known_photos(config, record)
    with open_writer(
        config.out, skeleton, library_versions=library_versions(), overwrite=config.overwrite
    ) as writer:
        if writer.cache.batch_rows != skeleton.batch_rows:
            yield Notice(f"continuing with the cache's own batch size, {writer.cache.batch_rows}")
        del skeleton  # the cache holds the same, memory-mapped
        if config.retry_unreadable:
            yield Notice(f"trying {writer.retry_unreadable():,} unreadable photos again")
        yield from _CacheFiller(writer, config).fill(backbone, devices, known)


def _skeleton(
    config: ExtractConfig, photos: Sequence[Photo], record: EncoderRecord, device: torch.device
) -> Skeleton:
    """All that a cache of these photos, or of the shard asked for, holds besides its rows."""
    batch_rows = min(config.batch_size or _BATCH_PHOTOS[device.type], len(photos))
    shard = None
    if config.shard is not None:
        names = (photo.image_id for photo in photos), (photo.path for photo in photos)
        counts = [len(photo.captions) for photo in photos]
        shard, share = shard_of(
            len(photos),
            batch_rows,
            *config.shard,
            all_photos_sha256=photos_sha256(*map(Strings.pack, names)),
            all_captions_sha256=texts_sha256(
                Strings.pack(text for photo in photos for text in photo.captions),
                np.repeat(np.arange(len(photos), dtype=np.int32), counts),
            ),
        )
        photos = photos[share]
    return Skeleton(
        image_ids=Strings.pack(photo.image_id for photo in photos),
        paths=Strings.pack(photo.path for photo in photos),
        captions=build_caption_table([photo.captions for photo in photos], config.tokenizer),
        encoder=record,
        batch_rows=batch_rows,
        shard=shard,
        numbered=np.array([isinstance(photo.image_id, NumberId) for photo in photos]),
    )


def _open_known_photos(config: ExtractConfig, record: EncoderRecord) -> KnownPhotos | None:
    if config.reuse is None:
        return None
    known = open_known(config.reuse, record)
    if config.out.exists() and config.out.samefile(config.reuse):
        raise CacheError(f"{config.reuse}: cannot be both --reuse and --out; name another --out")
    return known


def decoding_threads(workers: int | None) -> int:
    """`workers`, or else one thread per core that this process may use."""
    return workers or len(os.sched_getaffinity(0))


def _choose_precision(
    config: ExtractConfig, backbone: Backbone, photos: Sequence[Photo], device: torch.device
) -> tuple[str, list[str]]:
    """(precision, notices). Shards test the first photos of the whole set, so that they agree."""
    if config.precision != "auto":
        return config.precision, []
    if config.out.is_file() and not config.overwrite:  # the precision of the rows already there
        return FeatureCache(config.out).encoder.precision, []
    if config.reuse is not None:
        return FeatureCache(config.reuse).encoder.precision, []
    if fast_precisions(device) == ("float32",):
        return "float32", []
    pixels: list[torch.Tensor] = []
    first = range(min(len(photos), 4 * _PRECISION_CHECK_PHOTOS))
    loader = PhotoLoader(
        [
            BatchRequest(row, first[row : row + _PRECISION_CHECK_PHOTOS])
            for row in first[::_PRECISION_CHECK_PHOTOS]
        ],
        lambda row: config.images / photos[row].path,
        batch_rows=_PRECISION_CHECK_PHOTOS,
        image_size=config.image_size,
        views=("full",),
        threads=decoding_threads(config.workers),
    )
    with loader:
        for batch in loader:
            pixels.extend(batch.pixels[row - batch.first] for row in sorted(batch.decoded))
            if len(pixels) >= _PRECISION_CHECK_PHOTOS:
                break
    if not pixels:
        return "float32", ["none of the first photos can be decoded; computing in float32"]
    return choose_precision(backbone, torch.cat(pixels[:_PRECISION_CHECK_PHOTOS]), device=device)


class _CacheFiller:
    """Fills the pending rows of a cache, and counts and times this run."""

    def __init__(self, writer: CacheWriter, config: ExtractConfig) -> None:
        self._writer, self._config = writer, config
        self._threads = decoding_threads(config.workers)
        self._done = int((writer.status == DONE).sum())
        self._unreadable = int((writer.status == UNREADABLE).sum())
        self._before = self._done + self._unreadable
        self._start = self._last_flush = time.perf_counter()

    def fill(
        self, backbone: Backbone, devices: Sequence[torch.device], known: KnownPhotos | None
    ) -> Generator[Notice | Progress, None, None]:
        writer = self._writer
        yield self._progress()
        order = np.arange(len(writer.cache))
        if known is not None:
            for count in copy_known(writer, known, self._config.images, self._threads):
                self._done += count
                self._flush_now_and_then()
                yield self._progress()
            order = new_rows(writer, known)
            yield Notice(
                f"{len(writer.cache) - len(order):,} photos are known; encoding the others"
            )
        writer.flush()
        for item in self._encoded(backbone, devices, order):
            if isinstance(item, str):
                yield Notice(item)
            else:
                self._store(item)
                yield self._progress()
        writer.flush()
        yield self._progress()

    def _encoded(
        self, backbone: Backbone, devices: Sequence[torch.device], order: NDArray[np.int64]
    ) -> Iterator[EncodedBatch | str]:
        """The pending rows of `order`, batch by batch, as they are ready; a str is a notice."""
        cache, config = self._writer.cache, self._config
        batches = pending_batches(order, self._writer.status, cache.batch_rows)
        if not batches:
            return iter(())
        if min(len(devices), len(batches)) > 1:
            return encode_on_devices(
                cache,
                order,
                batches,
                devices,
                images=config.images,
                weights=config.weights,
                threads=self._threads,
            )
        encoder = Encoder(
            backbone,
            device=devices[0],
            precision=cache.encoder.precision,
            image_size=cache.encoder.image_size,
            views=cache.encoder.views,
        )
        return encode_batches(
            encoder,
            backbone,
            order,
            batches,
            images=config.images,
            paths=cache.paths,
            batch_rows=cache.batch_rows,
            threads=self._threads,
        )

    def _store(self, encoded: EncodedBatch) -> None:
        writer, rows = self._writer, encoded.rows
        # If the folder is gone, as when a drive is unplugged, its photos are not unreadable.
        if encoded.unreadable and not os.path.isdir(self._config.images):
            raise ExtractError(
                f"{self._config.images}: the folder is gone; what is done is kept, run the same "
                "command again to continue"
            )
        for row, reason, digest in encoded.unreadable:
            writer.set_unreadable(row, reason, digest)
        if len(rows):
            writer.write(rows, encoded.features, encoded.digests)
        self._done += len(rows)
        self._unreadable += len(encoded.unreadable)
        self._flush_now_and_then()

    def _flush_now_and_then(self) -> None:
        if time.perf_counter() - self._last_flush > _FLUSH_INTERVAL_S:
            self._writer.flush()
            self._last_flush = time.perf_counter()

    def _progress(self) -> Progress:
        return Progress(
            done=self._done,
            unreadable=self._unreadable,
            total=len(self._writer.cache),
            new=self._done + self._unreadable - self._before,
            elapsed_s=time.perf_counter() - self._start,
        )
