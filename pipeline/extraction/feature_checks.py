"""Features that may be wrong are compared with the plain network's before they are stored."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.record import Strings
from pipeline.encoder.backbone import Backbone
from pipeline.encoder.errors import EncoderError
from pipeline.encoder.precision import check_features
from pipeline.photos.photo_loader import LoadedBatch

_MOST_HELD = 256  # batches


@dataclass(frozen=True)
class EncodedBatch:
    """The results for the rows of a batch that were pending."""

    rows: NDArray[np.int64]  # (R,) ascending
    features: NDArray[np.float16]  # (R, V, D)
    digests: NDArray[np.uint8]  # (R, 16)
    unreadable: list[tuple[int, str, NDArray[np.uint8]]]  # row, reason, digest


class FeatureChecks:
    """Holds batches back until their features are known to be right.

    Compared are the features of the first photo, and all that are zero or not finite.
    """

    def __init__(self, backbone: Backbone, precision: str, paths: Strings, *, beside: bool) -> None:
        """paths: of each row's photo. beside: whether the first photo is compared by a thread,
        while the next batches are computed: the plain network takes a second, in which a GPU
        computes dozens of batches.
        """
        self._backbone, self._precision, self._paths = backbone, precision, paths
        self._thread = ThreadPoolExecutor(1, "check") if beside else None
        self._first: Future[None] | None = None
        self._is_first = True
        self._held: list[EncodedBatch] = []

    def add(self, encoded: EncodedBatch, batch: LoadedBatch) -> Iterator[EncodedBatch]:
        """The batches that may be stored now, in order. batch: what the features are of.

        Raises EncoderError if features are wrong.
        """
        self._held.append(encoded)
        suspects = suspicious(encoded.features)
        if self._is_first and len(encoded.rows):
            self._is_first = False
            self._check_first(encoded, self._pixels(batch, 0, 0))
            suspects = [place for place in suspects if place != (0, 0)]
        for number, view in suspects:
            self._check(encoded, number, view, self._pixels(batch, number, view))
        if self._first is None or self._first.done() or len(self._held) > _MOST_HELD:
            yield from self.rest()

    def rest(self) -> Iterator[EncodedBatch]:
        """The batches that are still held, once they are known to be right. Raises EncoderError."""
        if self._first is not None:
            self._first.result()
            self._first = None
        while self._held:
            yield self._held.pop(0)

    def _check_first(self, encoded: EncodedBatch, pixels: Tensor) -> None:
        if self._thread is None:
            self._check(encoded, 0, 0, pixels)
            return
        self._first = self._thread.submit(self._check, encoded, 0, 0, pixels)
        self._thread.shutdown(wait=False)

    def _check(self, encoded: EncodedBatch, number: int, view: int, pixels: Tensor) -> None:
        features = torch.from_numpy(encoded.features[number, view])
        try:
            check_features(self._backbone, pixels, features, self._precision)
        except EncoderError as error:
            raise EncoderError(f"{self._paths[int(encoded.rows[number])]}: {error}") from None

    def _pixels(self, batch: LoadedBatch, number: int, view: int) -> Tensor:
        """(1, 3, S, S) uint8 on the CPU, of a view of the number-th photo that has pixels."""
        place = sorted(batch.decoded)[number] - batch.first
        return batch.pixels[place, view : view + 1].cpu().clone()


def suspicious(features: NDArray[np.float16]) -> list[tuple[int, int]]:
    """(photo, view) of features (R, V, D) that may be wrong: all zero, or not finite."""
    if not len(features):
        return []
    # Three times as fast as `np.isfinite` and `any`: without the sign, a float16 that is infinite
    # or NaN is at least 0x7c00.
    largest = (features.view("<u2") & 0x7FFF).max(axis=2)
    suspect = (largest == 0) | (largest >= 0x7C00)
    return [(photo, view) for photo, view in np.argwhere(suspect).tolist()]
