"""Rows of a cache through an encoder: batches loaded ahead, encoded, and handed on as arrays.

Every photo is encoded at its own place of a batch of one shape, with black where a row is done
already or unreadable: features may depend in the last bit on both, and with both fixed an
interrupted run computes what an unbroken one does, and several devices what one would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.record import Strings
from cache.store import DIGEST_BYTES, PENDING
from pipeline.encoder.encoder import Encoder, QueuedFeatures
from pipeline.photos.photo_loader import LoadedBatch, PhotoLoader


@dataclass(frozen=True)
class EncodedRows:
    """What became of a batch's pending rows."""

    rows: NDArray[np.int64]  # (R,) ascending
    features: NDArray[np.float16]  # (R, V, D)
    digests: NDArray[np.uint8]  # (R, 16)
    unreadable: list[tuple[int, str, NDArray[np.uint8]]]  # row, reason, digest

    def __len__(self) -> int:
        return len(self.rows) + len(self.unreadable)


Batches = Sequence[tuple[int, Sequence[int]]]


def pending_batches(
    order: NDArray[np.int64], status: NDArray[np.uint8], batch_rows: int
) -> Batches:
    """(first position, positions of pending rows) of every batch that has one.

    order: rows as they fill the batches, one after the other; a position is an index into it.
    """
    in_order = status[order]
    return [
        (first, (first + np.flatnonzero(part == PENDING)).tolist())
        for first in range(0, len(order), batch_rows)
        if (part := in_order[first : first + batch_rows]).min() == PENDING
    ]


def encode_batches(
    encoder: Encoder,
    order: NDArray[np.int64],
    batches: Batches,
    *,
    images: Path,
    paths: Strings,
    batch_rows: int,
    threads: int,
) -> Iterator[EncodedRows | str]:
    """Encode `pending_batches`, one after the other; a str is a notice for the user.

    On a GPU a batch is still being computed while the next one is copied. Raises StalledError or
    EncoderError.
    """
    loader = PhotoLoader(
        batches,
        lambda position: images / paths[int(order[position])],
        batch_rows=batch_rows,
        image_size=encoder.record.image_size,
        views=encoder.record.views,
        threads=threads,
        pin_memory=encoder.device.type == "cuda",
    )
    running: tuple[QueuedFeatures | None, LoadedBatch] | None = None  # on the device
    with loader:
        for batch in loader:
            queued = _encode(encoder, batch), batch
            if running is not None:
                yield _encoded_rows(*running, order)
                loader.release(running[1])
            running = queued
            while encoder.notices:
                yield encoder.notices.pop(0)
        if running is not None:
            yield _encoded_rows(*running, order)


def _encode(encoder: Encoder, batch: LoadedBatch) -> QueuedFeatures | None:
    """The features of every place; None if none of them holds a photo."""
    return encoder.queue(batch.pixels.flatten(0, 1)) if batch.decoded else None


def _encoded_rows(
    features: QueuedFeatures | None, batch: LoadedBatch, order: NDArray[np.int64]
) -> EncodedRows:
    positions = np.array(sorted(batch.decoded), np.int64)
    digests = [batch.reads[position].digest for position in positions.tolist()]
    return EncodedRows(
        rows=order[positions],
        features=(
            np.zeros((0, 0, 0), np.float16)
            if features is None
            else features.wait().reshape(*batch.pixels.shape[:2], -1)[positions - batch.first]
        ),
        digests=np.array(digests, np.uint8).reshape(-1, DIGEST_BYTES),
        unreadable=[
            (int(order[position]), read.error, read.digest)
            for position, read in sorted(batch.reads.items())
            if read.error
        ],
    )
