"""Photos in Parquet files: which column holds them, how they are named, and their bytes.

Read is one row group of one column at a time, and the last few are kept: neighbouring photos are
rows of the same one.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.photos.sources.errors import SourceError
from pipeline.photos.sources.places import Cell, is_address, without_secrets
from pipeline.photos.sources.ranges import RemoteFile

_KEPT_BYTES = 64 << 20  # of row groups that are kept; two of any size
_KEPT_GROUPS = 2
_LARGEST_GROUP_BYTES = 4 << 30  # the writer should have made smaller ones
_LOOKED_AT = 8  # values of a column that may hold photos
# The usual names of columns that hold photos, and of those that name them; the surest first.
_PHOTO_COLUMNS = ("image", "img", "photo", "picture", "jpg", "jpeg", "png", "webp", "image_bytes")
_NAME_COLUMNS = (
    *("file_name", "filename", "image_path", "path", "image_name", "__key__", "key"),
    *("image_id", "id"),
)


@dataclass
class ParquetIndex:
    """The photos of one Parquet file, in the order of its rows."""

    container: str
    column: str  # of their bytes: `image`, or `image.bytes` within a struct
    first_rows: NDArray[np.int64]  # of each row group, and the number of all rows
    names: list[str] | None  # None: rows are named by number
    # What else it holds: the names of columns of texts, and of lists of texts.
    text_columns: list[str]
    has_split: bool = False  # a column `split` of texts
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def name(self, row: int) -> str:
        return f"{row:08d}" if self.names is None else self.names[row]

    def place(self, row: int) -> Cell:
        group = int(np.searchsorted(self.first_rows, row, "right")) - 1
        within = row - int(self.first_rows[group])
        return Cell(self.container, self.name(row), self.column, group, within)

    def texts(self, column: str, rows: int | None = None) -> list[list[str]]:
        """The texts in each row of a column, or of the first rows. Raises SourceError."""
        with opened(self.container) as file:
            if rows is None:
                values = _column(file, column).to_pylist()
            else:
                batches = file.iter_batches(batch_size=rows, columns=[column])
                first = next(batches, None)
                values = [] if first is None else first.column(0).to_pylist()
        lists = (value if isinstance(value, list) else [value] for value in values)
        return [[text for text in texts if isinstance(text, str)] for texts in lists]


class opened:
    """A Parquet file, as a context manager. Raises SourceError if it is none, or is damaged."""

    def __init__(self, container: str) -> None:
        self._container = container

    def __enter__(self) -> Any:
        shown = without_secrets(self._container)
        try:
            import pyarrow as arrow
            import pyarrow.parquet as parquet
        except ImportError:
            raise SourceError(
                f"{shown}: Parquet files need pyarrow; `pip install 'cap[parquet]'` brings it"
            ) from None
        source: Any = self._container
        try:
            if is_address(self._container):
                source = arrow.PythonFile(RemoteFile(self._container), mode="r")
            self._file = parquet.ParquetFile(source)
        except (arrow.ArrowException, OSError) as error:
            raise _unreadable(shown, error) from None
        return self._file

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        import pyarrow as arrow

        self._file.close()
        if isinstance(error, (arrow.ArrowException, OSError)):
            raise _unreadable(without_secrets(self._container), error) from None


def _unreadable(shown: str, error: BaseException) -> SourceError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)[:160]
    return SourceError(f"{shown}: not a Parquet file that can be read ({without_secrets(reason)})")


def index_parquet(container: str, image_column: str | None = None) -> ParquetIndex:
    """Find the photos of a Parquet file. image_column: its choice, if it cannot be found out.

    Raises SourceError if no column holds photos.
    """
    shown = without_secrets(container)
    with opened(container) as file:
        column, path_column = _photo_column(shown, file, image_column)
        metadata = file.metadata
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        leaves = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
        _check_groups(shown, metadata, leaves, column)
        names, note = _names(file, path_column)
        texts = [
            field.name
            for field in file.schema_arrow
            if _is_text(field.type) and field.name != path_column
        ]
    index = ParquetIndex(
        container,
        column,
        np.cumsum([0, *counts], dtype=np.int64),
        names,
        [name for name in texts if name != "split"],
        has_split="split" in texts,
    )
    if note is not None:
        index.notes.append(f"{shown}: {note}")
    return index


def _check_groups(shown: str, metadata: Any, leaves: Sequence[str], column: str) -> None:
    number = leaves.index(column)
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).column(number).total_uncompressed_size
        if size > _LARGEST_GROUP_BYTES:
            raise SourceError(
                f"{shown}: a row group holds {size / 1e9:.1f} GB of photos, which would all be in "
                "memory at once; write it with smaller row groups (`row_group_size=100`)"
            )


def _photo_column(shown: str, file: Any, wanted: str | None) -> tuple[str, str | None]:
    """(the column of the photos' bytes, one of their paths if there is one beside it)."""
    schema = file.schema_arrow
    names = [field.name for field in schema]
    if wanted is not None and wanted not in names:
        raise SourceError(
            f"{shown}: --image-column {wanted}: no such column; there are {', '.join(names)}"
        )
    holding = []
    for each in schema:
        if wanted in (None, each.name) and (column := bytes_column(each)) is not None:
            picture = _holds_pictures(file, column)
            if picture or (wanted is not None and picture is None):
                holding.append(each)
    if not holding:
        raise SourceError(
            f"{shown}: {f'column {wanted}' if wanted else 'no column'} holds pictures; columns: "
            + ", ".join(f"{field.name} ({field.type})" for field in schema)
        )
    ranks = {name: rank for rank, name in enumerate(_PHOTO_COLUMNS)}
    holding.sort(key=lambda field: ranks.get(field.name.lower(), len(ranks)))
    if len(holding) > 1 and holding[0].name.lower() not in ranks:
        both = " and ".join(field.name for field in holding[:2])
        raise SourceError(f"{shown}: columns {both} both hold pictures; say --image-column")
    chosen = holding[0]
    column = bytes_column(chosen)
    assert column is not None
    paths = None
    if "." in column and any(inner.name == "path" for inner in chosen.type):
        paths = f"{chosen.name}.path"
    else:
        paths = next((name for name in _NAME_COLUMNS if name in names), None)
    return column, paths


def bytes_column(field: Any) -> str | None:
    """The column of bytes in a column: itself, or `bytes` of a struct, as Hugging Face has it."""
    if _is_binary(field.type):
        return str(field.name)
    import pyarrow.types as types

    if types.is_struct(field.type) and any(
        inner.name == "bytes" and _is_binary(inner.type) for inner in field.type
    ):
        return f"{field.name}.bytes"
    return None


def _is_binary(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _holds_pictures(file: Any, column: str) -> bool | None:
    """Whether the first values of a column are pictures; None if they are all empty."""
    batch = next(file.iter_batches(batch_size=_LOOKED_AT, columns=[column]), None)
    if batch is None:
        return None
    values = [value for value in _leaf(batch.column(0)).to_pylist() if value]
    return any(map(_is_picture, values)) if values else None


def _is_picture(start: bytes) -> bool:
    heads = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\x00", b"MM\x00*", b"BM", b"qoif")
    return (
        start.startswith(heads)
        or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
        or start[4:8] in (b"ftyp", b"jP  ")
    )


def _names(file: Any, column: str | None) -> tuple[list[str] | None, str | None]:
    """(the names that a column gives the photos, None if it cannot; why it cannot)."""
    if column is None:
        return None, None
    values = _column(file, column).to_pylist()
    if not values or any(value in (None, "") for value in values):
        return None, None
    names = []
    for value in values:
        parts = [part for part in str(value).replace("\\", "/").split("/") if part not in ("", ".")]
        if not isinstance(value, (str, int)) or not parts or ".." in parts or "\0" in str(value):
            return None, None
        names.append("/".join(parts))
    if len(set(names)) < len(names):
        return None, f"several rows have one name in {column}, so rows are named by number"
    return names, None


def _column(file: Any, column: str) -> Any:
    return _leaf(file.read(columns=[column]).column(0))


def _leaf(values: Any) -> Any:
    """The values of a column, or those of the only field of its structs."""
    import pyarrow as arrow
    import pyarrow.compute as compute

    if arrow.types.is_struct(values.type):
        return compute.struct_field(values, [0])
    return values


class RowGroups:
    """The row groups that were read last, for all threads of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[str, str, int], _Group] = OrderedDict()

    def value(self, cell: Cell) -> bytes | None:
        """The bytes of a photo; None if the row has none. Raises SourceError."""
        key = cell.container, cell.column, cell.group
        with self._lock:
            group = self._groups.setdefault(key, _Group())
            self._groups.move_to_end(key)
        with group.lock:  # one thread reads it, and others wait
            if group.values is None:
                with opened(cell.container) as file:
                    table = file.read_row_group(cell.group, columns=[cell.column])
                    group.values = _leaf(table.column(0))
                    group.size_bytes = group.values.nbytes
                self._forget()
            if cell.row >= len(group.values):
                raise SourceError(
                    f"{without_secrets(cell.container)}: has other rows than when the run began"
                )
            value = group.values[cell.row]
            return bytes(value.as_buffer()) if value.is_valid else None

    def forget(self, container: str) -> None:
        """Read a file anew when it is wanted next: it may be another one by now."""
        with self._lock:
            for key in [key for key in self._groups if key[0] == container]:
                del self._groups[key]

    def _forget(self) -> None:
        with self._lock:
            kept = sum(group.size_bytes for group in self._groups.values())
            while len(self._groups) > _KEPT_GROUPS and kept > _KEPT_BYTES:
                _, oldest = self._groups.popitem(last=False)
                kept -= oldest.size_bytes


class _Group:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values: Any = None
        self.size_bytes = 0
