"""What was understood of captions, in words. It is shown before work begins: no guess is hidden."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.record import Strings
from pipeline.captions.photo_index import BY_PATH, Matches, PhotoIndex
from pipeline.captions.photos import Photos
from pipeline.captions.records import Reading
from train.captions.script import script_of

# Fewer found photos than this, of those named and of those there, are probably a mistake.
_HARDLY_ANY = 0.1
_SHOWN_CAPTION = 100


@dataclass(frozen=True)
class Understood:
    """What was understood of one source of captions."""

    source: str
    format: str
    columns: str
    named: int  # photos that the source names
    found: int | None  # of these, photos below the image folder; None without a folder
    captions: int  # of the photos found
    per_photo: tuple[int, int]  # the fewest and the most captions of a photo
    script: str | None  # of most letters, as `Latin`
    example: tuple[str, str] | None  # a photo, as the source names it, and its first caption
    notes: tuple[str, ...]  # one line each: what is left out, what could not be read

    def lines(self) -> list[str]:
        """The same for the user, in lines that begin with the source."""
        photos = f"{self.named:,} photos"
        if self.found is not None:
            photos = f"{self.found:,} of {photos} found"
        fewest, most = self.per_photo
        per_photo = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        parts = [self.format, self.columns, photos]
        parts.append(f"{self.captions:,} captions ({per_photo} per photo)")
        if self.script is not None:
            parts.append(f"{self.script} script")
        lines = ["; ".join(part for part in parts if part)]
        if self.example is not None:
            photo, caption = self.example
            shown = caption if len(caption) <= _SHOWN_CAPTION else caption[:_SHOWN_CAPTION] + "…"
            lines.append(f"first caption, of {_one_line(photo)}: {shown}")
        return [f"{self.source}: {line}" for line in [*lines, *self.notes]]

    def as_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "format": self.format,
            "columns": self.columns,
            "photos_named": self.named,
            "photos_found": self.found,
            "captions": self.captions,
            "fewest_per_photo": self.per_photo[0],
            "most_per_photo": self.per_photo[1],
            "script": self.script,
            "first_photo": self.example[0] if self.example else None,
            "first_caption": self.example[1] if self.example else None,
            "notes": list(self.notes),
        }


def understood(reading: Reading, matches: Matches | None, index: PhotoIndex | None) -> Understood:
    """matches, index: of the image folder; None without one."""
    found = np.ones(len(reading.names), bool)
    if matches is not None:
        found = np.array([path is not None for path in matches.paths], bool)
    numbers = np.where(found, np.cumsum(found) - 1, -1).astype(np.int32)
    texts, owners = reading.captions(numbers)
    counts = np.bincount(owners, minlength=int(found.sum()))
    return Understood(
        source=reading.source,
        format=reading.format,
        columns=reading.columns,
        named=len(reading.names),
        found=matches.found if matches is not None else None,
        captions=len(texts),
        per_photo=(int(counts.min(initial=len(texts))), int(counts.max(initial=0))),
        script=script_of(texts),
        example=_example(reading, texts, np.flatnonzero(found)[owners]),
        notes=tuple(_notes(reading, matches, index)),
    )


def _example(
    reading: Reading, texts: Strings, numbers: NDArray[np.int64]
) -> tuple[str, str] | None:
    """The first caption; where the encoding was guessed, the first that shows whether rightly.

    texts, numbers: M captions, and for each the number of its photo's name.
    """
    if not len(texts):
        return None
    place = 0
    if reading.encoding_guessed:
        place = next((n for n, text in enumerate(texts) if not text.isascii()), 0)
    return next(islice(reading.names, int(numbers[place]), None)), texts[place]


def _notes(reading: Reading, matches: Matches | None, index: PhotoIndex | None) -> list[str]:
    notes = []
    if reading.encoding_guessed:
        notes.append("the encoding is a guess; if letters are wrong, save the file as UTF-8")
    if reading.faults:
        notes.append(f"{reading.faults_in_words()}; they are left out")
    if reading.left_out:
        counted = ", ".join(f"{count:,} {reason}" for reason, count in reading.left_out.items())
        notes.append(f"captions left out: {counted}")
    notes += reading.notes
    if matches is not None and index is not None:
        if matches.how and set(matches.how) != {BY_PATH}:
            ways = ", ".join(f"{count:,} {how}" for how, count in matches.how.items())
            notes.append(f"photos matched: {ways}")
        if matches.ambiguous:
            notes.append(
                f"{len(matches.ambiguous):,} names are left out because they fit several photos, "
                f"or several of them fit one (first: {_one_line(matches.ambiguous[0])})"
            )
        if matches.missing:
            few = matches.found < _HARDLY_ANY * min(len(reading.names), index.files)
            more = f"; {what_is_there(matches, index)}" if few else ""
            notes.append(
                f"{len(matches.missing):,} photos are not in {index.label} and are left out "
                f"(first: {_one_line(matches.missing[0])}){more}"
            )
    return notes


def what_is_there(matches: Matches, index: PhotoIndex) -> str:
    """What was looked for in vain, what the folder holds, and what looks alike."""
    looked = (matches.missing or matches.ambiguous)[0]
    there = next(index.some_files(), None)
    said = f"looked for {_one_line(looked)}"
    if there is None:
        return f"{said}; the folder is empty"
    said += f"; there are {index.files:,} files, as {there}"
    alike = index.alike(looked)
    return f"{said}; {alike} looks alike" if alike is not None else said


def joined_notes(photos: Photos, ids_differ: bool, sources: int) -> list[str]:
    """Lines on all sources together."""
    lines = []
    if ids_differ:
        lines.append("some image ids stand for several photos, so names of files are the ids")
    if sources > 1:
        lines.append(f"together: {len(photos):,} photos, {len(photos.texts):,} captions")
    return lines


def _one_line(name: str) -> str:
    return " ".join(name.split())
