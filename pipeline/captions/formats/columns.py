"""Which column of a table, or field of records, names photos, and which hold captions.

Columns are known by their usual names, if they hold what the name says, and otherwise by what they
hold: files of the image folder, and sentences.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pipeline.captions.photo_index import looks_like_photo

# The usual names, the surest first. Case, spaces, `_` and `-` do not count.
_PHOTO_NAMES = (
    *("filename", "imagename", "imagepath", "imgpath", "filepath", "imagefile", "imagefilename"),
    *("image", "img", "photo", "path", "file", "picture", "photoname", "photopath", "imageurl"),
    *("url", "link", "imageid", "imgid", "photoid", "id", "name", "key"),
)
_CAPTION_NAMES = (
    *("caption", "captions", "rawcaption", "captiontext", "raw", "sentence", "sentences"),
    *("comment", "comments", "text", "texts", "description", "descriptions", "imagedescription"),
    *("report", "referencestrs", "references", "reference", "phrase", "phrases", "alttext", "alt"),
    *("annotation", "title", "content", "prompt", "tags"),
)
_MOSTLY = 0.5
_CLEARLY = 2.0  # times as many words as in any other column
_NUMBERED_NAME = re.compile(r"(.*?)[ _-]?\d+$")
_NO_LETTERS = re.compile(r"[^a-z]+")
# Scripts without spaces between words, and Korean, whose words are long.
_WIDE = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
)


@dataclass(frozen=True)
class Columns:
    """The column that names photos, and those that hold captions, by their numbers from 0."""

    photo: int
    captions: tuple[int, ...]
    share: float  # of the sample's rows, that name something like a photo


@lru_cache(maxsize=1024)
def name_key(label: str) -> str:
    """What different spellings of a column's name have in common: `Image_Name` → `imagename`."""
    return _NO_LETTERS.sub("", label.lower())


def names_photos(label: str) -> bool:
    return name_key(label) in _PHOTO_NAMES


def names_captions(label: str) -> bool:
    return name_key(label.rpartition(".")[2]) in _CAPTION_NAMES


class ColumnsUnknown(Exception):
    """Raised when it is not clear which column is which. The message is a clause.

    photos_known: whether the column of photos was found.
    """

    def __init__(self, message: str, *, photos_known: bool = True) -> None:
        super().__init__(message)
        self.photos_known = photos_known


def choose_columns(
    labels: Sequence[str],
    sample: Sequence[Sequence[Sequence[str]]],
    has_photo: Callable[[str], bool] | None,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> Columns:
    """Choose the columns.

    labels: (C) names of the columns. sample: for each row, for each of the C columns, the values in
    it, none if it is empty. has_photo: whether a name stands for a file of the image folder; None
    if there is no folder. image_column, caption_column: the user's choice. Raises ColumnsUnknown.
    """
    photo, share = _photo_column(labels, sample, has_photo, image_column)
    return Columns(photo, _caption_columns(labels, sample, photo, caption_column), share)


def _photo_column(
    labels: Sequence[str],
    sample: Sequence[Sequence[Sequence[str]]],
    has_photo: Callable[[str], bool] | None,
    wanted: str | None,
) -> tuple[int, float]:
    """(the column, the share of rows in which it holds something like a photo)."""
    best: tuple[bool, float, float, float] | None = None
    choice, also = -1, -1
    columns = range(len(labels)) if wanted is None else [_named(labels, wanted, "image")]
    for column in columns:
        values = [value for row in sample for value in row[column]]
        if not values:
            continue
        looks = _share(values, looks_like_photo)
        found = _share(values, has_photo) if has_photo is not None else 0.0
        rank = _rank(labels[column], _PHOTO_NAMES)
        if wanted is None and looks < _MOSTLY and found == 0 and rank == 0:
            continue
        if wanted is None and looks < _MOSTLY and _share(values, _is_sentence) > _MOSTLY:
            continue  # a caption `dog` beside the photo dog.jpg
        score = (max(looks, found) >= _MOSTLY, round(found, 1), round(looks, 1), rank)
        if best is None or score > best:
            best, choice, also = score, column, -1
        elif score == best:
            also = column
    if best is None:
        if wanted is not None:
            raise ColumnsUnknown(f"column {wanted!r} is empty")
        raise ColumnsUnknown("no column names photos", photos_known=False)
    if also >= 0:
        raise ColumnsUnknown(f"columns {labels[choice]!r} and {labels[also]!r} both name photos")
    return choice, max(best[1], best[2])


def _caption_columns(
    labels: Sequence[str],
    sample: Sequence[Sequence[Sequence[str]]],
    photo: int,
    wanted: str | None,
) -> tuple[int, ...]:
    if wanted is not None:
        column = _named(labels, wanted, "caption")
        if column == photo:
            raise ColumnsUnknown(f"column {wanted!r} names the photos")
        return (column,)
    texts, words = dict[int, float](), dict[int, float]()
    for column in range(len(labels)):
        values = [value for row in sample for value in row[column] if value.strip()]
        if column != photo and values:
            texts[column] = _share(values, _is_text)
            words[column] = sum(map(_words, values)) / len(values)
    textual = [column for column, share in texts.items() if share >= _MOSTLY]
    if not textual:
        raise ColumnsUnknown("no column holds sentences")
    ranks = {column: _rank(labels[column].rpartition(".")[2], _CAPTION_NAMES) for column in textual}
    best = max(textual, key=lambda column: ranks[column])
    if ranks[best] > 0:
        stem = _stem(labels[best])
        return tuple(column for column in textual if _stem(labels[column]) == stem)
    by_words = sorted(textual, key=lambda column: -words[column])
    if len(textual) > 1 and words[by_words[0]] < _CLEARLY * words[by_words[1]]:
        first, second = (labels[column] for column in by_words[:2])
        raise ColumnsUnknown(f"columns {first!r} and {second!r} both hold text")
    return (by_words[0],)


def _named(labels: Sequence[str], wanted: str, what: str) -> int:
    """The column of a name or of a number from 1. Raises ColumnsUnknown."""
    plain = [label.strip().lower() for label in labels]
    if wanted in labels:
        return list(labels).index(wanted)
    if wanted.strip().lower() in plain:
        return plain.index(wanted.strip().lower())
    if wanted.isascii() and wanted.isdigit() and 1 <= int(wanted) <= len(labels):
        return int(wanted) - 1
    known = ", ".join(repr(label) for label in labels)
    raise ColumnsUnknown(f"--{what}-column {wanted}: no such column; there are {known}")


def _rank(label: str, names: Sequence[str]) -> float:
    """How sure a name is, from 1 for the first of the usual names; 0 for another."""
    key = name_key(label)
    return 1 - names.index(key) / len(names) if key in names else 0.0


def _stem(label: str) -> str:
    """`caption_3` → `caption`: captions may stand in numbered columns."""
    match = _NUMBERED_NAME.match(label.strip().lower())
    return match[1] if match else label.strip().lower()


def _share(values: Sequence[str], what: Callable[[str], bool]) -> float:
    return sum(map(what, values)) / len(values)


def _is_text(value: str) -> bool:
    return any(letter.isalpha() for letter in value[:200]) and not looks_like_photo(value)


def _is_sentence(value: str) -> bool:
    return _is_text(value) and _words(value) >= 2


def _words(value: str) -> float:
    """The number of words, roughly also where no spaces separate them."""
    return max(len(value.split()), len(_WIDE.findall(value[:1000])) / 2)
