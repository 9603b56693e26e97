"""The training set in memory: the tokens of all captions and the features of their photos.

A step needs 128 rows of a few kilobytes each and 128 short rows of words. One indexing operation
gathers each of them from a flat array, so the training loop needs no worker processes and no files.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.errors import CapError
from cache.record import offsets_of
from cache.store import DONE, FeatureCache
from train.captions.streaming.held import HeldFeatures
from train.captions.streaming.stream import FeatureStream
from train.captions.views import full_view_index
from train.captions.vocabulary import END, PAD, Vocabulary

_UPLOAD_ROWS = 8192
_READ_ROWS = 1024  # at a time, of which one view each is kept
_PART_CAPTIONS = 1 << 18  # numbered at a time, so that their places in the table need few bytes


class TrainingSetError(CapError):
    """Raised when a cache holds nothing to train on. The message is one line."""


@dataclass(frozen=True)
class Batch:
    """B captions, longest first. T is the number of the longest one's words, plus 1 for `<end>`.

    Step 1 reads the photo and predicts targets[:, 0]. Step t > 1 reads inputs[:, t - 2] and
    predicts targets[:, t - 1].
    """

    features: Tensor  # (B, D) float16
    inputs: Tensor  # (B, T - 1) int64: the words, then <pad>
    targets: Tensor  # (B, T) int64: the words, <end>, then <pad>


class CaptionSet:
    """The captions of some photos of a cache, as numbers of one vocabulary, on one device.

    Made by `caption_set`. `len` is the number of captions.
    """

    def __init__(
        self,
        cache: FeatureCache,
        caption_rows: NDArray[np.int64],
        words: NDArray[np.int32],
        offsets: NDArray[np.int64],
        full_view: int,
        device: torch.device,
        features_from: CaptionSet | Future[Tensor] | FeatureStream | HeldFeatures | None = None,
    ) -> None:
        """caption_rows: (M,) the row in `cache` of each caption. words: of all captions in turn;
        caption m is words[offsets[m] : offsets[m + 1]]. full_view: index of the view that
        evaluation uses. features_from: a set with the same features, whose copy of them on the
        device is used; what `begin_upload` returned; or features of all photos of these captions,
        at one time or another.
        """
        self.device = device
        self.views, self.feature_dim = cache.features.shape[1:]
        self.full_view = full_view
        self.feature_rows, self.words, self.offsets = caption_rows, words, offsets
        self.lengths = np.diff(offsets) + 1  # (M,) number of targets, with <end>
        # On the device: all words, and for each caption where it starts and its number of targets.
        self.tokens = torch.from_numpy(words).to(device)
        self.starts = torch.from_numpy(offsets[:-1]).to(device)
        self.targets = torch.from_numpy(self.lengths).to(device)
        self.stream = features_from if isinstance(features_from, FeatureStream) else None
        held = features_from if self.stream is None else self.stream.held
        self._held = held if isinstance(held, HeldFeatures) else None
        places = caption_rows
        if self._held is not None:
            places = np.searchsorted(self._held.photos, caption_rows).astype(np.int32)
        # Of each caption's photo: its row in the features below or, if only some are held, its
        # number among them.
        self._rows = torch.from_numpy(places).to(device)
        self._cache = cache
        # Unless they are streamed, a GPU holds all features (COCO: 0.34 GB), and on a CPU the file
        # stays memory-mapped.
        self._device_features: Tensor | None = None
        if self._held is not None:
            self._device_features = self._held.features
        elif isinstance(features_from, CaptionSet):
            self._device_features = features_from._device_features
        elif isinstance(features_from, Future):
            self._device_features = features_from.result()
        elif device.type != "cpu" or cache.shards is not None:
            self._device_features = _upload(cache, device)

    def __len__(self) -> int:
        return len(self.feature_rows)

    def batch(self, captions: NDArray[np.int64], views: NDArray[np.int64] | None = None) -> Batch:
        """The batch of these captions (B,), reordered longest first.

        views: (B,) the view of each caption's photo; None for the full view.
        """
        order = np.argsort(-self.lengths[captions], kind="stable")
        captions = captions[order]
        chosen = np.full(len(captions), self.full_view) if views is None else views[order]
        return self.gather(
            torch.from_numpy(captions).to(self.device, non_blocking=True),
            torch.from_numpy(chosen).to(self.device, non_blocking=True),
            int(self.lengths[captions].max()),
        )

    def gather(self, captions: Tensor, views: Tensor, length: int) -> Batch:
        """The batch of these captions, in the given order, without any work on the host.

        captions: (B,) int64; views: (B,) the view of each caption's photo; length: T.
        """
        starts, lengths = self.starts[captions], self.targets[captions].unsqueeze(1)
        steps = torch.arange(length, device=self.device)  # (T,)
        positions = (starts.unsqueeze(1) + steps).clamp_max(len(self.tokens) - 1)  # (B, T)
        words = torch.where(steps < lengths - 1, self.tokens[positions].long(), PAD)
        return Batch(
            features=self.features_of(captions, views),
            inputs=words[:, :-1],
            targets=torch.where(steps == lengths - 1, END, words),
        )

    def features_of(self, captions: Tensor, views: Tensor) -> Tensor:
        """(B, D) float16 features of the photos of these captions (B,), in these views (B,)."""
        rows = self._rows[captions]
        return self._features(rows if self._held is None else self._held.slots[rows], views)

    def photo_features(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> Tensor:
        """(B, D) float16 features on the device, of rows (B,) of the cache in these views (B,)."""
        if self._held is not None:
            slots = self._held.slots_of(rows)
            if slots is None:
                return self._read(rows, views).to(self.device)
            rows = slots.astype(np.int64)
        return self._features(
            torch.from_numpy(rows).to(self.device), torch.from_numpy(views).to(self.device)
        )

    def _features(self, rows: Tensor, views: Tensor) -> Tensor:
        if self._device_features is None:
            self._cache.check_unchanged()  # reading beyond the end of a file kills the process
            return torch.from_numpy(self._cache.features[rows.numpy(), views.numpy()])
        return self._device_features[rows, views]

    def _read(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> Tensor:
        """(B, D) float16 features on the host, of rows (B,) that need not be in memory."""
        features = np.empty((len(rows), self.feature_dim), np.float16)
        order = np.argsort(rows, kind="stable")  # as a disk likes it
        for start in range(0, len(order), _READ_ROWS):
            part = order[start : start + _READ_ROWS]
            features[part] = self._cache.read_rows(rows[part])[np.arange(len(part)), views[part]]
        return torch.from_numpy(features)


def caption_set(
    cache: FeatureCache,
    vocabulary: Vocabulary,
    *,
    rows: NDArray[np.int64] | None = None,
    device: torch.device,
    max_length: int,
    features_from: CaptionSet | Future[Tensor] | FeatureStream | HeldFeatures | None = None,
) -> CaptionSet:
    """The captions of a cache's extracted photos, or of those among `rows`.

    Captions are cut after `max_length` words. Captions without a word and photos that are pending
    or unreadable are left out. features_from: another set from this cache on this device, with
    which this one shares the features there, a copy of them from `begin_upload`, or what streams or
    holds those of `captioned_photos`. Raises TrainingSetError if nothing is left.
    """
    table = cache.captions
    kept = _usable_captions(cache, rows)
    lengths = np.diff(table.token_offsets)[kept]
    offsets = offsets_of(np.minimum(lengths, max_length))
    numbers = vocabulary.numbers_for(table)
    words = np.empty(offsets[-1], np.int32)
    for start in range(0, len(kept), _PART_CAPTIONS):
        part = kept[start : start + _PART_CAPTIONS]
        own = offsets[start : start + len(part) + 1]
        # Where each word comes from: its caption's start plus its place in it.
        shift = np.repeat(table.token_offsets[part] - (own[:-1] - own[0]), np.diff(own))
        source = shift + np.arange(len(shift))
        words[own[0] : own[-1]] = numbers[table.tokens[source]]
    return CaptionSet(
        cache=cache,
        caption_rows=table.rows[kept].astype(np.int64),
        words=words,
        offsets=offsets,
        full_view=full_view_index(cache.encoder.views),
        device=device,
        features_from=features_from,
    )


def captioned_photos(
    cache: FeatureCache, rows: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(the rows (P,), ascending, of the photos whose captions `caption_set` takes, the number of
    captions (P,) of each). Raises TrainingSetError if there are none.
    """
    kept = cache.captions.rows[_usable_captions(cache, rows)]
    photos, counts = np.unique(kept, return_counts=True)
    return photos.astype(np.int64), counts


def _usable_captions(cache: FeatureCache, rows: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """The captions with words, by number, of extracted photos (of those among `rows`)."""
    table = cache.captions
    usable = cache.status == DONE
    if rows is not None:
        chosen = np.zeros(len(cache), bool)
        chosen[rows] = True
        usable &= chosen
    lengths = np.diff(table.token_offsets)
    kept = np.flatnonzero(usable[table.rows] & (lengths > 0))
    if not len(kept):
        raise TrainingSetError(
            f"{cache.path}: no captions of extracted photos; was it made with --captions?"
        )
    return kept


def begin_upload(cache: FeatureCache, device: torch.device) -> Future[Tensor] | None:
    """Let a thread copy the features of a cache to a GPU, or those of a catalogue to memory. None
    for a cache on a CPU, which maps the file.
    """
    if device.type == "cpu" and cache.shards is None:
        return None
    executor = ThreadPoolExecutor(1)
    begun = executor.submit(_upload, cache, device)
    executor.shutdown(wait=False)
    return begun


def _upload(cache: FeatureCache, device: torch.device) -> Tensor:
    """Copy the features (N, V, D) to a device, in parts, so that they need no memory beside it."""
    uploaded = torch.empty(cache.features.shape, dtype=torch.float16, device=device)
    for start in range(0, len(cache), _UPLOAD_ROWS):
        rows = np.arange(start, min(start + _UPLOAD_ROWS, len(cache)))
        uploaded[start : start + len(rows)].copy_(torch.from_numpy(cache.read_rows(rows)))
    return uploaded
