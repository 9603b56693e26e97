"""The training set, resident: every caption's tokens and every photo's features at hand.

A step needs 128 rows of a few kilobytes and 128 short rows of words. Both are gathered from flat
arrays with one indexing operation each; there are no workers and no files in the loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.errors import CapError
from cache.store import DONE, FeatureCache
from train.captions.views import full_view_index
from train.captions.vocabulary import END, PAD, Vocabulary

_UPLOADED_ROWS = 8192


class TrainingSetError(CapError):
    """A cache holds nothing to train on. One line."""


@dataclass(frozen=True)
class Batch:
    """B captions, longest first. T is the longest caption's words and `<end>`.

    Step 1 reads the photo and predicts targets[:, 0]; step t > 1 reads inputs[:, t - 2].
    """

    features: Tensor  # (B, D) float16
    inputs: Tensor  # (B, T - 1) int64: the words, then <pad>
    targets: Tensor  # (B, T) int64: the words, <end>, then <pad>


class CaptionSet:
    """The captions of some photos of a cache, as numbers of one vocabulary, on one device.

    Use `caption_set`. `len` is the number of captions.
    """

    def __init__(
        self,
        features: NDArray[np.float16],
        caption_rows: NDArray[np.int64],
        words: NDArray[np.int32],
        offsets: NDArray[np.int64],
        full_view: int,
        device: torch.device,
        shared: CaptionSet | None = None,
    ) -> None:
        """features: (N, V, D); caption_rows: (M,) into it; words: flat, cut by offsets (M + 1,).

        shared: a set of other captions of the same features, which are then on the device once.
        """
        self.device = device
        self.views, self.feature_dim = features.shape[1:]
        self.full_view = full_view
        self.feature_rows, self.words, self.offsets = caption_rows, words, offsets
        self.lengths = np.diff(offsets) + 1  # (M,) targets of each caption, <end> included
        # The same on the device; of each caption its first token and how many targets it has.
        self.tokens = torch.from_numpy(words).to(device)
        self.starts = torch.from_numpy(offsets[:-1].copy()).to(device)
        self.targets = torch.from_numpy(self.lengths).to(device)
        self._rows = torch.from_numpy(caption_rows).to(device)
        self._host_features = features
        # On a GPU all of it lives there (COCO: 0.34 GB); on a CPU the file stays memory-mapped.
        self._device_features: Tensor | None = None
        if shared is not None:
            self._device_features = shared._device_features
        elif device.type != "cpu":
            self._device_features = _uploaded(features, device)

    def __len__(self) -> int:
        return len(self.feature_rows)

    def batch(self, captions: NDArray[np.int64], views: NDArray[np.int64] | None = None) -> Batch:
        """The batch of these captions (B,), reordered longest first.

        views: (B,) the view of the photo to take for each caption; None: the full one.
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
        """The batch of captions (B,) int64 in their order, `length` targets wide (T), each photo
        by its view (B,). Works on the device alone, so it can be part of a captured graph.
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
        """(B, D) float16: the photo of each of these captions (B,), by its view (B,)."""
        return self._features(self._rows[captions], views)

    def photo_features(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> Tensor:
        """(B, D) float16 on the device: of these rows of the cache, each by its view."""
        return self._features(
            torch.from_numpy(rows).to(self.device), torch.from_numpy(views).to(self.device)
        )

    def _features(self, rows: Tensor, views: Tensor) -> Tensor:
        if self._device_features is None:
            return torch.from_numpy(self._host_features[rows.numpy(), views.numpy()])
        return self._device_features[rows, views]


def caption_set(
    cache: FeatureCache,
    vocabulary: Vocabulary,
    *,
    rows: NDArray[np.int64] | None = None,
    device: torch.device,
    max_length: int,
    shared: CaptionSet | None = None,
) -> CaptionSet:
    """The captions of the cache's extracted photos, or of those `rows` of it.

    Words beyond `max_length` are cut, and the caption ends there. Captions without a word and
    photos that are pending or unreadable are left out. shared: another set from this cache on this
    device. Raises TrainingSetError if nothing is left.
    """
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
    offsets = np.zeros(len(kept) + 1, np.int64)
    np.cumsum(np.minimum(lengths[kept], max_length), out=offsets[1:])
    # Position p of the new flat array comes from its caption's start plus its place within it.
    caption_of = np.repeat(np.arange(len(kept)), np.diff(offsets))
    source = table.token_offsets[kept][caption_of] + (
        np.arange(offsets[-1]) - offsets[:-1][caption_of]
    )
    words = vocabulary.numbers_for(table)[table.tokens[source]]
    return CaptionSet(
        features=cache.features,
        caption_rows=table.rows[kept].astype(np.int64),
        words=words,
        offsets=offsets,
        full_view=full_view_index(cache.encoder.views),
        device=device,
        shared=shared,
    )


def _uploaded(features: NDArray[np.float16], device: torch.device) -> Tensor:
    """(N, V, D) on the device. Read in parts: torch wants arrays that it may write to."""
    uploaded = torch.empty(features.shape, dtype=torch.float16, device=device)
    for start in range(0, len(features), _UPLOADED_ROWS):
        part = slice(start, start + _UPLOADED_ROWS)
        uploaded[part].copy_(torch.from_numpy(np.array(features[part])))
    return uploaded
