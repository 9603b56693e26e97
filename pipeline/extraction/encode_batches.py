"""Encoding the pending rows of a cache, batch by batch, while the next photos are loaded.

All batches have one shape, and every photo has a fixed place in its batch; rows that are done or
unreadable are black. The last bits of a feature may depend on both. With both fixed, a run that was
interrupted computes the same bytes as an unbroken one, and several devices the same as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cache.record import EncoderRecord, Strings
from cache.store import PENDING
from pipeline.encoder.backbone import Backbone
from pipeline.encoder.encoder import Encoder, QueuedFeatures
from pipeline.extraction.feature_checks import EncodedBatch, FeatureChecks
from pipeline.photos.gpu.batches import GpuBatches, gpu_decoder
from pipeline.photos.photo_loader import BatchRequest, LoadedBatch, PhotoLoader
from pipeline.photos.readers.start import uses_processes
from pipeline.photos.sources.source import Source


def pending_batches(
    order: NDArray[np.int64], status: NDArray[np.uint8], batch_rows: int
) -> list[BatchRequest]:
    """The batches that contain pending rows, with the positions of those rows.

    order: the rows in the order in which they fill the batches. A position is an index into it.
    """
    in_order = status[order]
    return [
        BatchRequest(first, (first + np.flatnonzero(part == PENDING)).tolist())
        for first in range(0, len(order), batch_rows)
        if (part := in_order[first : first + batch_rows]).min() == PENDING
    ]


def encode_batches(
    backbone: Backbone,
    record: EncoderRecord,
    device: torch.device,
    order: NDArray[np.int64],
    batches: Sequence[BatchRequest],
    *,
    source: Source,
    paths: Strings,
    batch_rows: int,
    readers: int,
    decoder: str = "auto",
    encoder: Encoder | None = None,
) -> Iterator[EncodedBatch | str]:
    """Encode `pending_batches` one after the other. A str is a notice for the user.

    record: how the backbone is used. paths: the name of each row's photo in `source`. readers: how
    many load photos. decoder: `auto`, `cpu` or `gpu`, which decodes them. encoder: that of the
    record on the device, if there is one from earlier batches.

    A GPU computes one batch while the next one is copied to it or decoded on it. Raises
    DecoderError, StalledError, VanishedError, ShortageError, SourceError, ReaderError or
    EncoderError, the latter also for wrong features, see `FeatureChecks`.
    """
    filter = backbone.preprocessing.filter
    make_decoder = gpu_decoder(decoder, device, record.image_size, record.views, filter)
    on_gpu = make_decoder is not None
    loader = PhotoLoader(
        batches,
        lambda position: source.place(paths[int(order[position])]),
        batch_rows=batch_rows,
        image_size=record.image_size,
        views=record.views,
        readers=readers,
        processes=on_gpu or uses_processes(readers, device.type),
        files=on_gpu,
        both=1 if on_gpu else 0,
        pin_memory=device.type == "cuda",
        filter=filter,
    )
    loaded: PhotoLoader | GpuBatches = loader
    if make_decoder is not None:
        loaded = GpuBatches(
            loader,
            make_decoder,
            device=device,
            batch_rows=batch_rows,
            image_size=record.image_size,
            views=record.views,
            required=decoder == "gpu",
        )
    running: tuple[QueuedFeatures | None, LoadedBatch] | None = None  # on the device
    checks = FeatureChecks(backbone, record.precision, paths, beside=device.type == "cuda")
    with loaded:  # first, so that photos are read while the encoder is made
        if encoder is None:
            encoder = Encoder(
                backbone,
                device=device,
                precision=record.precision,
                image_size=record.image_size,
                views=record.views,
            )
        encoder.warm_up(batch_rows, len(batches))
        for batch in loaded:
            queued = _encode(encoder, batch), batch
            if running is not None:
                yield from checks.add(_encoded_batch(*running, order), running[1])
                loaded.release(running[1])
            running = queued
            for notices in (encoder.notices, loaded.notices):
                while notices:
                    yield notices.pop(0)
        if running is not None:
            yield from checks.add(_encoded_batch(*running, order), running[1])
        yield from checks.rest()


def _encode(encoder: Encoder, batch: LoadedBatch) -> QueuedFeatures | None:
    """The features of every place of the batch; None if no place holds a photo."""
    return encoder.queue(batch.pixels.flatten(0, 1)) if batch.decoded else None


def _encoded_batch(
    features: QueuedFeatures | None, batch: LoadedBatch, order: NDArray[np.int64]
) -> EncodedBatch:
    positions = np.array(sorted(batch.decoded), np.int64)
    places = positions - batch.first
    return EncodedBatch(
        rows=order[positions],
        features=(
            np.zeros((0, 0, 0), np.float16)
            if features is None
            else features.wait().reshape(*batch.pixels.shape[:2], -1)[places]
        ),
        digests=batch.digests[places],
        unreadable=[
            (int(order[position]), reason, batch.digests[position - batch.first])
            for position, reason in sorted(batch.errors.items())
        ],
    )
