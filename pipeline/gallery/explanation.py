"""Draws an explanation: for each word the photo in grey, and over it, in colour, what the word
depends on.

All words share one scale, so that words that depend on little stay grey.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cache.atomic import write_atomically
from pipeline.captioner.explanation import ExplainedWord, Explanation, ExplanationError
from train.fit.record.curves import own_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARK = "cap explanation"  # in our pictures, which alone are replaced
_DPI = 100
_COLUMNS, _MOST_WORDS = 4, 60
_TILE_WIDTH, _GAP, _TITLE = 280, 16, 44  # pixels
_LONGEST_SIDE = 280  # of a tile's photo
_THINNEST = 6.0  # one side to the other; thinner photos are drawn as if they were this thin
_LARGE = (420, 300)  # most width and height of the photo in its own colours
_PALETTE = "viridis"  # perceptually uniform, also for people who cannot tell red from green
_STRONGEST = 0.85  # share of the colour, the rest is the photo
_LEAST_SCALE, _MOST_SCALE = math.log(2), math.log(1000)
_FACTORS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_INK, _FAINT = "#18181c", "#6e6e76"
_TOLD = (
    "The colour says how much less likely the model finds the word when this part of the photo is "
    "covered by the photo's mean colour: the geometric mean over the squares that cover the part. "
    "Below a word: its probability with the whole photo, and with the square covered that costs it "
    "most, which is outlined if the probability falls to less than half. The words before it stay "
    "as they are. The model sees one vector of the photo and has no attention, so this shows what "
    "its words depend on, not where it looks, and not whether they are right."
)


def check_replaceable(picture: Path, photo: Path) -> None:
    """Raise ExplanationError unless a picture can be written there, in the place of no other file.

    photo: the one that is explained, which is never replaced.
    """
    if picture.suffix.lower() != ".png":
        raise ExplanationError(f"{picture}: pictures are PNG; name a file that ends in .png")
    if picture.exists():
        if photo.exists() and picture.samefile(photo):
            raise ExplanationError(f"{picture}: is the photo itself; name another --out")
        if not _is_ours(picture):
            raise ExplanationError(
                f"{picture}: is no picture that `cap explain` has drawn; move it away, or name "
                "another --out"
            )


def make_folder(picture: Path) -> None:
    """Make the folder of a picture, if it is missing. Raises ExplanationError."""
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise ExplanationError(f"{picture}: cannot make its folder ({reason})") from None


def _is_ours(picture: Path) -> bool:
    try:
        with picture.open("rb") as file:
            return _MARK.encode() in file.read(1024)
    except OSError:
        return False


def draw_explanation(
    explanation: Explanation,
    words: Sequence[ExplainedWord],
    photo: NDArray[np.uint8],
    picture: Path,
) -> None:
    """Draw some words of an explanation into a PNG, at most 60 of them.

    photo: (H, W, 3) uint8 RGB, as it was explained. Raises WriteError, or CurvesError if
    matplotlib cannot be used.
    """
    words = words[:_MOST_WORDS]
    with own_matplotlib([explanation.caption, *(word.word for word in words)]):
        figure = _figure(explanation, words, Image.fromarray(photo))

        def write(temporary: Path) -> None:
            figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": _MARK})

        write_atomically(picture, write)


def scale_of(words: Sequence[ExplainedWord]) -> float:
    """The fall of a log-probability that gets the strongest colour."""
    most = max((float(word.heat.max()) for word in words), default=0.0)
    return min(max(most, _LEAST_SCALE), _MOST_SCALE)


def _figure(explanation: Explanation, words: Sequence[ExplainedWord], photo: Image.Image) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    # The scale is that of all words, also if only some are drawn.
    scale = scale_of(explanation.words)
    tile = _fitting(photo, _LONGEST_SIDE, _LONGEST_SIDE)
    large = _fitting(photo, *_LARGE)
    rows = -(-len(words) // _COLUMNS)
    width = _COLUMNS * (_TILE_WIDTH + _GAP) + _GAP
    head = max(large[1], 250) + 2 * _GAP
    height = head + rows * (tile[1] + _TITLE + _GAP) + _GAP
    figure = Figure((width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")

    def place(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
        """From pixels, counted from the top left corner, to parts of the figure."""
        return x / width, 1 - (y + h) / height, w / width, h / height

    def write(x: float, y: float, text: str, *, size: float, color: str = _INK) -> None:
        figure.text(
            x / width, 1 - y / height, text, fontsize=size, color=color, va="top", parse_math=False
        )

    axes = figure.add_axes(place(_GAP, _GAP, *large))
    axes.imshow(photo.resize(large, Image.Resampling.LANCZOS), aspect="auto")
    axes.set_axis_off()
    right = large[0] + 3 * _GAP
    room = (width - right - _GAP) / 7.6  # letters of the text at size 10
    caption = textwrap.wrap(_plain(explanation.caption), round(room * 0.66), max_lines=3)
    write(right, _GAP, "\n".join(caption), size=15)
    y = _GAP + 26.0 * len(caption) + 8
    told = textwrap.wrap(_TOLD, round(room * 1.12))
    write(right, y, "\n".join(told), size=9.5, color=_FAINT)
    y += 16.5 * len(told) + 14
    axes = figure.add_axes(place(right + 4, y, 420, 14))
    axes.imshow(_legend(420, 14), aspect="auto", extent=(0, scale, 0, 1))
    factors: list[int] = []
    for factor in _FACTORS:  # whose labels do not touch
        room_left = 420 * (math.log(factor) - math.log(factors[-1])) / scale if factors else 420
        if math.log(factor) <= scale + 1e-6 and room_left >= 44:
            factors.append(factor)
    axes.set_xticks(
        [math.log(factor) for factor in factors],
        ["as likely" if factor == 1 else f"1/{factor}" for factor in factors],
        fontsize=9,
    )
    axes.set_yticks([])
    left_out = sum(not word.is_mark for word in explanation.words) - len(words)
    if left_out > 0:
        write(right + 440, y, f"{left_out} words are not shown", size=9, color=_FAINT)

    grey = photo.convert("L").resize(tile, Image.Resampling.LANCZOS)
    for i, word in enumerate(words):
        x = _GAP + i % _COLUMNS * (_TILE_WIDTH + _GAP)
        y = head + i // _COLUMNS * (tile[1] + _TITLE + _GAP)
        fall = word.log_prob - word.worst_log_prob
        is_outlined = fall >= math.log(2)
        write(x, y, _shortened(word.text or word.word), size=12)
        probabilities = f"{_percent(word.log_prob)} → {_percent(word.worst_log_prob)}"
        write(x, y + 20, probabilities, size=9.5, color=_INK if is_outlined else _FAINT)
        axes = figure.add_axes(place(x, y + _TITLE - 6, *tile))
        axes.imshow(_coloured(grey, word.heat / scale), aspect="auto", extent=(0, 1, 1, 0))
        if is_outlined:
            top, bottom, left, right_side = (min(max(e / len(word.heat), 0), 1) for e in word.worst)
            corner = (left, top)
            axes.add_patch(
                Rectangle(
                    corner, right_side - left, bottom - top, fill=False, color="white", linewidth=1
                )
            )
        axes.set_axis_off()
    return figure


def _fitting(photo: Image.Image, most_width: int, most_height: int) -> tuple[int, int]:
    """(width, height) in pixels of the photo in its own proportions, unless it is very thin."""
    ratio = min(max(photo.width / photo.height, 1 / _THINNEST), _THINNEST)
    width = min(most_width, most_height * ratio)
    return max(1, round(width)), max(1, round(width / ratio))


def _coloured(grey: Image.Image, heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(H, W, 3) uint8: a grey photo with heat from 0 to 1 over it; below 0 there is no colour."""
    smooth = Image.fromarray(heat.astype(np.float32)).resize(grey.size, Image.Resampling.BILINEAR)
    return _blend(np.asarray(grey, np.float32), np.clip(np.asarray(smooth), 0, 1))


def _legend(width: int, height: int) -> NDArray[np.uint8]:
    ramp = np.tile(np.linspace(0, 1, width, dtype=np.float32), (height, 1))
    return _blend(np.full_like(ramp, 128), ramp)


def _blend(grey: NDArray[np.float32], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(H, W) grey from 0 to 255 and heat from 0 to 1 → (H, W, 3): the hotter, the more colour."""
    from matplotlib import colormaps

    colour = colormaps[_PALETTE](heat)[..., :3] * 255
    share = (_STRONGEST * np.sqrt(heat))[..., None]
    mixed = (1 - share) * (0.7 * grey[..., None]) + share * colour
    return mixed.round().astype(np.uint8)  # type: ignore[no-any-return]


def _percent(log_prob: float) -> str:
    share = 100 * math.exp(log_prob)
    if share >= 99.5 and share < 99.995:
        return f"{share:.1f}%" if share < 99.95 else f"{share:.2f}%"
    if share >= 10:
        return f"{share:.0f}%"
    return f"{share:.1f}%" if share >= 0.1 else "<0.1%"


def _plain(text: str) -> str:
    """A text without what would break a line or show nothing."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shortened(text: str) -> str:
    text = _plain(text)
    return text if len(text) <= 28 else text[:27] + "…"
