"""Breaking texts into lines, and drawing them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import ImageDraw

from pipeline.gallery.sheet.fonts import Fonts, Run, has_raqm, is_right_to_left, script_of

# Written without spaces between words: a line may end behind any letter.
_NO_SPACES = frozenset(["Hani", "Hira", "Kana", "Bopo", "Thai", "Laoo", "Khmr", "Mymr"])
_LEADING = "เแโใไເແໂໃໄ"  # Thai and Lao vowels that are written before their letter
_NO_START = "ะาำๆฯະາຳໆຯぁぃぅぇぉっゃゅょァィゥェォッャュョー"
_VIRAMA = 9  # Unicode's combining class of the sign that joins the letter behind it


@dataclass(frozen=True)
class Line:
    """A line of text, ready to be drawn."""

    runs: tuple[Run, ...]
    right_to_left: bool
    width: float  # pixels, as the height
    ascent: int
    height: int


def set_lines(text: str, fonts: Fonts, width: int) -> list[Line]:
    """A text in lines of at most this many pixels, without control characters."""
    text = "".join(map(_harmless, text))
    fonts.prepare(text)
    right_to_left = is_right_to_left(text)
    lines: list[str] = []
    for unit, spaced in _units(text):
        longer = f"{lines[-1]}{' ' if spaced else ''}{unit}" if lines else unit
        if not lines:
            lines.append("")
        if _width(longer, fonts, right_to_left) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for part in clusters(unit):  # most units are narrow enough: one step each
            if lines[-1] and _width(lines[-1] + part, fonts, right_to_left) > width:
                lines.append("")
            lines[-1] += part
    return [_line(line, fonts, right_to_left) for line in lines if line]


def draw_line(
    draw: ImageDraw.ImageDraw, line: Line, x: float, y: int, width: int, ink: tuple[int, int, int]
) -> None:
    """Draw a line into a column that begins at (x, y); it ends there if it runs to the left."""
    runs = line.runs
    if line.right_to_left:
        x, runs = x + width - line.width, runs[::-1]
    for run in runs:
        draw.text(
            (x, y + line.ascent),
            run.text,
            fill=ink,
            font=run.font,
            anchor="ls",
            direction=_direction(line.right_to_left),
        )
        x += _length(run, line.right_to_left)


def clusters(text: str) -> Iterator[str]:
    """Pieces between which a line may end: letters with their marks."""
    piece = ""
    for letter in text:
        if piece and _may_part(piece[-1], letter):
            yield piece
            piece = ""
        piece += letter
    if piece:
        yield piece


def _harmless(letter: str) -> str:
    """The letter, a space for a control character, or nothing for one that turns the direction."""
    category = unicodedata.category(letter)
    if category in ("Cc", "Cs"):
        return " "
    return "" if category == "Cf" and letter not in "\u200c\u200d" else letter


def _may_part(before: str, letter: str) -> bool:
    joins = before == "\u200d" or before in _LEADING or unicodedata.combining(before) == _VIRAMA
    clings = (
        unicodedata.category(letter) in ("Mn", "Mc", "Me", "Pe", "Pf", "Po")
        or letter in _NO_START
        or letter == "\u200d"
    )
    opens = unicodedata.category(before) in ("Ps", "Pi")
    return not (joins or clings or opens)


def _units(text: str) -> Iterator[tuple[str, bool]]:
    """(words, or letters of scripts without spaces; whether a space is before them)."""
    for word in text.split():
        spaced, unit = True, ""
        for cluster in clusters(word):
            alone = script_of(cluster[0]) in _NO_SPACES
            if unit and (alone or script_of(unit[0]) in _NO_SPACES):
                yield unit, spaced
                unit, spaced = "", False
            unit += cluster
        yield unit, spaced


def _line(text: str, fonts: Fonts, right_to_left: bool) -> Line:
    runs = tuple(fonts.runs(text))
    metrics = [run.font.getmetrics() for run in runs] or [fonts.plain.getmetrics()]
    ascent, descent = max(a for a, _ in metrics), max(d for _, d in metrics)
    width = sum(_length(run, right_to_left) for run in runs)
    return Line(runs, right_to_left, width, ascent, ascent + descent + fonts.size // 8)


def _width(text: str, fonts: Fonts, right_to_left: bool) -> float:
    return sum(_length(run, right_to_left) for run in fonts.runs(text))


def _length(run: Run, right_to_left: bool) -> float:
    return run.font.getlength(run.text, direction=_direction(right_to_left))


def _direction(right_to_left: bool) -> str | None:
    """For Pillow, which takes one only where it has Raqm."""
    if not has_raqm():
        return None
    return "rtl" if right_to_left else "ltr"
