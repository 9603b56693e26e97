"""Captioning: frozen encoder and trained decoder together, from photo files to captions.

from pipeline.captioner import Captioner
for prediction in Captioner.load("runs/base").caption(["dog.jpg", "beach.png"]):
    print(prediction.path, prediction.caption)
"""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cache.errors import CapError
from cache.store import DONE, FeatureCache
from pipeline.encoder.encoder import Encoder
from pipeline.photos.folder import list_photos
from pipeline.photos.photo_file import ReadPhoto, read_photo
from train.captions.sentence import sentence
from train.captions.views import chosen_view, mean_of_views, view_features, views_to_read
from train.captions.vocabulary import Vocabulary
from train.config import SearchConfig, check_search
from train.device import resolve_device
from train.model.bundle import Bundle, load_bundle
from train.search.hypotheses import Hypothesis, search_several

_BATCH_PHOTOS = 32
_CACHE_ROWS = 1024  # how many rows of a cache are captioned at once


class CaptionError(CapError):
    """Raised when a model computes no caption for a photo. The message is one line."""


@dataclass(frozen=True)
class Caption:
    """One of several captions for a photo."""

    caption: str  # as people write it: a sentence
    score: float  # length-normalized log-probability; 0 means certainty
    log_probs: tuple[float, ...] = ()  # of each of the words, then of the caption's end
    words: tuple[str, ...] = ()  # as the model knows them: in lower case, punctuation among them

    def as_dict(self) -> dict[str, Any]:
        return {
            "caption": self.caption,
            "words": list(self.words),
            "score": round(self.score, 4),
            "log_probs": [round(value, 4) for value in self.log_probs],
        }


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

    def as_dict(self) -> dict[str, Any]:
        """The fields for JSON. `captions` is present only if there are several."""
        if self.error:
            return {"path": self.path, "error": self.error}
        found: dict[str, Any] = {"path": self.path, **self.captions[0].as_dict()}
        if len(self.captions) > 1:
            found["captions"] = [caption.as_dict() for caption in self.captions]
        return found


class Captioner:
    """Captions photos with a trained model. See also `Captioner.load`."""

    def __init__(self, bundle: Bundle, encoder: Encoder, search_config: SearchConfig) -> None:
        self.bundle = bundle
        self.encoder = encoder
        self.search_config = search_config.up_to(bundle.vocabulary.longest)
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

        weights: where the backbone's weights are now, if they are not where the model's record
        says. They must be the same weights. Raises BundleError, EncoderError, DeviceError,
        SearchError or ViewError.
        """
        chosen = resolve_device(device)
        bundle = load_bundle(model, chosen)
        search_config = search_config or SearchConfig()
        check_search(search_config)
        encoder = Encoder.load(bundle.encoder, device=chosen, weights=weights)
        return cls(bundle, encoder, search_config)

    def caption(self, paths: Iterable[str | Path]) -> list[Prediction]:
        """One prediction per path, in order. For a file that is no photo it has an `error`."""
        return list(self.stream(paths))

    def stream(self, paths: Iterable[str | Path]) -> Iterator[Prediction]:
        """Like `caption`, but batch by batch: one is captioned while the next is decoded."""
        names = [str(path) for path in paths]
        size = self.encoder.record.image_size
        if len(names) == 1:
            # Another thread would only compete with those of the encoder for the cores.
            yield from self._caption_batch(
                names, [read_photo(Path(names[0]), size, self._views)], 0
            )
            return
        batches = [names[i : i + _BATCH_PHOTOS] for i in range(0, len(names), _BATCH_PHOTOS)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:

            def read(batch: Sequence[str]) -> Iterator[ReadPhoto]:
                return pool.map(lambda name: read_photo(Path(name), size, self._views), batch)

            following = read(batches[0]) if batches else iter(())
            for i, batch in enumerate(batches):
                reads = list(following)
                if i + 1 < len(batches):
                    following = read(batches[i + 1])
                yield from self._caption_batch(batch, reads, i * _BATCH_PHOTOS)

    def _caption_batch(
        self, names: list[str], reads: list[ReadPhoto], first: int
    ) -> list[Prediction]:
        pixels = [read.pixels for read in reads if read.pixels is not None]
        numbers = [first + i for i, read in enumerate(reads) if read.pixels is not None]
        found = iter(self._search(torch.cat(pixels), numbers) if pixels else ())
        return [
            Prediction(name, "", float("-inf"), read.error)
            if read.pixels is None
            else _prediction(name, self.bundle.vocabulary, next(found))
            for name, read in zip(names, reads, strict=True)
        ]

    def _search(self, pixels: torch.Tensor, numbers: list[int]) -> list[list[Hypothesis]]:
        """The captions found for each photo, the best first.

        pixels: (B * V, 3, S, S), the views of a photo one after the other. numbers: the positions
        of the photos among all that are captioned.
        """
        features = self.encoder.encode(pixels).unflatten(0, (-1, len(self._views)))
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
    bundle: Bundle, cache: FeatureCache, search_config: SearchConfig
) -> dict[str, Prediction]:
    """Captions for every extracted photo of a cache, by image id. Reads no photo file.

    Raises SearchError, ViewError or CaptionError (a photo gets no caption).
    """
    search_config = search_config.up_to(bundle.vocabulary.longest)
    view = chosen_view(search_config.view, cache.encoder.views, bundle.training)
    device = next(bundle.decoder.parameters()).device
    predictions = {}
    done = cache.rows_with(DONE)
    for start in range(0, len(done), _CACHE_ROWS):
        rows = done[start : start + _CACHE_ROWS]
        found = search_several(
            bundle.decoder,
            view_features(cache, rows, view).to(device),
            search_config,
            numbers=rows.tolist(),
        )
        for row, hypotheses in zip(rows.tolist(), found, strict=True):
            prediction = _prediction(cache.paths[row], bundle.vocabulary, hypotheses)
            if prediction.error:
                raise CaptionError(
                    f"{cache.path}: no caption for {prediction.path} ({prediction.error}); "
                    "use another model"
                )
            predictions[cache.image_ids[row]] = prediction
    return predictions


def find_photos(paths: Iterable[str], notices: list[str] | None = None) -> list[str]:
    """The given files, the photos below the given folders, and the matches of globs.

    Photos of one folder or glob are sorted, and no file is named twice. A name that matches nothing
    stays in the list, so that captioning it tells what is wrong. notices: gets a line about what
    else a folder holds. Raises FolderError if a folder cannot be read.
    """
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
