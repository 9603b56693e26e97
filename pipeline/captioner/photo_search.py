"""Photos of a cache that fit a sentence, or that look like another photo. Reads cached features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.errors import CapError
from cache.record import CacheError
from cache.store import DONE, FeatureCache
from pipeline.encoder.encoder import Encoder
from pipeline.photos.readers.in_memory import Photo, name_of, read_any
from train.captions.tokenizer import tokenize
from train.captions.views import chosen_view, mean_of_views, view_features, views_to_read
from train.captions.vocabulary import END, UNK, Vocabulary
from train.config import AUTO, FULL
from train.device import resolve_device
from train.model.bundle import Bundle
from train.search.likelihood import likeliest, log_likelihoods

_BLOCK_ROWS = 1024  # read and compared at once; the first ones get no bounds
_AVERAGED_ROWS = 1000  # whose mean stands for no photo in particular
_FINAL = frozenset(".!?。！？")  # a sentence that ends with one of these is a whole caption

Report = Callable[[int, int], None]


class PhotoSearchError(CapError):
    """Raised when there is nothing to search with. The message is one line."""


@dataclass(frozen=True)
class FoundPhoto:
    """A photo that was found. `score` is described by the search that found it."""

    path: str  # as the cache has it: relative to the image folder
    image_id: str
    score: float

    def as_dict(self) -> dict[str, Any]:
        return {"path": self.path, "image_id": self.image_id, "score": round(self.score, 4)}


@dataclass(frozen=True)
class Query:
    """A sentence as a model knows it."""

    words: tuple[str, ...]
    numbers: tuple[int, ...]  # of the words, and <end> if the sentence is a whole caption
    unknown: tuple[str, ...]  # words that the model does not know, and that are left out

    @classmethod
    def of(cls, text: str, vocabulary: Vocabulary) -> Query:
        """Raises PhotoSearchError if the model knows no word of the sentence."""
        found = tokenize(text, vocabulary.tokenizer)
        numbers = [vocabulary.number(word) for word in found]
        known = [word for word, number in zip(found, numbers, strict=True) if number != UNK]
        unknown = [word for word, number in zip(found, numbers, strict=True) if number == UNK]
        if not any(any(map(str.isalnum, word)) for word in known):
            what = ", ".join(map(repr, unknown)) or "there is none"
            raise PhotoSearchError(
                f"{text!r}: the model knows no word of it ({what}); use words of its captions"
            )
        ends = [END] if known[-1] in _FINAL else []
        kept = [number for number in numbers if number != UNK]
        return cls(tuple(known), (*kept, *ends), tuple(unknown))


def search_by_words(
    bundle: Bundle,
    cache: FeatureCache,
    query: Query,
    count: int,
    *,
    view: str = AUTO,
    report: Report | None = None,
) -> list[FoundPhoto]:
    """The photos for which the model finds a sentence likeliest, best first.

    A score is the log-probability of the sentence for the photo, less that for the average photo.
    Above 0 the photo makes the sentence likelier. report: is told how many photos of how many are
    compared. Raises CacheError (features of another encoder, or none) or ViewError.
    """
    difference = cache.encoder.difference(bundle.encoder)
    if difference is not None:
        raise CacheError(
            f"{cache.path}: made with {difference} as the features that the model was trained on"
        )
    view = chosen_view(view, cache.encoder.views, bundle.training)
    device = next(bundle.decoder.parameters()).device
    blocks = _blocks(cache, view, device, report)
    average = _average(cache, view).to(device)
    usual = float(log_likelihoods(bundle.decoder, average[None], query.numbers)[0])
    found = likeliest(bundle.decoder, blocks, query.numbers, count)
    return _found(cache, found.rows, found.log_probs - usual)


def search_by_photo(
    cache: FeatureCache,
    photo: Photo,
    count: int,
    *,
    device: str = "auto",
    weights: str | None = None,
    report: Report | None = None,
) -> list[FoundPhoto]:
    """The photos whose features are nearest to those of a photo, the nearest first.

    A score is the cosine between the two, both less the features of the average photo: 1 for the
    photo itself, about 0 for one that has nothing to do with it. weights: as for `Captioner.load`.
    Raises PhotoSearchError (the photo cannot be read), EncoderError, CacheError or DeviceError.
    """
    encoder = Encoder.load(
        cache.encoder, device=resolve_device(device), weights=weights, near=cache.path
    )
    views = views_to_read(cache.encoder.views, FULL)
    read = read_any(photo, cache.encoder.image_size, views, encoder.preprocessing.filter)
    if read.pixels is None:
        raise PhotoSearchError(f"{name_of(photo, 1)}: {read.error}")
    average = _average(cache, FULL)
    like = mean_of_views(encoder.encode(read.pixels).cpu()[None])[0].float() - average
    best = np.empty(0, np.float32)
    of = np.empty(0, np.int64)
    for rows, features in _blocks(cache, FULL, torch.device("cpu"), report):
        cosines = torch.cosine_similarity(features.float() - average, like[None])
        best, of = np.concatenate([best, cosines.numpy()]), np.concatenate([of, rows])
        order = np.lexsort((of, -best))[:count]
        best, of = best[order], of[order]
    return _found(cache, of, best)


def _blocks(
    cache: FeatureCache, view: str, device: torch.device, report: Report | None
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """(rows (B,), features (B, D) on the device) of all photos that have features."""
    done = cache.rows_with(DONE)
    if not len(done):
        raise CacheError(f"{cache.path}: has no photo with features")
    for start in range(0, len(done), _BLOCK_ROWS):
        rows = done[start : start + _BLOCK_ROWS]
        yield rows, view_features(cache, rows, view).to(device)
        if report is not None:
            report(start + len(rows), len(done))


def _average(cache: FeatureCache, view: str) -> Tensor:
    """(D,) float32: the mean of the features of photos from all over the cache."""
    done = cache.rows_with(DONE)
    if not len(done):
        raise CacheError(f"{cache.path}: has no photo with features")
    places = np.linspace(0, len(done) - 1, min(_AVERAGED_ROWS, len(done))).astype(np.int64)
    return view_features(cache, done[places], view).float().mean(0)


def _found(
    cache: FeatureCache, rows: NDArray[np.int64], scores: NDArray[np.float32]
) -> list[FoundPhoto]:
    return [
        FoundPhoto(Path(cache.paths[row]).as_posix(), cache.image_ids[row], score)
        for row, score in zip(rows.tolist(), scores.tolist(), strict=True)
    ]
