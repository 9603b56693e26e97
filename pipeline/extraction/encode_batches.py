"""Encoding the pending rows of a cache, batch by batch, while the next photos are loaded.

All batches have one shape, and every photo has a fixed place in its batch; rows that are done or
unreadable are black. The last bits of a feature may depend on both. With both fixed, a run that was
interrupted computes the same bytes as an unbroken one, and several devices the same as one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cache.record import Strings
from cache.store import PENDING
from pipeline.encoder.backbone import Backbone, EncoderError
from pipeline.encoder.encoder import Encoder, QueuedFeatures
from pipeline.encoder.precision import check_features
from pipeline.extraction.gpu_batches import GpuBatches, gpu_decoder
from pipeline.photos.photo_loader import BatchRequest, LoadedBatch, PhotoLoader
from pipeline.photos.readers.start import uses_processes


@dataclass(frozen=True)
class EncodedBatch:
    """The results for the rows of a batch that were pending."""

    rows: NDArray[np.int64]  # (R,) ascending
    features: NDArray[np.float16]  # (R, V, D)
    digests: NDArray[np.uint8]  # (R, 16)
    unreadable: list[tuple[int, str, NDArray[np.uint8]]]  # row, reason, digest


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
    encoder: Encoder,
    backbone: Backbone,
    order: NDArray[np.int64],
    batches: Sequence[BatchRequest],
    *,
    images: Path,
    paths: Strings,
    batch_rows: int,
    readers: int,
    decoder: str = "auto",
) -> Iterator[EncodedBatch | str]:
    """Encode `pending_batches` one after the other. A str is a notice for the user.

    backbone: of the encoder. paths: of each row's photo below `images`. readers: how many load
    photos. decoder: `auto`, `cpu` or `gpu`, which decodes them.

    A GPU computes one batch while the next one is copied to it or decoded on it. Raises
    DecoderError, StalledError, VanishedError, ShortageError, ReaderError or EncoderError, the
    latter also for wrong features: those of the first photo, and all that are zero or not finite,
    are compared with the plain network's.
    """
    record, device = encoder.record, encoder.device
    make_decoder = gpu_decoder(decoder, device, record.image_size, record.views)
    on_gpu = make_decoder is not None
    loader = PhotoLoader(
        batches,
        lambda position: os.path.join(images, paths[int(order[position])]),
        batch_rows=batch_rows,
        image_size=record.image_size,
        views=record.views,
        readers=readers,
        processes=on_gpu or uses_processes(readers, device.type),
        files=on_gpu,
        both=1 if on_gpu else 0,
        pin_memory=device.type == "cuda",
    )
    source: PhotoLoader | GpuBatches = loader
    if make_decoder is not None:
        source = GpuBatches(
            loader,
            make_decoder,
            device=device,
            batch_rows=batch_rows,
            image_size=record.image_size,
            views=record.views,
            required=decoder == "gpu",
        )
    running: tuple[QueuedFeatures | None, LoadedBatch] | None = None  # on the device
    first = True

    def finished(queued: QueuedFeatures | None, batch: LoadedBatch) -> EncodedBatch:
        nonlocal first
        encoded = _encoded_batch(queued, batch, order)
        for number, view in _suspects(encoded.features, first):
            place = sorted(batch.decoded)[number] - batch.first
            try:
                check_features(
                    backbone,
                    batch.pixels[place, view : view + 1].cpu(),
                    torch.from_numpy(encoded.features[number, view]),
                    encoder.record.precision,
                )
            except EncoderError as error:
                raise EncoderError(f"{paths[int(encoded.rows[number])]}: {error}") from None
        first = first and not len(encoded.rows)
        return encoded

    with source:
        for batch in source:
            queued = _encode(encoder, batch), batch
            if running is not None:
                yield finished(*running)
                source.release(running[1])
            running = queued
            for notices in (encoder.notices, source.notices):
                while notices:
                    yield notices.pop(0)
        if running is not None:
            yield finished(*running)


def _encode(encoder: Encoder, batch: LoadedBatch) -> QueuedFeatures | None:
    """The features of every place of the batch; None if no place holds a photo."""
    return encoder.queue(batch.pixels.flatten(0, 1)) if batch.decoded else None


def _suspects(features: NDArray[np.float16], first: bool) -> list[tuple[int, int]]:
    """(photo, view) of features (R, V, D) that may be wrong: all zero, or not finite.

    first: whether the first photo is suspect in any case.
    """
    if not len(features):
        return []
    # Three times as fast as `np.isfinite` and `any`: without the sign, a float16 that is infinite
    # or NaN is at least 0x7c00.
    largest = (features.view("<u2") & 0x7FFF).max(axis=2)
    suspect = (largest == 0) | (largest >= 0x7C00)
    suspect[0, 0] |= first
    return [(photo, view) for photo, view in np.argwhere(suspect).tolist()]


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
