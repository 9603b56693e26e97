"""Captions in tables: CSV, TSV, Flickr's token.txt and results.csv, and whatever has columns.

Delimiter and header are those with which most rows name a photo and hold a caption.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO

from pipeline.captions.formats.columns import (
    Columns,
    ColumnsUnknown,
    choose_columns,
    name_key,
    names_captions,
    names_photos,
)
from pipeline.captions.formats.encoding import Encoding
from pipeline.captions.formats.rows import Row, split_rows
from pipeline.captions.mark import MARK, marked
from pipeline.captions.photo_index import PhotoIndex, looks_like_photo, without_number
from pipeline.captions.records import (
    Choice,
    DatasetError,
    Reading,
    no_splits,
    shortened,
    unknown_splits,
)

_SAMPLED_LINES = 500
_JUDGED_ROWS = 200
_NARROWEST = 0.1  # of the rows without a header may have fewer cells than the others
_DELIMITERS = {"\t": "tabs", "|": "bars", ";": "semicolons", ",": "commas", " ": "spaces"}
_HELP = "name the columns with --image-column and --caption-column, by name or number from 1"
# Spreadsheets put the delimiter of a file into its first line.
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\s*$', re.IGNORECASE)
_FLICKR_NAME = re.compile(r"\S+#\d+\t")
# Columns that say which captions not to train on (VizWiz's), and what to call those.
FLAGS = {"isrejected": "rejected", "isprecanned": "written in advance"}
TRUE = frozenset(("true", "1", "yes"))


@dataclass(frozen=True)
class _Layout:
    """How the lines of a file are a table."""

    delimiter: str
    quoting: bool
    header: list[str] | None
    width: int  # columns
    columns: Columns

    @property
    def labels(self) -> list[str]:
        return self.header or [str(number + 1) for number in range(self.width)]


def read_table(
    path: Path, file: IO[str], encoding: Encoding, index: PhotoIndex | None, choice: Choice
) -> Reading:
    """Read a table whose lines `file` returns.

    Raises DatasetError if it cannot be told what the columns hold, or more than a tenth of the rows
    cannot be read.
    """
    numbered = enumerate(file, 1)
    sample = list(islice(numbered, _SAMPLED_LINES))
    named = _SEPARATOR_LINE.match(sample[0][1]) if sample else None
    if named:
        del sample[0]
    layout = _find_layout(path, sample, named[1] if named else None, index, choice)
    labels, columns = layout.labels, layout.columns
    reading = Reading(
        str(path),
        f"table with {_DELIMITERS.get(layout.delimiter, repr(layout.delimiter))}, {encoding.name}",
        _in_words(layout),
        encoding_guessed=encoding.guessed,
    )
    flags = [(n, FLAGS[key]) for n, label in enumerate(labels) if (key := name_key(label)) in FLAGS]
    splits = [number for number, label in enumerate(labels) if name_key(label) == "split"]
    wanted, known = choice.wanted_splits, set[str]()
    if wanted is not None and not splits:
        raise no_splits(path)
    if any(marked(label) for label in labels):
        raise DatasetError(
            f"{path}: written by this program (column {MARK}); a model would learn from its own "
            "captions"
        )
    rows = _rows(chain(sample, numbered), layout, index)
    if layout.header is not None:
        next(rows)
    cell = name = ""
    for row in rows:
        reading.rows += 1
        cells, fault = _cells(row, layout)
        if fault:
            reading.fault(f"line {row.line}", row.text, fault)
            continue
        if splits:
            known.add(cells[splits[0]].strip())
            if wanted is not None and cells[splits[0]].strip() not in wanted:
                continue
        reasons = [reason for n, reason in flags if cells[n].strip().lower() in TRUE]
        texts = [cells[number] for number in columns.captions]
        if reasons:
            reading.left_out[reasons[0]] += len(texts)
            texts = []
        if cells[columns.photo] != cell:  # a photo's captions mostly follow one another
            cell = cells[columns.photo]
            name = _name(cell, index)
        reading.add(name, texts)
    if wanted is not None and not wanted <= known:
        raise unknown_splits(path, wanted, known)
    reading.check(_HELP)
    return reading


def _name(cell: str, index: PhotoIndex | None) -> str:
    name = cell.strip()
    plain = without_number(name)
    return name if plain != name and index is not None and name in index else plain


def _cells(row: Row, layout: _Layout) -> tuple[list[str], str]:
    """(the cells, one for each column, why the row cannot be read).

    Delimiters within a caption that is not in quotes make surplus cells.
    """
    cells, width = row.cells, layout.width
    photo, captions = layout.columns.photo, layout.columns.captions
    fault = row.fault
    if len(cells) == width and not fault and row.text.isascii():  # nearly all
        cell = cells[photo]
        if looks_like_photo(cell) or (cell.strip() and layout.columns.share <= 0):
            return cells, ""
    surplus = len(cells) - width
    if surplus > 0 and not fault:
        while surplus and not cells[-1].strip():
            cells = cells[:-1]
            surplus -= 1
        caption = captions[0]
        if surplus and len(captions) == 1 and caption == width - 1:
            rest = layout.delimiter.join(cells[caption:])
            cells = [*cells[:caption], rest]
        elif surplus and len(captions) == 1 and width == 2:
            cells = [layout.delimiter.join(cells[: surplus + 1]), cells[-1]]
        elif surplus:
            fault = f"{len(row.cells)} cells instead of {width}"
    if not fault and len(cells) <= max(photo, *captions):
        fault = f"{len(cells)} cells instead of {width}"
    if not fault and not cells[photo].strip():
        fault = "names no photo"
    if not fault and layout.columns.share > 0 and not _may_be_photo(cells[photo]):
        fault = "no photo's name"
    if not fault and not row.text.isascii() and any("\udc80" <= c <= "\udcff" for c in row.text):
        fault = "letters in another encoding"
    return cells + [""] * (width - len(cells)), fault


def _may_be_photo(cell: str) -> bool:
    """False for a sentence where a photo should be."""
    return looks_like_photo(cell) or len(cell.split()) <= 3


def _rows(
    numbered: Iterable[tuple[int, str]], layout: _Layout, index: PhotoIndex | None
) -> Iterator[Row]:
    photo = layout.columns.photo

    def is_row(cells: list[str]) -> bool:
        return len(cells) >= 2 and len(cells) > photo and _is_photo(cells[photo], index)

    return split_rows(numbered, layout.delimiter, quoting=layout.quoting, is_row=is_row)


def _is_photo(cell: str, index: PhotoIndex | None) -> bool:
    cell = cell.strip().strip('"')
    return looks_like_photo(cell) or (index is not None and index.has(cell))


def _find_layout(
    path: Path,
    sample: Sequence[tuple[int, str]],
    delimiter: str | None,
    index: PhotoIndex | None,
    choice: Choice,
) -> _Layout:
    """The layout in which most rows of the sample can be read. Raises DatasetError."""
    has_photo = index.has if index is not None else None
    first_line = next((line for _, line in sample if line.strip()), "")
    # Flickr's token.txt knows no quotes around cells: those in it belong to the captions.
    quoting = _FLICKR_NAME.match(first_line) is None
    best: tuple[float, _Layout] | None = None
    # The attempt to show: where the photos are known, what was split most consistently.
    failed: tuple[tuple[bool, float], str, list[Row]] | None = None

    def any_photo(cells: list[str]) -> bool:
        return len(cells) >= 2 and any(looks_like_photo(cell.strip('" \n')) for cell in cells)

    for each in [delimiter] if delimiter is not None else _DELIMITERS:
        rows = list(split_rows(sample, each, quoting=quoting, is_row=any_photo))
        rows = [row for row in rows if not row.fault][:_JUDGED_ROWS]
        if len(rows) < 1 or max(len(row.cells) for row in rows) < 2:
            continue
        try:
            layout = _layout(rows, each, quoting, has_photo, choice)
        except ColumnsUnknown as error:
            several = sum(len(row.cells) == len(rows[0].cells) > 1 for row in rows) / len(rows)
            attempt = (error.photos_known, several)
            if failed is None or attempt > failed[0]:
                failed = attempt, str(error), rows[:2]
            continue
        readable = sum(not _cells(row, layout)[1] for row in rows[layout.header is not None :])
        score = readable / len(rows) * (0.1 + layout.columns.share)
        if best is None or score > best[0]:
            best = score, layout
    if best is not None:
        return best[1]
    if failed is None:
        raise DatasetError(
            f"{path}: no captions file: neither JSON nor a table that names photos; "
            f"it begins with {shortened(first_line)}"
        )
    (_, reason, shown) = failed
    split = " and ".join(" ".join(f"[{shortened(cell)}]" for cell in row.cells) for row in shown)
    raise DatasetError(f"{path}: {reason}; the first rows are {split}; {_HELP}")


def _layout(
    rows: Sequence[Row],
    delimiter: str,
    quoting: bool,
    has_photo: Callable[[str], bool] | None,
    choice: Choice,
) -> _Layout:
    """The layout of a delimiter. Raises ColumnsUnknown."""
    header = None
    if _is_header(rows, has_photo, choice):
        header = [cell.strip() for cell in rows[0].cells]
        rows = rows[1:]
    if header is not None:
        width = len(header)
    else:
        widths = sorted(len(row.cells) for row in rows)
        width = widths[int(_NARROWEST * len(widths))]
    sample = [
        [[cell] if cell.strip() else [] for cell in (row.cells + [""] * width)[:width]]
        for row in rows
    ]
    labels = header or [str(number + 1) for number in range(width)]
    columns = choose_columns(labels, sample, has_photo, choice.image_column, choice.caption_column)
    return _Layout(delimiter, quoting, header, width, columns)


def _is_header(
    rows: Sequence[Row], has_photo: Callable[[str], bool] | None, choice: Choice
) -> bool:
    first = [cell.strip() for cell in rows[0].cells]
    told = [name for name in (choice.image_column, choice.caption_column) if name is not None]
    if any(name in first for name in told if not name.isdigit()):
        return True
    if any(map(names_photos, first)) and any(map(names_captions, first)):
        return True
    if any(map(looks_like_photo, first)):
        return False
    if any(map(names_photos, first)) or any(map(names_captions, first)):
        return True

    def is_photo(cell: str) -> bool:
        return looks_like_photo(cell) or (has_photo is not None and has_photo(cell))

    for column, cell in enumerate(first):
        below = [row.cells[column] for row in rows[1:] if len(row.cells) > column]
        if below and not is_photo(cell) and sum(map(is_photo, below)) > len(below) / 2:
            return True
    return False


def _in_words(layout: _Layout) -> str:
    """Which columns hold what, as `photos in column image, captions in column caption`."""
    named = [layout.labels[number] for number in layout.columns.captions]
    captions = named[0] if len(named) == 1 else f"{named[0]} to {named[-1]}"
    header = "" if layout.header is not None else " (no header)"
    photo = layout.labels[layout.columns.photo]
    return f"photos in column {photo!r}, captions in column {captions!r}{header}"
