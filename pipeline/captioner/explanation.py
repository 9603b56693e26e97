"""How much each word of a caption depends on each part of the photo, found by covering parts.

A square of the photo is covered, the rest is encoded, and the caption stays as it is: what falls is
the probability of a word, given the words before it. Each part of the photo is covered by several
squares, and its heat is the mean of their falls (occlusion: Zeiler & Fergus, 2014, «Visualizing and
Understanding Convolutional Networks», section 4.2). The model has one vector of the photo and no
attention, so that there is nothing inside it that says where a word comes from.

What covers, and how large the squares are, was chosen on drawn scenes by
`scripts/explain_scenes.py`, where it is known which shape a word means; docs/explain.md has the
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.errors import CapError
from pipeline.captioner.captioner import Captioner
from pipeline.captioner.photo_search import Query
from pipeline.captioner.predictions import CaptionError
from pipeline.photos.decoding import decode
from pipeline.photos.photo_file import read_file, reading_fails
from pipeline.photos.preprocessing import corner, preprocess_pixels, size_for_crops
from train.captions.sentence import sentence
from train.captions.word_places import word_places

GRID = 7  # parts of the photo in each direction
SIDES = (3,)  # of the covering squares, in parts
_BATCH_PHOTOS = 32  # covered photos that are encoded at once

Square = tuple[int, int, int, int]  # top, bottom, left, right in parts of the grid; may stick out
Filling = Callable[[Tensor], Tensor]  # (V, 3, S, S) uint8 → what a covered pixel is replaced by


class ExplanationError(CapError):
    """Raised when there is nothing to explain. The message is one line."""


@dataclass(frozen=True)
class ExplainedWord:
    """A word of a caption, and how much of its probability each part of the photo accounts for."""

    word: str  # as the model knows it
    text: str  # as it stands in the sentence; empty for a mark that the sentence leaves out
    log_prob: float  # given the whole photo and the words before
    heat: NDArray[np.float32]  # (G, G) fall of the log-probability; negative where it rises
    worst: Square  # covered, it costs the most
    worst_log_prob: float  # given the photo with that square covered and the words before

    @property
    def is_mark(self) -> bool:
        """Whether it has no letter and no digit, as a full stop."""
        return not any(map(str.isalnum, self.word))

    def as_dict(self) -> dict[str, Any]:
        """The fields for JSON; `falls` has a list for each row of the grid, from the top."""
        return {
            "word": self.word,
            "text": self.text,
            "log_prob": round(self.log_prob, 4),
            "worst_log_prob": round(self.worst_log_prob, 4),
            "falls": [[round(value, 4) for value in row] for row in self.heat.tolist()],
        }


@dataclass(frozen=True)
class Explanation:
    """A caption of a photo, word by word."""

    caption: str  # a sentence
    words: tuple[ExplainedWord, ...]
    grid: int
    squares: int  # how many were covered, one after the other
    unknown: tuple[str, ...] = ()  # words of a given caption that the model does not know

    def as_dict(self) -> dict[str, Any]:
        """The fields for JSON."""
        return {
            "caption": self.caption,
            "grid": self.grid,
            "squares": self.squares,
            "unknown": list(self.unknown),
            "words": [word.as_dict() for word in self.words],
        }


def read_pixels(path: Path) -> NDArray[np.uint8]:
    """The pixels (H, W, 3) of a photo's file, RGB and upright.

    Raises CaptionError or ShortageError.
    """
    try:
        return decode(read_file(path))
    except Exception as error:
        reason = reading_fails(path, error).error
        raise CaptionError(f"{path}: {reason}") from None


def chosen_words(explanation: Explanation, chosen: str | None) -> list[ExplainedWord]:
    """The words of an explanation that a comma-separated list names, in the order of the caption;
    without a list, all that are no marks.

    A word is named as the model knows it or as the sentence has it, in any case. Raises
    ExplanationError for a word that is not in the caption.
    """
    if chosen is None:
        return [word for word in explanation.words if not word.is_mark]
    asked = [name for part in chosen.split(",") if (name := part.strip().lower())]
    names = [{word.word.lower(), word.text.lower()} for word in explanation.words]
    if not asked:
        raise ExplanationError(f"{chosen!r}: names no word; the caption is {explanation.caption!r}")
    for name in asked:
        if not any(name in each for each in names):
            raise ExplanationError(
                f"{name!r} is no word of the caption, which is {explanation.caption!r}"
            )
    return [
        word
        for word, each in zip(explanation.words, names, strict=True)
        if not each.isdisjoint(asked)
    ]


def explain(
    captioner: Captioner,
    photo: NDArray[np.uint8],
    *,
    caption: str | None = None,
    grid: int = GRID,
    sides: Sequence[int] = SIDES,
    filling: Filling | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Explanation:
    """How much each word depends on each part of a photo.

    photo: (H, W, 3) uint8 RGB, upright. caption: a sentence to explain in place of the model's own;
    words that the model does not know are left out of it. grid: parts of the photo in each
    direction. sides: of the covering squares, in parts. report: is told how many covered photos of
    how many are compared. Raises CaptionError, PhotoSearchError (no word is known), SearchError,
    ViewError, EncoderError or ExplanationError (the probabilities are not finite).
    """
    vocabulary = captioner.bundle.vocabulary
    words, unknown = _caption_words(captioner, photo, caption)
    numbers = [vocabulary.number(word) for word in words]
    if not photo.flags.writeable:
        photo = photo.copy()  # torch warns of read-only memory
    size, kind = captioner.encoder.record.image_size, captioner.encoder.preprocessing.filter
    views = captioner.views
    pixels = preprocess_pixels(photo, size, views, filter=kind)  # (V, 3, S, S)
    covering = (filling or mean_colour)(pixels)
    frames = [Frame.of(view, photo.shape[0], photo.shape[1], size) for view in views]
    squares = covering_squares(grid, sides)
    falls = torch.empty(len(squares), len(numbers))
    whole = captioner.word_log_probs(pixels[None], numbers)[0]  # (T,)
    for start in range(0, len(squares), _BATCH_PHOTOS):
        part = squares[start : start + _BATCH_PHOTOS]
        covered = torch.stack([_cover(pixels, covering, frames, s, grid) for s in part])
        falls[start : start + len(part)] = whole - captioner.word_log_probs(covered, numbers)
        if report is not None:
            report(start + len(part), len(squares))
    if not bool(whole.isfinite().all() and falls.isfinite().all()):
        raise ExplanationError("the model's probabilities are not finite (NaN or infinity)")
    heat = spread(falls.numpy(), squares, grid)
    text = sentence(words, vocabulary)
    explained = []
    for i, place in enumerate(word_places(words, text, vocabulary)):
        worst = int(falls[:, i].argmax())
        explained.append(
            ExplainedWord(
                word=words[i],
                text=text[slice(*place)] if place else "",
                log_prob=float(whole[i]),
                heat=heat[:, :, i],
                worst=squares[worst],
                worst_log_prob=float(whole[i] - falls[worst, i]),
            )
        )
    return Explanation(text, tuple(explained), grid, len(squares), unknown)


def _caption_words(
    captioner: Captioner, photo: NDArray[np.uint8], caption: str | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the words to explain, those of the given caption that the model does not know)."""
    if caption is not None:
        query = Query.of(caption, captioner.bundle.vocabulary)
        return query.words, query.unknown
    (found,) = captioner.caption(photo)
    if found.error:
        raise CaptionError(found.error)
    return found.words, ()


def covering_squares(grid: int, sides: Sequence[int] = SIDES) -> list[Square]:
    """The squares that are covered one after the other. At the edges they stick out of the photo,
    so that each part is covered equally often: once for each part of a square."""
    return [
        (top, top + side, left, left + side)
        for side in sides
        for top in range(1 - side, grid)
        for left in range(1 - side, grid)
    ]


def spread(falls: NDArray[np.float32], squares: Sequence[Square], grid: int) -> NDArray[np.float32]:
    """(K, T) falls with each square covered → (G, G, T): the mean over the squares on each part."""
    total = np.zeros((grid, grid, falls.shape[1]))
    times = np.zeros((grid, grid, 1))
    for fall, (top, bottom, left, right) in zip(falls, squares, strict=True):
        place = slice(max(0, top), bottom), slice(max(0, left), right)
        total[place] += fall
        times[place] += 1
    return (total / times).astype(np.float32)


@dataclass(frozen=True)
class Frame:
    """Where the whole photo lies in the pixels of one of its views; for a crop it sticks out."""

    top: float
    left: float
    height: float
    width: float
    mirrored: bool
    size: int

    @classmethod
    def of(cls, view: str, height: int, width: int, size: int) -> Frame:
        """view: of a photo of height × width pixels, as `preprocess` cuts it to size × size."""
        if view in ("full", "flip"):
            return cls(0, 0, size, size, view == "flip", size)
        scaled = size_for_crops(height, width, size)
        top, left = corner(view, *scaled, size)
        return cls(-top, -left, *scaled, view == "center-flip", size)

    def pixels(self, square: Square, grid: int) -> tuple[slice, slice]:
        """The rows and columns of the view that show a square of the photo."""
        top, bottom, left, right = square
        rows = self._range(self.top, self.height, top / grid, bottom / grid)
        columns = self._range(self.left, self.width, left / grid, right / grid)
        if self.mirrored:
            columns = slice(self.size - columns.stop, self.size - columns.start)
        return rows, columns

    def _range(self, start: float, length: float, first: float, last: float) -> slice:
        ends = [min(max(round(start + length * part), 0), self.size) for part in (first, last)]
        return slice(*ends)


def _cover(
    pixels: Tensor, covering: Tensor, frames: Sequence[Frame], square: Square, grid: int
) -> Tensor:
    """The views (V, 3, S, S) with a square of the photo replaced by what covers it."""
    covered = pixels.clone()
    for view, frame in enumerate(frames):
        rows, columns = frame.pixels(square, grid)
        covered[view, :, rows, columns] = covering[view, :, rows, columns]
    return covered


def mean_colour(pixels: Tensor) -> Tensor:
    """The mean colour of each view, in all of its pixels."""
    mean = pixels.float().mean((2, 3), keepdim=True)
    return mean.round().to(torch.uint8).expand_as(pixels)
