"""Captions in JSON, and in JSON lines (one record a line)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pipeline.captions.formats.encoding import Encoding
from pipeline.captions.formats.json_layouts import read_coco, read_karpathy
from pipeline.captions.formats.json_records import Found, find_records, read_records
from pipeline.captions.photo_index import PhotoIndex
from pipeline.captions.records import Choice, DatasetError, Reading, shortened

_LINES_TO_TELL = 3


def read_json(
    path: Path, file: IO[str], encoding: Encoding, index: PhotoIndex | None, choice: Choice
) -> Reading:
    """Read JSON or JSON lines.

    Raises DatasetError if it is neither, or if no records in it name photos and hold captions.
    """
    name = encoding.name
    if _is_json_lines(file):
        reading = Reading(str(path), f"JSON lines, {name}", encoding_guessed=encoding.guessed)
        return read_records(reading, [Found("", None, _line_records(file, reading))], index, choice)
    try:
        value = json.load(file)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: not valid JSON ({error})") from None
    if not choice.names_columns and isinstance(value, dict):
        images = value.get("images")
        if isinstance(images, list):
            if any(isinstance(entry, dict) and "sentences" in entry for entry in images[:10]):
                return read_karpathy(path, images, choice)
            if "annotations" in value or _are_coco_images(images):
                return read_coco(path, value, choice)
    reading = Reading(str(path), f"JSON, {name}", encoding_guessed=encoding.guessed)
    has_photo = index.has if index is not None else None
    return read_records(reading, find_records(value, has_photo), index, choice)


def _are_coco_images(images: list[Any]) -> bool:
    return all(isinstance(image, dict) and image.keys() >= {"id", "file_name"} for image in images)


def _is_json_lines(file: IO[str]) -> bool:
    """Whether one of the first lines, but not all of the file, is JSON. Begins the file again."""
    first = []
    for line in file:
        if line.strip():
            first.append(line)
        if len(first) > _LINES_TO_TELL:
            break
    file.seek(0)
    return len(first) > 1 and any(isinstance(_parsed(line), dict | list) for line in first)


def _parsed(line: str) -> object:
    line = line.strip()
    if not line.endswith(("}", "]")):  # cheaper than to try
        return None
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _line_records(file: IO[str], reading: Reading) -> Iterator[Any]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            reading.rows += 1
            reading.fault(f"line {number}", line, f"not valid JSON ({shortened(str(error))})")
