"""Captioning: frozen encoder and trained decoder together, from photos to captions.

from pipeline import Captioner
for prediction in Captioner.load("runs/base").caption(["dog.jpg", "beach.png"]):
    print(prediction.path, prediction.caption)
"""

from __future__ import annotations

import glob
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from cache.errors import CapError
from cache.store import DONE, FeatureCache
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.warm_up import begin_warm_up
from pipeline.photos.drive.answers import answer_of, prompt_answer_of
from pipeline.photos.folder import list_photos
from pipeline.photos.photo_file import ReadPhoto
from pipeline.photos.photo_loader import BatchRequest, PhotoLoader
from pipeline.photos.readers.in_memory import Photo, as_photos, name_of, read_any
from pipeline.photos.readers.start import MOST_THREADS, reader_count
from train.captions.sentence import sentence
from train.captions.views import chosen_view, mean_of_views, view_features, views_to_read
from train.captions.vocabulary import Vocabulary
from train.config import SearchConfig, SearchSettings, check_search, with_enough_beams
from train.device import resolve_device
from train.model.bundle import Bundle, find_bundle, load_bundle
from train.scores.degenerate import degenerate
from train.search.hypotheses import Hypothesis, search_several

_BATCH_PHOTOS = 32
_CACHE_ROWS = 256  # how many rows of a cache are captioned at once
_JUDGED_CAPTIONS = 1000


class CaptionError(CapError):
    """Raised when a photo gets no caption. The message is one line."""


class ForkError(CapError):
    """Raised in a process that was forked after a model was loaded. The message is one line."""


class _Forks:
    """Whether this process was forked from one that had loaded a model.

    The threads with which PyTorch computes are not there after a fork, and OpenMP would wait for
    them for ever.
    """

    def __init__(self) -> None:
        self._loaded = self._forked = False
        os.register_at_fork(after_in_child=self._note)

    def _note(self) -> None:
        self._forked = self._loaded

    def about_to_load(self) -> None:
        """Raises ForkError."""
        self.check()
        self._loaded = True

    def check(self) -> None:
        """Raises ForkError."""
        if self._forked:
            raise ForkError(
                "this process was forked after Captioner.load, and the threads that compute did "
                "not come along; load in each worker, after the fork, and not before it"
            )


_forks = _Forks()


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
    others: tuple[Caption, ...] = ()  # more that the search has found, if they were asked for

    @property
    def log_prob(self) -> float:
        """The log-probability of `caption`: the sum over its words and its end."""
        return sum(self.captions[0].log_probs) if self.captions else float("-inf")

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
    """Captions photos with a trained model. See also `Captioner.load`.

    Threads may share one; their batches are computed one after the other. Nothing is printed, and
    no setting of torch is changed.
    """

    def __init__(
        self, bundle: Bundle, encoder: Encoder, search_config: SearchConfig, *, others: int = 0
    ) -> None:
        self.bundle = bundle
        self.encoder = encoder
        self.search_config = search_config
        self._others = others
        self._said: list[tuple[str, ...]] = []  # words of the first captions
        self._lock = threading.Lock()  # of the networks, whose buffers all batches share
        self._settled(search_config)

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        device: str = "auto",
        weights: str | None = None,
        search_config: SearchConfig | None = None,
        others: int = 0,
        **search: Unpack[SearchSettings],
    ) -> Captioner:
        """Load a model from its file or a run folder, together with the encoder behind it.

        weights: where the backbone's weights are now, if they are neither where the model's record
        says nor near the model. They must be the same weights. search: settings such as
        `beam_size=5`, in place of those of `search_config`. others: as for `search_several`.
        Raises BundleError, EncoderError, DeviceError, SearchError, SettingError, ViewError or
        ForkError.
        """
        _forks.about_to_load()
        search_config = _changed(search_config or SearchConfig(), search)
        chosen = resolve_device(device)
        begin_warm_up(chosen)
        bundle = load_bundle(model, chosen)
        encoder = Encoder.load(
            bundle.encoder, device=chosen, weights=weights, near=find_bundle(Path(model))
        )
        return cls(bundle, encoder, search_config, others=others)

    def caption(
        self,
        photos: Photo | Iterable[Photo],
        *,
        errors: Literal["return", "raise"] = "return",
        **search: Unpack[SearchSettings],
    ) -> list[Prediction]:
        """One prediction per photo, in order.

        photos: one or many, in any mixture: paths, the bytes of files, PIL images, and arrays of
        (H, W, 3) RGB or (H, W) gray uint8. errors: what becomes of a photo that cannot be read:
        `return` a prediction with an `error`, or `raise` CaptionError. search: settings for this
        call, such as `beam_size=5`. Raises TypeError for what is no photo or no setting, and
        SearchError, SettingError, ViewError, ForkError or StalledError (no photo comes from the
        disk for a minute).
        """
        return list(self.stream(photos, errors=errors, **search))

    def stream(
        self,
        photos: Photo | Iterable[Photo],
        *,
        errors: Literal["return", "raise"] = "return",
        **search: Unpack[SearchSettings],
    ) -> Iterator[Prediction]:
        """Like `caption`, but batch by batch: one is captioned while the next is decoded."""
        _forks.check()
        if errors not in ("return", "raise"):
            raise TypeError(f"errors is 'return' or 'raise', not {errors!r}")
        settled, views = self._settled(_changed(self.search_config, search))
        return self._stream(as_photos(photos), settled, views, errors == "raise")

    def _settled(self, search_config: SearchConfig) -> tuple[SearchConfig, tuple[str, ...]]:
        """(the settings for this model, the views that they need). Raises ViewError."""
        views = self.encoder.record.views
        view = chosen_view(search_config.view, views, self.bundle.training)
        return search_config.up_to(self.bundle.vocabulary.longest), views_to_read(views, view)

    def _stream(
        self, photos: list[Photo], search_config: SearchConfig, views: tuple[str, ...], raises: bool
    ) -> Iterator[Prediction]:
        names = [name_of(photo, number) for number, photo in enumerate(photos, 1)]
        in_files = all(isinstance(photo, (str, os.PathLike)) for photo in photos)
        batches = self._from_files(names, views) if in_files else self._mixed(photos, views)
        for rows, pixels, reasons in batches:
            hypotheses = self._search(pixels, rows, search_config) if rows else []
            found = dict(zip(rows, hypotheses, strict=True))
            if not search_config.sample:
                self._remember(hypotheses)
            for row in sorted((*rows, *reasons)):
                if row in found:
                    prediction = _prediction(
                        names[row], self.bundle.vocabulary, found[row], search_config.captions
                    )
                else:
                    prediction = Prediction(names[row], "", float("-inf"), reasons[row])
                if raises and prediction.error:
                    raise CaptionError(f"{prediction.path}: {prediction.error}")
                yield prediction

    def _from_files(
        self, names: list[str], views: tuple[str, ...]
    ) -> Iterator[tuple[list[int], torch.Tensor, dict[int, str]]]:
        """(rows that are decoded, their pixels (B, V, 3, S, S), reasons of the others by row), for
        each batch. The next one is read and decoded meanwhile."""
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
            views=views,
            readers=min(MOST_THREADS, reader_count(None)),
            filter=self.encoder.preprocessing.filter,
            advice="caption it and those behind it when the drive answers again",
        ) as loader:
            for batch in loader:
                decoded = sorted(batch.decoded)
                places = [row - batch.first for row in decoded]
                yield decoded, batch.pixels[places], batch.errors
                loader.release(batch)

    def _mixed(
        self, photos: list[Photo], views: tuple[str, ...]
    ) -> Iterator[tuple[list[int], torch.Tensor, dict[int, str]]]:
        """`_from_files` of photos of any kind."""
        size, kind = self.encoder.record.image_size, self.encoder.preprocessing.filter
        with ThreadPoolExecutor(min(MOST_THREADS, reader_count(None))) as readers:

            def begin(first: int) -> list[Future[ReadPhoto]]:
                part = photos[first : first + _BATCH_PHOTOS]
                return [readers.submit(read_any, photo, size, views, kind) for photo in part]

            begun = begin(0)
            for first in range(0, len(photos), _BATCH_PHOTOS):
                following = begin(first + _BATCH_PHOTOS)
                read = {first + place: photo.result() for place, photo in enumerate(begun)}
                pixels = {row: r.pixels for row, r in read.items() if r.pixels is not None}
                reasons = {row: r.error for row, r in read.items() if r.pixels is None}
                stacked = torch.stack(list(pixels.values())) if pixels else torch.empty(0)
                yield list(pixels), stacked, reasons
                begun = following

    def doubt(self) -> str | None:
        """Why the model's captions mean little, as a short clause; None if nothing speaks for it.

        A model may say so in its record of the training. Otherwise the captions so far are judged,
        up to a thousand of them, unless they were drawn at random.
        """
        recorded = self.bundle.training.get("degenerate")
        return str(recorded) if recorded else degenerate(self._said)

    def _remember(self, hypotheses: Sequence[Sequence[Hypothesis]]) -> None:
        room = max(0, _JUDGED_CAPTIONS - len(self._said))
        best = [found[0].words for found in hypotheses if found][:room]
        self._said.extend(map(self.bundle.vocabulary.caption_words, best))

    def _search(
        self, pixels: torch.Tensor, numbers: list[int], search_config: SearchConfig
    ) -> list[list[Hypothesis]]:
        """The captions found for each photo, the best first.

        pixels: (B, V, 3, S, S). numbers: the positions of the photos among all that are captioned.
        """
        with self._lock:
            features = self.encoder.encode(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
            return search_several(
                self.bundle.decoder,
                mean_of_views(features),
                search_config,
                numbers=numbers,
                others=self._others,
            )


def _changed(search_config: SearchConfig, settings: SearchSettings) -> SearchConfig:
    """The settings with some of them changed, and with enough beams for them.

    Raises TypeError for one that does not exist, SearchError or SettingError.
    """
    changed, _ = with_enough_beams(replace(search_config, **settings))
    check_search(changed)
    return changed


def _prediction(
    name: str, vocabulary: Vocabulary, found: list[Hypothesis], asked: int
) -> Prediction:
    """The prediction of the hypotheses found, or an error if the decoder computes no numbers.

    asked: how many of them were asked for. The rest are `others`.
    """
    # Beam search then finds nothing; greedy search and sampling find something without a score.
    if not found or not math.isfinite(found[0].score):
        return Prediction(
            name, "", float("-inf"), "the model's probabilities are not finite (NaN or infinity)"
        )
    captions = tuple(_caption(vocabulary, hypothesis) for hypothesis in found)
    return Prediction(
        name,
        captions[0].caption,
        captions[0].score,
        captions=captions[:asked],
        others=captions[asked:],
    )


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
    others: int = 0,
) -> dict[str, Prediction]:
    """Captions for photos of a cache, by image id. Reads no photo file.

    rows: of the photos, ascending; None for all that were extracted. report: is told how many
    photos of how many are done. others: as for `search_several`. Raises SearchError, ViewError or
    CaptionError (a photo gets no caption).
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
            others=others,
        )
        for row, hypotheses in zip(chosen.tolist(), found, strict=True):
            prediction = _prediction(
                cache.paths[row], bundle.vocabulary, hypotheses, search_config.captions
            )
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
