"""Captioning: frozen encoder and trained decoder together, from photos to captions.

from pipeline import Captioner
for prediction in Captioner.load("runs/base").caption(["dog.jpg", "beach.png"]):
    print(prediction.path, prediction.caption)
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Unpack

import torch

from pipeline.captioner.forks import forks
from pipeline.captioner.predictions import CaptionError, Prediction, prediction_of
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.warm_up import begin_warm_up
from pipeline.photos.photo_file import ReadPhoto
from pipeline.photos.photo_loader import BatchRequest, PhotoLoader
from pipeline.photos.readers.in_memory import LYING, Photo, as_photos, name_of, read_any
from pipeline.photos.readers.start import MOST_THREADS, reader_count
from pipeline.photos.sources.places import Cell, Part, Place, StoredObject
from train.captions.views import chosen_view, mean_of_views, views_to_read
from train.config import SearchConfig, SearchSettings, check_search, with_enough_beams
from train.device import resolve_device
from train.model.bundle import Bundle, find_bundle, load_bundle
from train.scores.degenerate import degenerate
from train.search.hypotheses import Hypothesis, search_several
from train.search.likelihood import word_log_probs
from train.search.packed_decoder import for_search

_BATCH_PHOTOS = 32
_JUDGED_CAPTIONS = 1000


@dataclass(frozen=True)
class TimedBatch:
    """The predictions for a batch of decoded photos, and the seconds that its parts took."""

    predictions: list[Prediction]
    encode_s: float
    search_s: float


class Captioner:
    """Captions photos with a trained model. See also `Captioner.load`.

    Threads may share one; their batches are computed one after the other. Nothing is printed, and
    no setting of torch is changed. The weights must stay as they are: on a CPU, it has a copy.
    """

    def __init__(
        self, bundle: Bundle, encoder: Encoder, search_config: SearchConfig, *, others: int = 0
    ) -> None:
        self.bundle = bundle
        self.encoder = encoder
        self._decoder = for_search(bundle.decoder)
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
        says nor near the model. They must be the same weights. If the encoder is a program,
        FILE.py:FUNCTION, it is run only if it is named here. search: settings such as
        `beam_size=5`, in place of those of `search_config`. others: as for `search_several`.
        Raises BundleError, EncoderError, DeviceError, SearchError, SettingError, ViewError or
        ForkError.
        """
        forks.about_to_load()
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
        forks.check()
        if errors not in ("return", "raise"):
            raise TypeError(f"errors is 'return' or 'raise', not {errors!r}")
        settled, views = self._settled(_changed(self.search_config, search))
        return self._stream(as_photos(photos), settled, views, errors == "raise")

    def decode(self, photo: Photo) -> ReadPhoto:
        """One photo as `caption_decoded` takes it, with the settings of `load`.

        Threads may decode side by side. What is wrong with the photo is in the result's `error`.
        Raises ShortageError (memory, for one).
        """
        _, views = self._settled(self.search_config)
        size, kind = self.encoder.record.image_size, self.encoder.preprocessing.filter
        return read_any(photo, size, views, kind)

    def caption_decoded(self, names: Sequence[str], pixels: torch.Tensor) -> TimedBatch:
        """One prediction per photo that `decode` has decoded, with the settings of `load`.

        For a program that decodes and forms batches itself. names: the `path` of each prediction.
        pixels: (B, V, 3, S, S) uint8, stacked. Each photo gets the caption that it gets alone, also
        where captions are drawn at random. Raises ForkError or EncoderError.
        """
        forks.check()
        settled, _ = self._settled(self.search_config)
        begun = time.perf_counter()
        with self._lock:
            features = self._encode(pixels)
            if features.is_cuda:  # else the search would be charged with the wait for the features
                torch.cuda.synchronize(features.device)
            encoded = time.perf_counter()
            hypotheses = self._search_features(features, [0] * len(names), settled)
            searched = time.perf_counter()
        if not settled.sample:
            self._remember(hypotheses)
        predictions = [
            prediction_of(name, self.bundle.vocabulary, found, settled.captions)
            for name, found in zip(names, hypotheses, strict=True)
        ]
        return TimedBatch(predictions, encoded - begun, searched - encoded)

    def warm_up(self, photos: int) -> None:
        """Caption this many gray photos at once and forget them: the first batch of each size takes
        longer than the later ones. Raises EncoderError.
        """
        settled, views = self._settled(self.search_config)
        size = self.encoder.record.image_size
        gray = torch.full((photos, len(views), size, size, 3), 127, dtype=torch.uint8)
        # A GPU's second batch of a size makes a graph of its kernels.
        for _ in range(2 if self.encoder.device.type == "cuda" else 1):
            self._search(gray.permute(0, 1, 4, 2, 3), [0] * photos, settled)

    def _settled(self, search_config: SearchConfig) -> tuple[SearchConfig, tuple[str, ...]]:
        """(the settings for this model, the views that they need). Raises ViewError."""
        views = self.encoder.record.views
        view = chosen_view(search_config.view, views, self.bundle.training)
        return search_config.up_to(self.bundle.vocabulary.longest), views_to_read(views, view)

    def _stream(
        self, photos: list[Photo], search_config: SearchConfig, views: tuple[str, ...], raises: bool
    ) -> Iterator[Prediction]:
        names = [name_of(photo, number) for number, photo in enumerate(photos, 1)]
        in_files = all(isinstance(photo, (str, os.PathLike, *LYING)) for photo in photos)
        places: list[Place] = [
            photo if isinstance(photo, (Part, StoredObject, Cell)) else name
            for photo, name in zip(photos, names, strict=True)
        ]
        batches = self._from_files(places, views) if in_files else self._mixed(photos, views)
        for rows, pixels, reasons in batches:
            hypotheses = self._search(pixels, rows, search_config) if rows else []
            found = dict(zip(rows, hypotheses, strict=True))
            if not search_config.sample:
                self._remember(hypotheses)
            for row in sorted((*rows, *reasons)):
                if row in found:
                    prediction = prediction_of(
                        names[row], self.bundle.vocabulary, found[row], search_config.captions
                    )
                else:
                    prediction = Prediction(names[row], "", float("-inf"), reasons[row])
                if raises and prediction.error:
                    raise CaptionError(f"{prediction.path}: {prediction.error}")
                yield prediction

    def _from_files(
        self, photos: Sequence[Place], views: tuple[str, ...]
    ) -> Iterator[tuple[list[int], torch.Tensor, dict[int, str]]]:
        """(rows that are decoded, their pixels (B, V, 3, S, S), reasons of the others by row), for
        each batch. The next one is read and decoded meanwhile."""
        rows = range(len(photos))
        requests = [
            BatchRequest(first, rows[first : first + _BATCH_PHOTOS])
            for first in rows[::_BATCH_PHOTOS]
        ]
        with PhotoLoader(
            requests,
            photos.__getitem__,
            batch_rows=min(len(photos), _BATCH_PHOTOS),
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

    def word_log_probs(self, pixels: torch.Tensor, words: Sequence[int]) -> torch.Tensor:
        """(B, T) float32 on the CPU: the log-probability of each word of a caption for each photo,
        given the words before it.

        pixels: (B, V, 3, S, S) uint8, the views that `views` names. words: T numbers of the
        vocabulary. Raises EncoderError.
        """
        with self._lock:
            features = self.encoder.encode(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
            return word_log_probs(self.bundle.decoder, mean_of_views(features), words).cpu()

    @property
    def views(self) -> tuple[str, ...]:
        """The views of a photo that a caption is made from."""
        return self._settled(self.search_config)[1]

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
            return self._search_features(self._encode(pixels), numbers, search_config)

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, V, 3, S, S) → the means of the views' features, (B, D)."""
        features = self.encoder.encode(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
        return mean_of_views(features)

    def _search_features(
        self, features: torch.Tensor, numbers: list[int], search_config: SearchConfig
    ) -> list[list[Hypothesis]]:
        return search_several(
            self._decoder, features, search_config, numbers=numbers, others=self._others
        )


def _changed(search_config: SearchConfig, settings: SearchSettings) -> SearchConfig:
    """The settings with some of them changed, and with enough beams for them.

    Raises TypeError for one that does not exist, SearchError or SettingError.
    """
    changed, _ = with_enough_beams(replace(search_config, **settings))
    check_search(changed)
    return changed
