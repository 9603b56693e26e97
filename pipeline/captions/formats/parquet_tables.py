"""Captions in a Parquet table: its rows are records, as those of JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.captions.formats.json_records import Found, read_records
from pipeline.captions.photo_index import PhotoIndex
from pipeline.captions.records import Choice, Reading
from pipeline.photos.sources.parquets import bytes_column, opened

MAGIC = b"PAR1"
_ROWS = 1000  # read at once


def is_parquet(path: Path) -> bool:
    """Whether a file is one of Parquet, by its first bytes; no if it cannot be read."""
    try:
        if not path.is_file():  # reading from a pipe would take what is in it
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_parquet(path: Path, index: PhotoIndex | None, choice: Choice) -> Reading:
    """Read a table whose rows name photos and hold captions; columns of bytes, in which photos may
    be, are not read.

    Raises DatasetError as `read_records` does, and SourceError if the file cannot be read.
    """
    reading = Reading(str(path), "Parquet")
    return read_records(reading, [Found("", None, _rows(path))], index, choice)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with opened(str(path)) as file:
        columns = [each.name for each in file.schema_arrow if bytes_column(each) is None]
        for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
            yield from batch.to_pylist()
