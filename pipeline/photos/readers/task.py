"""What a reader is asked to do and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from pipeline.photos.photo_file import ReadPhoto
from pipeline.photos.sources.places import Place


class Wanted(NamedTuple):
    """A photo to load."""

    row: int
    place: int  # in its batch
    path: Place
    # Whether its pixels are wanted, and whether the bytes of its file are, where a GPU can decode
    # them. One of them is always true. A file that no GPU can decode is decoded in any case.
    pixels: bool
    file: bool


class FileInMemory(NamedTuple):
    """A JPEG that a GPU can decode, in the memory of its batch."""

    address: int  # in this process
    length: int  # bytes
    height: int  # pixels
    width: int


class Loaded(NamedTuple):
    """What a task has loaded. The pixels and the files are in its buffer."""

    digests: bytes  # 16 of each photo, in the task's order; zeros if its file could not be read
    errors: dict[int, str]  # row → why there are neither pixels nor a file
    missing: list[int]  # rows without a file
    decoded: list[int]  # rows whose pixels are in the buffer
    files: dict[int, FileInMemory]


def note(loaded: Loaded, row: int, read: ReadPhoto) -> None:
    """Add a photo that was decoded, or the reason why it could not be."""
    if read.pixels is not None:
        loaded.decoded.append(row)
    else:
        loaded.errors[row] = read.error
    if read.missing:
        loaded.missing.append(row)


@dataclass(frozen=True)
class Buffer:
    """Memory for the photos of one batch. It circulates between the readers and the encoder.

    pixels: (R, V, 3, S, S) uint8, channels last in memory.
    """

    number: int
    pixels: Tensor


@dataclass(frozen=True)
class Task:
    """Photos of one batch that one reader loads."""

    buffer: Buffer
    wanted: list[Wanted]
    finished: Callable[[Loaded | BaseException], None] = field(repr=False, compare=False)


class Readers(Protocol):
    """Load photos into buffers, several at once. `Task.finished` is called in any thread."""

    def start(self) -> None: ...

    def new_buffer(self) -> Buffer: ...

    def submit(self, task: Task) -> None: ...

    def photos_heard(self) -> int:
        """How many photos have been loaded so far; a few may go uncounted."""
        ...

    def close(self) -> None:
        """End the readers, also those that hang in a dead drive. The buffers stay valid."""
        ...
