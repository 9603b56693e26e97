"""Captions that lie with photos in tars and Parquet files: members beside them, or a column."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from pipeline.captions.formats.beside import left_out_notes
from pipeline.captions.formats.columns import ColumnsUnknown, choose_columns
from pipeline.captions.formats.json_records import flat, values_of
from pipeline.captions.mark import MARK, marked
from pipeline.captions.records import (
    Choice,
    DatasetError,
    Reading,
    no_splits,
    unknown_splits,
)
from pipeline.photos.sources.parquets import ParquetIndex
from pipeline.photos.sources.places import without_secrets
from pipeline.photos.sources.source import Collection
from pipeline.photos.sources.tars import TarIndex

_JUDGED = 500  # records and rows by which fields and columns are chosen
_PHOTO = "(photo)"  # stands for the photo beside the fields of its record
_WRITTEN = object()  # instead of captions that this program wrote


class MemberTexts:
    """Captions of the texts of one tar. Fields of JSON are chosen by its first records.

    Only captions are kept, not the texts, which hold much else.
    """

    def __init__(self, choice: Choice, container: str) -> None:
        self._choice, self._container = choice, without_secrets(container)
        self._captions: dict[str, list[Any]] = {}  # by member
        self._first: dict[str, Any] = {}  # records that wait for the choice of fields
        self._fields: list[list[str]] | None = None
        self.kinds: Counter[str] = Counter()
        self.faults: list[tuple[str, str]] = []  # (member, reason)

    def add(self, name: str, data: bytes) -> None:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self.faults.append((name, f"not in UTF-8 ({error.reason})"))
            return
        if not name.lower().endswith(".json"):
            lines = [line for line in text.splitlines() if line.strip()]
            self.kinds[f"{name[name.rindex('.') :].lower()} members"] += 1
            self._captions[name] = [_WRITTEN] if any(map(marked, lines)) else lines
            return
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            self.faults.append((name, f"not valid JSON ({error})"))
            return
        if self._fields is None:
            self._first[name] = record
            if len(self._first) >= _JUDGED:
                self._choose()
        else:
            self._take(name, record)

    def finish(self) -> dict[str, list[Any]]:
        """The captions by member; an object that is no text stands for one of this program."""
        self._choose()
        return self._captions

    def _choose(self) -> None:
        if self._fields is not None or not self._first:
            return
        rows = [flat(_record(record)) for record in self._first.values()]
        fields = [_PHOTO, *dict.fromkeys(field for row in rows for field in row)]
        table = [[["x.jpg"], *(row.get(field, []) for field in fields[1:])] for row in rows]
        self._fields = []
        try:
            found = choose_columns(fields, table, None, _PHOTO, self._choice.caption_column)
        except ColumnsUnknown as error:
            if self._choice.caption_column is not None or "both" in str(error):
                member = f"{self._container}/{next(iter(self._first))}"
                raise DatasetError(f"{member}: {error}; name it with --caption-column") from None
        else:
            self._fields = [fields[number].split(".") for number in found.captions]
        for name, record in self._first.items():
            self._take(name, record)
        self._first = {}

    def _take(self, name: str, record: Any) -> None:
        assert self._fields is not None
        record = _record(record)
        if MARK in record:
            self._captions[name] = [_WRITTEN]
        elif self._fields:
            self.kinds[f"field {'.'.join(self._fields[0])!r} of .json members"] += 1
            self._captions[name] = [t for field in self._fields for t in values_of(record, field)]


def _record(value: Any) -> dict[str, Any]:
    """A member's JSON as an object; a list, or a text alone, is captions."""
    return value if isinstance(value, dict) else {"captions": value}


def read_with_photos(source: Collection, choice: Choice) -> Reading | None:
    """The captions that lie with the photos of a collection; None if there are none.

    Raises DatasetError if it is not clear which column or field holds them.
    """
    reading = Reading(source.label, "")
    formats: dict[str, None] = {}
    without, written, unclear = 0, 0, list[str]()
    known: set[str] = set()
    for above, index in source.indexes:
        prefix = f"{above}/" if above else ""
        if isinstance(index, TarIndex):
            if choice.split is not None:
                raise no_splits(source.label)
            texts = _by_photo(index, unclear, prefix)
            for name in index.names:
                captions = texts.get(name)
                if captions is None:
                    without += 1
                elif _WRITTEN in captions:
                    written += 1
                elif captions or name in texts:
                    reading.rows += 1
                    reading.add(prefix + name, captions or [""])
            for kind in getattr(index.captions, "kinds", ()):
                formats.setdefault(kind)
            for member, reason in getattr(index.captions, "faults", ()):
                reading.rows += 1
                reading.fault(prefix + member, "", reason)
        elif isinstance(index, ParquetIndex):
            column = _read_parquet(index, prefix, reading, choice, known)
            if column is None:
                without += len(index)
            else:
                formats.setdefault(f"column {column}")
        else:
            without += len(index)
    wanted = choice.wanted_splits
    if wanted is not None and known and not wanted <= known:
        raise unknown_splits(source.label, wanted, known)
    if not reading.names and not reading.faults:
        if choice.caption_column is not None:
            raise DatasetError(f"{source.label}: no captions in it")
        return None
    reading.format = "captions in " + ", ".join(formats)
    if unclear:
        reading.notes.append(
            f"{len(unclear):,} photos are left out because another photo has their key, and a text "
            f"could be of either (first: {unclear[0]})"
        )
    reading.notes += left_out_notes(without - len(unclear), "no caption with them", written)
    reading.check("see that the members are text in UTF-8, or valid JSON")
    return reading


def _by_photo(index: TarIndex, unclear: list[str], prefix: str) -> dict[str, list[Any]]:
    """The captions of each photo of a tar that has a text; photos whose text might be of another
    one are added to `unclear`.

    `a.b.txt` is of `a.b.jpg`; else a text is of the photo of its key, as WebDataset has it: `a.txt`
    of `a.left.jpg`.
    """
    texts = index.texts
    if not texts:
        return {}
    by_stem: dict[str, list[str]] = {}
    by_key: dict[str, list[str]] = {}
    for name in index.names:
        by_stem.setdefault(name.rpartition(".")[0], []).append(name)
        by_key.setdefault(key_of(name), []).append(name)
    found: dict[str, list[Any]] = {}
    claimed: dict[str, str] = {}  # key → the photo that has the text of this key by its stem
    several: dict[str, None] = {}
    for member in sorted(texts, key=lambda name: name.endswith(".json")):  # texts first
        stem, key = member.rpartition(".")[0], key_of(member)
        photos = by_stem.get(stem) or by_key.get(key, [])
        if len(photos) > 1:
            several.update(dict.fromkeys(photos))
            continue
        for photo in photos:
            captions = found.setdefault(photo, [])
            captions += [text for text in texts[member] if text not in captions]
            claimed[key] = photo
    for key, photo in claimed.items():
        others = [name for name in by_key.get(key, ()) if name != photo and name not in found]
        several.update(dict.fromkeys(others))
    unclear += [prefix + name for name in several if name not in found]
    return {name: captions for name, captions in found.items() if name not in several}


def key_of(name: str) -> str:
    """The key of a member: its name up to the first point behind the folders."""
    path = PurePosixPath(name)
    above = "" if str(path.parent) == "." else f"{path.parent}/"
    return above + path.name.partition(".")[0]


def _read_parquet(
    index: ParquetIndex, prefix: str, reading: Reading, choice: Choice, known: set[str]
) -> str | None:
    """Read the captions of a Parquet file: the column that holds them; None if none does."""
    shown = without_secrets(index.container)
    columns = index.text_columns
    sample = [index.texts(column, _JUDGED) for column in columns]
    labels = [_PHOTO, *columns]
    table = [[["x.jpg"], *row] for row in zip(*sample, strict=True)]
    if MARK in columns:
        raise DatasetError(
            f"{shown}: written by this program (column {MARK}); a model would learn from its own "
            "captions"
        )
    try:
        chosen = choose_columns(labels, table, None, _PHOTO, choice.caption_column)
    except ColumnsUnknown as error:
        if choice.caption_column is None and "both" not in str(error):
            return None
        raise DatasetError(f"{shown}: {error}; name it with --caption-column") from None
    names = [labels[number] for number in chosen.captions]
    wanted = choice.wanted_splits
    splits: Iterable[list[str]] = [[]] * len(index)
    if wanted is not None:
        if not index.has_split:
            raise no_splits(shown)
        splits = index.texts("split")
    rows = zip(*(index.texts(name) for name in names), strict=True)
    for row, (captions, split) in enumerate(zip(rows, splits, strict=True)):
        known.update(split)
        if wanted is not None and wanted.isdisjoint(split):
            continue
        reading.rows += 1
        texts = [text for column in captions for text in column]
        reading.add(prefix + index.name(row), texts or [""])
    return ", ".join(names)
