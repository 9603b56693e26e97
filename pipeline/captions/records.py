"""Photos with their captions, and what one source of captions says before its photos are found."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.errors import CapError
from cache.record import Strings

# More of the rows than this share cannot be read: the file was probably misunderstood.
_MOST_FAULTS = 0.1
_SHOWN_FAULTS = 3
_SHOWN_LETTERS = 60
# A longer text is no caption, but a line that lost its end or a photo's bytes.
_LONGEST_CAPTION = 20_000
# How programs write that there is no caption.
_LONGEST_NOTHING = 5
_NOTHING = frozenset(("nan", "null", "none", "na", "n/a", "<na>", "#n/a"))


class DatasetError(CapError):
    """Raised when a photo folder or a captions file cannot be used.

    The message is one line that starts with the file.
    """


@dataclass(frozen=True, slots=True)
class Photo:
    """One photo and its captions. `path` is relative to the image folder, with `/` as separator."""

    image_id: str
    path: str
    captions: tuple[str, ...] = ()


@dataclass
class Reading:
    """What one source of captions says. Names of photos are as the source writes them."""

    source: str
    format: str  # in words, as `CSV, ISO-8859-1`
    columns: str = ""  # in words, which column or field holds what
    names: dict[str, int] = field(default_factory=dict)  # of the photos, with their numbers
    ids: dict[str, str] = field(default_factory=dict)  # by name; the others have their name as id
    ids_differ: bool = False  # one photo has several
    rows: int = 0
    faults: int = 0  # rows that cannot be read
    first_faults: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # captions, by reason
    notes: list[str] = field(default_factory=list)  # what else the user should know
    encoding_guessed: bool = False
    # Captions as they come: their bytes in UTF-8, where each one ends, and whose it is.
    _texts: bytearray = field(default_factory=bytearray)
    _ends: array[int] = field(default_factory=lambda: array("q", [0]))
    _owners: array[int] = field(default_factory=lambda: array("i"))
    _halves: dict[int, str] = field(default_factory=dict)  # captions that are no text, by photo

    def add(self, name: str, texts: Iterable[object], image_id: str | None = None) -> None:
        """Add captions of a photo, without the empty ones, which are counted."""
        number = self.names.setdefault(name, len(self.names))
        if image_id is not None and self.ids.setdefault(name, image_id) != image_id:
            self.ids_differ = True
        for text in texts:
            caption = " ".join(text.split()) if type(text) is str else None
            if caption is None or not _LONGEST_NOTHING < len(caption) <= _LONGEST_CAPTION:
                caption = self._caption(text)  # hardly any
            if caption is None:
                continue
            try:
                self._texts += caption.encode()
            except UnicodeEncodeError:
                self._halves.setdefault(number, caption)
                self._texts += caption.encode(errors="replace")
            self._ends.append(len(self._texts))
            self._owners.append(number)

    def captions(self, photo_of: NDArray[np.int32]) -> tuple[Strings, NDArray[np.int32]]:
        """(M captions, photo after photo, and the photo (M,) of each).

        photo_of: the photo of each name, by the name's number; -1 to leave its captions out. Of
        several names of a photo, all captions of one follow those of another.
        """
        texts = Strings(np.frombuffer(self._texts, np.uint8), np.frombuffer(self._ends, np.int64))
        owners = np.frombuffer(self._owners, np.int32)
        photos = photo_of[owners]
        kept = photos >= 0
        if not kept.all():
            texts, owners, photos = texts.where(kept), owners[kept], photos[kept]
        if (photos[:-1] > photos[1:]).any() or (owners[:-1] > owners[1:]).any():
            order = np.lexsort((owners, photos))
            texts, photos = texts.take(order), photos[order]
        return texts, photos

    def half_of_a_character(self, number: int) -> str | None:
        """A caption of the photo of this name's number that holds one; None if none does."""
        return self._halves.get(number)

    def _caption(self, text: object) -> str | None:
        if text is None:
            self.left_out["empty"] += 1
            return None
        if not isinstance(text, str):
            self.left_out["not text"] += 1
            return None
        caption = " ".join(text.split())
        if not caption:
            self.left_out["empty"] += 1
            return None
        if len(caption) <= _LONGEST_NOTHING and caption.lower() in _NOTHING:
            self.left_out[f"“{caption}”"] += 1
            return None
        if len(caption) > _LONGEST_CAPTION:
            self.left_out[f"longer than {_LONGEST_CAPTION:,} characters"] += 1
            return None
        return caption

    def fault(self, where: str, text: str, reason: str) -> None:
        """Count a row that cannot be read. where: as `line 17`. text: the row as it is there."""
        self.faults += 1
        if len(self.first_faults) < _SHOWN_FAULTS:
            self.first_faults.append(f"{where}: {reason}: {shortened(text)}")

    def faults_in_words(self) -> str:
        return (
            f"{self.faults:,} of {self.rows:,} rows cannot be read ({'; '.join(self.first_faults)})"
        )

    def check(self, help: str) -> None:
        """Raise DatasetError if too many rows cannot be read, or if no photo was named.

        help: what the user can do about rows that cannot be read.
        """
        if self.faults > _MOST_FAULTS * self.rows:
            understood = f"understood as {self.format}"
            if self.columns:
                understood += f" with {self.columns}"
            raise DatasetError(
                f"{self.source}: {self.faults_in_words()}, more than a tenth; {understood}; {help}"
            )
        if not self.names:
            raise DatasetError(f"{self.source}: names no photo")


def shortened(text: str) -> str:
    """A text for a message, on one line and not too long."""
    text = text.strip()
    return repr(text if len(text) <= _SHOWN_LETTERS else text[:_SHOWN_LETTERS] + "…")


def check_text(name: str, caption: str | None, source: str) -> None:
    r"""Raise DatasetError if half of a surrogate pair, as JSON can hold (`"\ud83d"`), is in a name
    or a caption of a photo. It is no text, and no file in UTF-8 can hold it.
    """
    # Python gives such halves to the bytes of a file's name that are not UTF-8.
    for text, errors in ((name, "surrogateescape"), (caption, "strict")):
        if text is None:
            continue
        try:
            text.encode(errors=errors)
        except UnicodeEncodeError as error:
            raise DatasetError(
                f"{source}: half of a character ({text[error.start]!r}) in {text!r} of photo "
                f"{name!r}, instead of text; correct it in the file"
            ) from None


@dataclass(frozen=True)
class Choice:
    """What the user says about a captions file; None: to be found out."""

    split: str | None = None  # comma-separated names
    image_column: str | None = None
    caption_column: str | None = None

    @property
    def wanted_splits(self) -> frozenset[str] | None:
        return frozenset(name.strip() for name in self.split.split(",")) if self.split else None

    @property
    def names_columns(self) -> bool:
        return self.image_column is not None or self.caption_column is not None


def no_splits(source: str | Path) -> DatasetError:
    return DatasetError(f"{source}: has no splits; use --only with a list of photo names")


def unknown_splits(source: str | Path, wanted: frozenset[str], known: set[str]) -> DatasetError:
    unknown, known_ones = ", ".join(sorted(wanted - known)), ", ".join(sorted(known))
    return DatasetError(f"{source}: no split {unknown}; it has {known_ones}")
