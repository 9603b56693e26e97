"""Resizes many photos of different sizes on a GPU in two launches: every view of
`pipeline.photos.views`, with the pixels of `pipeline.photos.preprocessing`.

    photo → the columns of each crop, for all rows it needs → its rows, in the network's input

Everything that depends on a photo's size alone is computed once for each size and kept: the tables
of its axes in the GPU's memory, the jobs of the kernels with addresses relative to the photo. A
batch takes its rows of these arrays and adds addresses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.photos.gpu.resize_tables import resize_table
from pipeline.photos.preprocessing import BILINEAR, corner, is_thin, size_for_crops
from train.step.cuda.launch import Function, architecture, compile_source, load_functions

SOURCE = Path(__file__).with_name("resize.cu")
KERNELS = ("horizontal", "vertical")

# The structures of resize.cu. Addresses are signed, because differences are stored in them too.
_HORIZONTAL = np.dtype(
    [(name, "i8") for name in ("photo", "columns", "first", "weights")]
    + [(name, "i4") for name in ("pitch", "rows", "taps", "precision")]
)
_VERTICAL = np.dtype(
    [(name, "i8") for name in ("columns", "view", "mirrored", "first", "weights")]
    + [(name, "i4") for name in ("taps", "precision")]
)
_TILE = 32  # columns, and rows, that a block of `horizontal` computes; columns of words otherwise
_BLOCK_ROWS = 8  # that a block of `vertical` computes
MOST_PHOTOS = 1024  # in a launch, whose grid has at most 65,535 jobs

# Bytes of photos begin at multiples of this, their rows at multiples of four. The last of a batch
# is followed by as many, because `horizontal` reads a few bytes behind a row.
ALIGNMENT = 256

_MIRRORED = {"flip": "full", "center-flip": "center"}


class Launched(Protocol):
    """A kernel that can be started: `train.step.cuda.launch.Function`."""

    def for_each_block(
        self, blocks: tuple[int, int, int], *arguments: Tensor | int | float
    ) -> None: ...


class Layout(NamedTuple):
    """How photos lie in memory. Each is (N,) int64; `kinds` is -1 for those that only the CPU
    resizes.
    """

    kinds: NDArray[np.int64]
    pitches: NDArray[np.int64]
    photo_bytes: NDArray[np.int64]
    column_bytes: NDArray[np.int64]


def can_resize(height: int, width: int, views: Iterable[str]) -> bool:
    """Whether `BatchResize` gives the pixels of `preprocess` for a photo of this size.

    Thin photos take other ways there, which save memory.
    """
    if not is_thin(height, width):
        return True
    return width > height and all(view in ("full", "flip") for view in views)


def compile_resize(device: torch.device) -> dict[str, Function]:
    """The kernels of `resize.cu` for one GPU. Raises KernelError."""
    source = SOURCE.read_text(encoding="utf-8")
    code = compile_source(source, architecture(device), name=SOURCE.name)
    return load_functions(code, KERNELS, device)


class BatchResize:
    """Resizes batches to the views of one size. On a GPU all work is queued on the current stream,
    which has to be the same one each time.
    """

    def __init__(
        self,
        device: torch.device,
        size: int,
        views: tuple[str, ...],
        kernels: Mapping[str, Launched],
        filter: str = BILINEAR,
        table_bytes: int = 64 << 20,
    ) -> None:
        """table_bytes: of the device's memory for tables. Sizes are forgotten when it is full."""
        self.device, self.size, self.views, self._filter = device, size, views, filter
        self._horizontal_kernel, self._vertical_kernel = (kernels[name] for name in KERNELS)
        self._stride = _multiple(size * 3, 4)
        # A crop and its mirror image are computed once, and crops of the same columns share these.
        self._crops = list(dict.fromkeys(_MIRRORED.get(view, view) for view in views))
        self._sides = list(dict.fromkeys(_side(crop) for crop in self._crops))
        self._views = [self._offset(crop) for crop in self._crops]
        mirrors = {crop: view for view, crop in _MIRRORED.items()}
        self._mirrors = [self._offset(mirrors.get(crop, "")) for crop in self._crops]
        self._tables = torch.empty(0, dtype=torch.uint8, device=device)
        self._table_bytes = table_bytes
        self._forget()

    @property
    def column_sets(self) -> int:
        """How many results of the first kernel each photo has."""
        return len(self._sides)

    def layout(self, heights: NDArray[np.int64], widths: NDArray[np.int64]) -> Layout:
        """How photos of these sizes, (N,) each, have to lie in memory.

        The kinds are valid until the next call.
        """
        keys = (heights << 32 | widths).tolist()
        places = self._places
        new = [key for key in dict.fromkeys(keys) if key not in places]
        if new and not self._add(new):
            self._forget()
            self._add(list(dict.fromkeys(keys)))
            places = self._places
        kinds = np.fromiter((places[key] for key in keys), np.int64, len(keys))
        return Layout(
            kinds, self._pitches[kinds], self._photo_bytes[kinds], self._column_bytes[kinds]
        )

    def resize(
        self, layout: Layout, photos: NDArray[np.int64], out: NDArray[np.int64], columns: Tensor
    ) -> None:
        """Queue the kernels. photos, out: (N,) addresses on the device, of RGB pixels as `layout`
        wants them, and of (V, size, size, 3) uint8. columns: uint8 memory of at least
        `layout.column_bytes` in all, for the time between the kernels.
        """
        kinds = layout.kinds
        starts = columns.data_ptr() + np.cumsum(layout.column_bytes) - layout.column_bytes
        horizontal, vertical = self._horizontal[kinds], self._vertical[kinds]
        horizontal["photo"] += photos[:, None]
        horizontal["columns"] += starts[:, None]
        vertical["columns"] += starts[:, None]
        for field, offsets in (("view", self._views), ("mirrored", self._mirrors)):
            for crop, offset in enumerate(offsets):
                vertical[field][:, crop] = 0 if offset is None else out + offset
        jobs = np.concatenate([horizontal.reshape(-1).view("u1"), vertical.reshape(-1).view("u1")])
        given = self._copied(jobs)
        rows = int(horizontal["rows"].max())
        self._horizontal_kernel.for_each_block(
            (-(-self.size // _TILE), -(-rows // _TILE), horizontal.size),
            given, self.size, self._stride,
        )  # fmt: skip
        self._vertical_kernel.for_each_block(
            (-(-self._stride // 4 // _TILE), -(-self.size // _BLOCK_ROWS), vertical.size),
            given[horizontal.nbytes :], self.size, self._stride,
        )  # fmt: skip

    def _copied(self, values: NDArray[np.uint8]) -> Tensor:
        """The bytes on the device. From memory that is not pinned, the driver would copy only after
        it has waited for the whole stream.
        """
        tensor = torch.from_numpy(values)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _offset(self, view: str) -> int | None:
        """Where a view begins in a photo's part of the output."""
        return self.views.index(view) * self.size**2 * 3 if view in self.views else None

    def _forget(self) -> None:
        self._places: dict[int, int] = {}  # of photo sizes in the arrays below
        self._found: dict[tuple[int, int, int], _PlacedTable] = {}
        self._used = 0  # bytes of the tables
        self._horizontal = np.zeros((0, len(self._sides)), _HORIZONTAL)
        self._vertical = np.zeros((0, len(self._crops)), _VERTICAL)
        self._pitches, self._photo_bytes, self._column_bytes = np.zeros((3, 0), np.int64)

    def _add(self, keys: list[int]) -> bool:
        """Compute what these sizes need. False if the tables have no room left beside others."""
        new = _NewTables(self._found, self._used, self.size, self._filter)
        axes = {}
        for key in keys:
            height, width = key >> 32, key & 0xFFFFFFFF
            if can_resize(height, width, self.views):
                axes[key] = [self._axes(crop, height, width, new) for crop in self._crops]
        if new.end > len(self._tables):
            if self._places:
                return False
            room = max(self._table_bytes, new.end)
            self._tables = torch.empty(room, dtype=torch.uint8, device=self.device)
        if new.parts:
            # In the order of the stream, so that no kernel still reads what this overwrites.
            self._tables[self._used : new.end] = self._copied(np.concatenate(new.parts))
        self._used = new.end
        count = len(keys)
        horizontal = np.zeros((count, len(self._sides)), _HORIZONTAL)
        vertical = np.zeros((count, len(self._crops)), _VERTICAL)
        sizes = np.zeros((3, count), np.int64)
        for place, key in enumerate(keys):
            self._places[key] = -1
            if key in axes:
                self._places[key] = len(self._horizontal) + place
                sizes[:, place] = self._fill(
                    horizontal[place], vertical[place], axes[key], key >> 32, key & 0xFFFFFFFF
                )
        self._horizontal = np.concatenate([self._horizontal, horizontal])
        self._vertical = np.concatenate([self._vertical, vertical])
        self._pitches = np.concatenate([self._pitches, sizes[0]])
        self._photo_bytes = np.concatenate([self._photo_bytes, sizes[1]])
        self._column_bytes = np.concatenate([self._column_bytes, sizes[2]])
        return True

    def _axes(
        self, crop: str, height: int, width: int, tables: _NewTables
    ) -> tuple[_PlacedTable, _PlacedTable]:
        """The tables of a crop's rows and of its columns."""
        scaled, start = (self.size, self.size), (0, 0)
        if crop != "full":
            scaled = size_for_crops(height, width, self.size)
            start = corner(crop, *scaled, self.size)
        return (
            tables.find(height, scaled[0], start[0]),
            tables.find(width, scaled[1], start[1]),
        )

    def _fill(
        self,
        horizontal: NDArray[np.void],
        vertical: NDArray[np.void],
        axes: list[tuple[_PlacedTable, _PlacedTable]],
        height: int,
        width: int,
    ) -> tuple[int, int, int]:
        """Fill the jobs of a size, (sides,) and (crops,). Returns its place in `Layout`."""
        base, pitch, used = self._tables.data_ptr(), _multiple(width * 3, 4), 0
        for job, side in enumerate(self._sides):
            mine = [n for n, crop in enumerate(self._crops) if _side(crop) == side]
            begin = min(axes[n][0].begin for n in mine)
            rows = max(axes[n][0].end for n in mine) - begin
            table = axes[mine[0]][1]
            horizontal[job] = (
                begin * pitch, used, base + table.first, base + table.weights,
                pitch, rows, table.taps, table.precision,
            )  # fmt: skip
            for n in mine:
                table = axes[n][0]
                vertical[n] = (
                    used - begin * self._stride, 0, 0, base + table.first, base + table.weights,
                    table.taps, table.precision,
                )  # fmt: skip
            used += _multiple(rows * self._stride, 16)
        return pitch, _multiple(height * pitch, ALIGNMENT), used


class _PlacedTable(NamedTuple):
    """A window of a table, with offsets of its parts in bytes. begin, end: what it reads."""

    first: int
    weights: int
    taps: int
    precision: int
    begin: int
    end: int


class _NewTables:
    """Tables that are known, and those that have to be copied behind them."""

    def __init__(
        self, known: dict[tuple[int, int, int], _PlacedTable], end: int, size: int, filter: str
    ) -> None:
        self.parts: list[NDArray[np.uint8]] = []
        self.end = end
        self._known, self._size, self._filter = known, size, filter

    def find(self, length: int, out_length: int, start: int) -> _PlacedTable:
        """`size` places of an axis of `length` pixels that becomes `out_length`."""
        key = length, out_length, start
        if key not in self._known:
            table = resize_table(length, out_length, self._filter)
            window = slice(start, start + self._size)
            first, weights = table.first[window], table.weights[window]
            taps = weights.shape[1]
            weights = np.pad(weights, ((0, 0), (0, -taps % 4)))
            at = self.end
            self._append(first)
            weights_at = self.end
            self._append(weights)
            self._known[key] = _PlacedTable(
                at, weights_at, taps, table.precision, int(first[0]), int(first[-1]) + taps
            )
        return self._known[key]

    def _append(self, values: NDArray[np.int32] | NDArray[np.int16]) -> None:
        part = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        part = np.pad(part, (0, -len(part) % 16))
        self.parts.append(part)
        self.end += len(part)


def _side(crop: str) -> str:
    """Crops of the same side have the same columns."""
    return crop.rsplit("-", 1)[-1]


def _multiple(value: int, of: int) -> int:
    return -(-value // of) * of
