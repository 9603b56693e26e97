"""Captioning: frozen encoder and trained decoder together, from photo files to captions.

from pipeline.captioner import Captioner
for prediction in Captioner.load("runs/base").caption(["dog.jpg", "beach.png"]):
    print(prediction.path, prediction.caption)
"""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cache.errors import CapError
from cache.store import DONE, FeatureCache
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.warm_up import begin_warm_up
from pipeline.photos.drive.answers import answer_of, prompt_answer_of
from pipeline.photos.folder import list_photos
from pipeline.photos.photo_loader import BatchRequest, LoadedBatch, PhotoLoader
from pipeline.photos.readers.start import MOST_THREADS, reader_count
from train.captions.sentence import sentence
from train.captions.views import chosen_view, mean_of_views, view_features, views_to_read
from train.captions.vocabulary import Vocabulary
from train.config import SearchConfig, check_search
from train.device import resolve_device
from train.model.bundle import Bundle, find_bundle, load_bundle
from train.scores.degenerate import degenerate
from train.search.hypotheses import Hypothesis, search_several

_BATCH_PHOTOS = 32
_CACHE_ROWS = 256  # how many rows of a cache are captioned at once
_JUDGED_CAPTIONS = 1000


class CaptionError(CapError):
    """Raised when a model computes no caption for a photo. The message is one line."""


@dataclass(frozen=True)
class Caption:
    """One of several captions for a photo."""

    caption: str  # as people write it: a sentence
    score: float  # length-normalized log-probability; 0 means certainty
    log_probs: tuple[float, ...] = ()  # of each of the words, then of the caption's end
    words: tuple[str, ...] = ()  # as the model knows them: in lower case, punctuation among them

    def as_dict(self, *, log_probs: bool = False) -> dict[str, Any]:
        """The fields for JSON. log_probs: with the log-probabilities of the words."""
        found: dict[str, Any] = {
            "caption": self.caption,
            "words": list(self.words),
            "score": round(self.score, 4),
        }
        if log_probs:
            found["log_probs"] = [round(value, 4) for value in self.log_probs]
        return found


@dataclass(frozen=True)
class Prediction:
    """The best caption for one photo, or the reason why there is none."""

    path: str
    caption: str  # as people write it: a sentence
    score: float  # length-normalized log-probability; 0 means certainty
    error: str = ""
    captions: tuple[Caption, ...] = ()  # as many as were asked for, the best one first

    @property
    def words(self) -> tuple[str, ...]:
        """The words of `caption` as the model knows them: in lower case, punctuation among them."""
        return self.captions[0].words if self.captions else ()

    def as_dict(self, *, log_probs: bool = False) -> dict[str, Any]:
        """The fields for JSON. `captions` is present only if there are several.

        log_probs: with the log-probabilities of the words.
        """
        if self.error:
            return {"path": self.path, "error": self.error}
        dicts = [caption.as_dict(log_probs=log_probs) for caption in self.captions]
        found: dict[str, Any] = {"path": self.path, **dicts[0]}
        if len(dicts) > 1:
            found["captions"] = dicts
        return found


class Captioner:
    """Captions photos with a trained model. See also `Captioner.load`."""

    def __init__(self, bundle: Bundle, encoder: Encoder, search_config: SearchConfig) -> None:
        self.bundle = bundle
        self.encoder = encoder
        self.search_config = search_config.up_to(bundle.vocabulary.longest)
        self._said: list[tuple[str, ...]] = []  # words of the first captions
        views = encoder.record.views
        self._views = views_to_read(views, chosen_view(search_config.view, views, bundle.training))

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        device: str = "auto",
        weights: str | None = None,
        search_config: SearchConfig | None = None,
    ) -> Captioner:
        """Load a model from its file or a run folder, together with the encoder behind it.

        weights: where the backbone's weights are now, if they are neither where the model's record
        says nor near the model. They must be the same weights. If the encoder is a program,
        FILE.py:FUNCTION, it is run only if it is named here. Raises BundleError, EncoderError,
        DeviceError, SearchError or ViewError.
        """
        chosen = resolve_device(device)
        begin_warm_up(chosen)
        bundle = load_bundle(model, chosen)
        search_config = search_config or SearchConfig()
        check_search(search_config)
        encoder = Encoder.load(
            bundle.encoder, device=chosen, weights=weights, near=find_bundle(Path(model))
        )
        return cls(bundle, encoder, search_config)

    def caption(self, paths: Iterable[str | Path]) -> list[Prediction]:
        """One prediction per path, in order. For a file that is no photo it has an `error`."""
        return list(self.stream(paths))

    def stream(self, paths: Iterable[str | Path]) -> Iterator[Prediction]:
        """Like `caption`, but batch by batch: one is captioned while the next is decoded.

        Raises StalledError if no photo comes from the disk for a minute.
        """
        names = [str(path) for path in paths]
        rows = range(len(names))
        requests = [
            BatchRequest(first, rows[first : first + _BATCH_PHOTOS])
            for first in rows[::_BATCH_PHOTOS]
        ]
        with PhotoLoader(
            requests,
            names.__getitem__,
            batch_rows=min(len(names), _BATCH_PHOTOS),
            image_size=self.encoder.record.image_size,
            views=self._views,
            readers=min(MOST_THREADS, reader_count(None)),
            filter=self.encoder.preprocessing.filter,
            advice="caption it and those behind it when the drive answers again",
        ) as loader:
            for request, batch in zip(requests, loader, strict=True):
                yield from self._caption_batch(request, batch, names)
                loader.release(batch)

    def _caption_batch(
        self, request: BatchRequest, batch: LoadedBatch, names: Sequence[str]
    ) -> list[Prediction]:
        rows = sorted(batch.decoded)
        places = [row - batch.first for row in rows]
        hypotheses = self._search(batch.pixels[places], rows) if rows else []
        found = dict(zip(rows, hypotheses, strict=True))
        self._remember(hypotheses)
        return [
            _prediction(names[row], self.bundle.vocabulary, found[row])
            if row in found
            else Prediction(names[row], "", float("-inf"), batch.errors[row])
            for row in request.rows
        ]

    def doubt(self) -> str | None:
        """Why the model's captions mean little, as a short clause; None if nothing speaks for it.

        A model may say so in its record of the training. Otherwise the captions so far are judged,
        up to a thousand of them, unless they were drawn at random.
        """
        recorded = self.bundle.training.get("degenerate")
        return str(recorded) if recorded else degenerate(self._said)

    def _remember(self, hypotheses: Sequence[Sequence[Hypothesis]]) -> None:
        if not self.search_config.sample:
            room = max(0, _JUDGED_CAPTIONS - len(self._said))
            best = [found[0].words for found in hypotheses if found][:room]
            self._said.extend(map(self.bundle.vocabulary.caption_words, best))

    def _search(self, pixels: torch.Tensor, numbers: list[int]) -> list[list[Hypothesis]]:
        """The captions found for each photo, the best first.

        pixels: (B, V, 3, S, S). numbers: the positions of the photos among all that are captioned.
        """
        features = self.encoder.encode(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
        return search_several(
            self.bundle.decoder, mean_of_views(features), self.search_config, numbers=numbers
        )


def _prediction(name: str, vocabulary: Vocabulary, found: list[Hypothesis]) -> Prediction:
    """The prediction of the hypotheses found, or an error if the decoder computes no numbers."""
    # Beam search then finds nothing; greedy search and sampling find something without a score.
    if not found or not math.isfinite(found[0].score):
        return Prediction(
            name, "", float("-inf"), "the model's probabilities are not finite (NaN or infinity)"
        )
    captions = tuple(_caption(vocabulary, hypothesis) for hypothesis in found)
    return Prediction(name, captions[0].caption, captions[0].score, captions=captions)


def _caption(vocabulary: Vocabulary, hypothesis: Hypothesis) -> Caption:
    words = vocabulary.caption_words(hypothesis.words)
    return Caption(sentence(words, vocabulary), hypothesis.score, hypothesis.log_probs, words)


def caption_cache(
    bundle: Bundle,
    cache: FeatureCache,
    search_config: SearchConfig,
    *,
    rows: NDArray[np.int64] | None = None,
    report: Callable[[int, int], None] | None = None,
) -> dict[str, Prediction]:
    """Captions for photos of a cache, by image id. Reads no photo file.

    rows: of the photos, ascending; None for all that were extracted. report: is told how many
    photos of how many are done. Raises SearchError, ViewError or CaptionError (a photo gets no
    caption).
    """
    search_config = search_config.up_to(bundle.vocabulary.longest)
    view = chosen_view(search_config.view, cache.encoder.views, bundle.training)
    device = next(bundle.decoder.parameters()).device
    predictions = {}
    wanted = cache.rows_with(DONE) if rows is None else rows
    for start in range(0, len(wanted), _CACHE_ROWS):
        chosen = wanted[start : start + _CACHE_ROWS]
        found = search_several(
            bundle.decoder,
            view_features(cache, chosen, view).to(device),
            search_config,
            numbers=chosen.tolist(),
        )
        for row, hypotheses in zip(chosen.tolist(), found, strict=True):
            prediction = _prediction(cache.paths[row], bundle.vocabulary, hypotheses)
            if prediction.error:
                raise CaptionError(
                    f"{cache.path}: no caption for {prediction.path} ({prediction.error}); "
                    "use another model"
                )
            predictions[cache.image_ids[row]] = prediction
        if report is not None:
            report(len(predictions), len(wanted))
    return predictions


def find_photos(paths: Iterable[str], notices: list[str] | None = None) -> list[str]:
    """The given files, the photos below the given folders, and the matches of globs.

    Photos of one folder or glob are sorted, and no file is named twice. A name that matches nothing
    stays in the list, so that captioning it tells what is wrong. notices: gets a line about what
    else a folder holds. Raises FolderError if a folder cannot be read, and StalledError if the
    drive of one of them does not answer.
    """
    paths = list(paths)
    for path in paths:
        prompt_answer_of(partial(os.path.exists, path), path)
    return answer_of(lambda: _find_photos(paths, notices))


def _find_photos(paths: Iterable[str], notices: list[str] | None) -> list[str]:
    found: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            below = list_photos(Path(path))
            found.extend(str(below.folder / name) for name in below.paths)
            if notices is not None and (line := below.notice()):
                notices.append(line)
        elif os.path.exists(path):
            found.append(path)
        else:
            found.extend(sorted(glob.glob(path, recursive=True)) or [path])
    return list(dict.fromkeys(found))
