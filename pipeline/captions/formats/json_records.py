"""Captions in JSON of any structure: records wherever they lie, fields known by what they hold.

A record is an object with a field that names a photo and one with sentences: one, a list, or
records again. A list of records may lie anywhere. An object may also map photos to their captions,
or be a table: a list for each column.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from pipeline.captions.formats.columns import Columns, ColumnsUnknown, choose_columns, name_key
from pipeline.captions.formats.tables import FLAGS, TRUE
from pipeline.captions.image_ids import image_id_of
from pipeline.captions.mark import MARK
from pipeline.captions.photo_index import PhotoIndex, looks_like_photo, without_number
from pipeline.captions.records import (
    Choice,
    DatasetError,
    Reading,
    no_splits,
    shortened,
    unknown_splits,
)

_JUDGED_RECORDS = 500
_DEEPEST = 12
_HELP = (
    "name the fields with --image-column and --caption-column, as they are called in this message"
)
_SPLITS = frozenset(("train", "restval", "val", "valid", "validation", "dev", "test"))
# Fields that may hold the id of a photo beside its name.
_IDS = ("cocoid", "image_id", "imgid", "id")
_KEY, _VALUE = "(key)", "(value)"
# Who speaks in a conversation about a photo. Only the answers describe it.
_SPEAKERS, _ASKING = ("from", "role"), frozenset(("human", "user", "system"))


@dataclass(frozen=True)
class Found:
    """A list of records: where it lies in the file, the split that its place names."""

    place: str
    split: str | None
    records: Iterable[Any]


def find_records(
    value: object,
    has_photo: Callable[[str], bool] | None,
    place: str = "",
    split: str | None = None,
    depth: int = 0,
) -> Iterator[Found]:
    """Every list of records in a value, without those that lie in records."""
    if depth > _DEEPEST:
        return
    if isinstance(value, list):
        if any(isinstance(each, dict | list) for each in value[:_JUDGED_RECORDS]):
            yield Found(place, split, value)
        return
    if not isinstance(value, dict):
        return
    table = _table(value)
    if table is not None:
        yield Found(place, split, table)
        return
    if _maps_photos(value, has_photo):
        yield Found(place, split, [_keyed(key, item) for key, item in value.items()])
        return
    below = False
    for key, item in value.items():
        inside = key.lower() if key.lower() in _SPLITS else split
        for found in find_records(
            item, has_photo, f"{place}.{key}" if place else key, inside, depth + 1
        ):
            below = True
            yield found
    if not below and value:
        yield Found(place, split, [value])  # one record alone


def _table(value: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of `{"image": [...], "caption": [...]}`, or of the same with objects for lists, as
    pandas writes tables; None if it is no table.
    """
    columns = list(value.values())
    if len(columns) < 2:
        return None
    if all(isinstance(column, dict) for column in columns):
        keys = list(columns[0])
        if not keys or any(list(column) != keys for column in columns) or looks_like_photo(keys[0]):
            return None
        if not all(key.isdigit() for key in keys[:10]):
            return None
        return [{name: column[key] for name, column in value.items()} for key in keys]
    if all(isinstance(column, list) for column in columns):
        lengths = {len(column) for column in columns}
        scalars = all(isinstance(each, str | int) for column in columns for each in column[:10])
        if len(lengths) == 1 and scalars and not any(map(looks_like_photo, value)):
            return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return None


def _maps_photos(value: dict[str, Any], has_photo: Callable[[str], bool] | None) -> bool:
    keys = list(islice(value, _JUDGED_RECORDS))
    photos = sum(
        looks_like_photo(key) or (has_photo is not None and has_photo(key)) for key in keys
    )
    return photos > len(keys) / 2


def _keyed(key: str, item: object) -> dict[str, Any]:
    return {_KEY: key, **item} if isinstance(item, dict) else {_KEY: key, _VALUE: item}


def read_records(
    reading: Reading, lists: Iterable[Found], index: PhotoIndex | None, choice: Choice
) -> Reading:
    """Read the records of all lists in which photos and captions are found, into `reading`.

    Raises DatasetError if there are none, or more than a tenth of the records cannot be read.
    """
    has_photo = index.has if index is not None else None
    wanted, known = choice.wanted_splits, set[str]()
    failed: list[str] = []
    described: dict[str, list[str]] = {}  # fields → where the lists lie that have them
    for found in lists:
        records = iter(found.records)
        sample = list(islice(records, _JUDGED_RECORDS))
        try:
            fields, columns = _choose(reading.source, sample, has_photo, choice)
        except ColumnsUnknown as error:
            shown = " and ".join(shortened(json.dumps(r, ensure_ascii=False)) for r in sample[:2])
            place = f" of {found.place!r}" if found.place else ""
            failed.append(f"{error}{place}; the first records are {shown}")
            continue
        photo, captions = fields[columns.photo], [fields[number] for number in columns.captions]
        words = f"photos in {photo!r}, captions in {', '.join(map(repr, captions))}"
        described.setdefault(words, []).append(found.place)
        known |= _read_list(reading, found, sample, records, photo, captions, index, wanted)
    if not described:
        help = f"; {_HELP}" if failed else ""
        raise DatasetError(f"{reading.source}: {failed[0] if failed else 'no records in it'}{help}")
    reading.columns = "; ".join(
        f"{words} of {', '.join(map(repr, places))}" if any(places) else words
        for words, places in described.items()
    )
    if wanted is not None and not known:
        raise no_splits(reading.source)
    if wanted is not None and not wanted <= known:
        raise unknown_splits(reading.source, wanted, known)
    _keep_unique_ids(reading)
    reading.check(_HELP)
    return reading


def _choose(
    source: str, sample: Sequence[Any], has_photo: Callable[[str], bool] | None, choice: Choice
) -> tuple[list[str], Columns]:
    """(the fields of a list of records, which of them is what). Raises ColumnsUnknown."""
    rows = [flat(record) for record in sample]
    fields = list(dict.fromkeys(field for row in rows for field in row))
    if MARK in {field.rpartition(".")[2] for field in fields}:
        raise DatasetError(
            f"{source}: written by this program (field {MARK}); a model would learn from its own "
            "captions"
        )
    table = [[row.get(field, []) for field in fields] for row in rows]
    return fields, choose_columns(
        fields, table, has_photo, choice.image_column, choice.caption_column
    )


def _read_list(
    reading: Reading,
    found: Found,
    sample: Sequence[Any],
    others: Iterable[Any],
    photo: str,
    captions: Sequence[str],
    index: PhotoIndex | None,
    wanted: frozenset[str] | None,
) -> set[str]:
    """Read one list of records into `reading`: the first of them and the others. Returns the splits
    that it has.
    """
    known = set[str]()
    # Where a photo and its captions lie in an inner record, each such record is one of its own.
    inner = _common_start([photo, *captions], sample)
    names_at = photo.split(".")[len(inner) :]
    texts_at = [field.split(".")[len(inner) :] for field in captions]
    for number, outer in enumerate(chain(sample, others), 1):
        for record in _inner_records(outer, inner):
            reading.rows += 1
            names = [str(name).strip() for name in values_of(record, names_at) if _is_name(name)]
            if not names:
                where = f"record {number}" + (f" of {found.place!r}" if found.place else "")
                reading.fault(where, json.dumps(record, ensure_ascii=False), f"no {photo!r}")
                continue
            split = _field(record, outer, "split", found.split)
            if split is not None:
                known.add(str(split))
            if wanted is not None and str(split) not in wanted:
                continue
            texts = [text for field in texts_at for text in values_of(record, field)]
            flag = _flag(record) or (_flag(outer) if outer is not record else None)
            if flag is not None:
                reading.left_out[flag] += len(texts)
                texts = []
            for name in names:
                plain = without_number(name)
                if plain != name and index is not None and name in index:
                    plain = name
                reading.add(plain, texts, _id(record, photo) if len(names) == 1 else None)
    return known


def _common_start(fields: Sequence[str], sample: Sequence[Any]) -> list[str]:
    """The parts that fields within fields have in common: `regions` of `regions.phrase`, …

    Empty if the dots are part of the names of the fields.
    """
    common = []
    for parts in zip(*(field.split(".")[:-1] for field in fields), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    if common and not any(isinstance(each, dict) and common[0] in each for each in sample):
        return []
    return common


def _inner_records(record: Any, place: Sequence[str]) -> Iterator[Any]:
    if isinstance(record, list) and place:
        for each in record:
            yield from _inner_records(each, place)
    elif not place:
        yield from record if isinstance(record, list) and _holds_objects(record) else [record]
    elif isinstance(record, dict):
        yield from _inner_records(record.get(place[0]), place[1:])


def _holds_objects(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)


def _field(record: Any, outer: Any, name: str, default: object) -> object:
    """The value of a field of a record, or of the record that it lies in."""
    for each in (record, outer):
        if isinstance(each, dict) and name in each:
            return each[name]
    return default


def _is_name(name: object) -> bool:
    return isinstance(name, str | int) and not isinstance(name, bool) and bool(str(name).strip())


def _flag(record: object) -> str | None:
    if not isinstance(record, dict):
        return None
    for key, value in record.items():
        if value and name_key(key) in FLAGS and str(value).lower() in TRUE:
            return FLAGS[name_key(key)]
    return None


def _id(record: object, photo: str) -> str | None:
    """The id that a record gives its photo beside its name; None if there is none."""
    if isinstance(record, dict):
        for field in _IDS:
            value = record.get(field)
            if field != photo and isinstance(value, int | str) and not isinstance(value, bool):
                return image_id_of(value)
    return None


def _keep_unique_ids(reading: Reading) -> None:
    """Forget the ids if they number captions instead of photos, or some photos have none."""
    if reading.ids_differ or len(set(reading.ids.values())) < len(reading.names):
        reading.ids, reading.ids_differ = {}, False


def flat(record: object) -> dict[str, list[str]]:
    """Field → its values, also those of fields within fields: `regions.phrase`."""
    fields: dict[str, list[str]] = {}

    def walk(value: object, name: str, depth: int) -> None:
        if depth > _DEEPEST:
            return
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{name}.{key}" if name else str(key), depth + 1)
        elif isinstance(value, list):
            if name:
                for item in value:
                    walk(item, name, depth + 1)
            else:  # a row instead of an object
                for number, item in enumerate(value, 1):
                    walk(item, str(number), depth + 1)
        elif isinstance(value, str | int) and not isinstance(value, bool):
            fields.setdefault(name, []).append(str(value))
        else:
            fields.setdefault(name, [])

    walk(record, "", 0)
    return fields


def values_of(value: Any, field: Sequence[str]) -> list[object]:
    """The values of a field in a record; None for those that are null."""
    if len(field) == 1 and isinstance(value, dict) and value.keys().isdisjoint(_SPEAKERS):
        plain = value.get(field[0])
        if isinstance(plain, str):  # the usual case, of which a file has hundreds of thousands
            return [plain]
    if isinstance(value, list) and field and field[0].isdigit():
        place = int(field[0]) - 1
        return values_of(value[place], field[1:]) if place < len(value) else []
    if isinstance(value, list):
        return [found for item in value for found in values_of(item, field)]
    if not field:
        return [] if isinstance(value, dict) else [value]
    if not isinstance(value, dict):
        return []
    if any(value.get(speaker) in _ASKING for speaker in _SPEAKERS if _is_text(value.get(speaker))):
        return []
    # The name of a field may contain a dot.
    return next(
        (
            values_of(value[".".join(field[:length])], field[length:])
            for length in range(1, len(field) + 1)
            if ".".join(field[:length]) in value
        ),
        [],
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str)
