"""Captions in text files beside the photos: `p1.txt` beside `p1.jpg`, one caption a line."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.captions.formats.encoding import open_text
from pipeline.captions.mark import marked
from pipeline.captions.photo_index import PhotoIndex
from pipeline.captions.records import DatasetError, Reading

SIDECAR = "sidecar"
_SUFFIXES = (".txt", ".TXT", ".caption")
_LARGEST_BYTES = 1 << 20  # of a text beside a photo


def read_sidecars(photos: Iterable[str], index: PhotoIndex) -> Reading:
    """The captions beside photos, whose paths are below the folder of the index.

    Texts that this program wrote are left out. Raises DatasetError if nothing is left, or more than
    a tenth of the texts cannot be read.
    """
    reading = Reading(str(index.images), "text files beside the photos")
    without = written = 0
    for photo in photos:
        text = _text_beside(photo, index)
        if text is None:
            without += 1
            continue
        reading.rows += 1
        try:
            path = index.images / text
            if path.stat().st_size > _LARGEST_BYTES:
                raise DatasetError(f"{path}: too large for captions of one photo")
            file, encoding = open_text(path)
            with file:
                lines = file.read().splitlines()
        except (OSError, DatasetError) as error:
            reading.fault(text, str(error), "cannot be read")
            continue
        if any(map(marked, lines)):
            written += 1
            continue
        if encoding.guessed:
            reading.encoding_guessed = True
        reading.add(photo, [line for line in lines if line.strip()] or [""])
    reading.notes += left_out_notes(without, "no text beside them", written)
    if not reading.names and not reading.faults:
        raise DatasetError(
            f"{index.images}: no captions beside the photos ({'; '.join(reading.notes)}); "
            "p1.txt beside p1.jpg is looked for"
        )
    reading.check("see that these are text files in UTF-8")
    return reading


def left_out_notes(without: int, what: str, written: int) -> list[str]:
    """Notes on photos without captions, and on those whose captions this program wrote."""
    notes = [f"{without:,} photos have {what} and are left out"] if without else []
    if written:
        notes.append(
            f"{written:,} photos are left out because this program wrote their captions, and a "
            "model would learn from its own"
        )
    return notes


def _text_beside(photo: str, index: PhotoIndex) -> str | None:
    stem = photo.rpartition(".")[0] or photo
    names = [before + suffix for before in (stem, photo) for suffix in _SUFFIXES]
    return next((name for name in names if name in index), None)
