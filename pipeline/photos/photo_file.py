"""Reading one photo. Whatever is wrong with its file becomes a reason, not an exception.

What is wrong with the machine is an exception (see `shortages`), and so is what is wrong with the
tar or the store that the photo lies in (SourceError).
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cache.store import DIGEST_BYTES
from pipeline.photos.decoding import ImageError
from pipeline.photos.drive.shortages import check_shortage
from pipeline.photos.memory_budget import Reservation, file_budget, pixel_budget
from pipeline.photos.preprocessing import BILINEAR, preprocess
from pipeline.photos.sources.ahead import Fetched
from pipeline.photos.sources.places import Cell, Place, shown
from pipeline.photos.sources.reading import bytes_of

# A larger file is not a photo, and reading it would only take memory.
MAX_FILE_BYTES = 1 << 29


@dataclass(frozen=True)
class ReadPhoto:
    """One photo after reading and decoding. `error` says why there are no pixels."""

    pixels: Tensor | None  # (V, 3, S, S) uint8, channels last in memory
    digest: NDArray[np.uint8]  # (16,), zeros if the file could not be read
    error: str = ""
    missing: bool = False  # there is no such file


def read_photo(
    path: Place,
    size: int,
    views: tuple[str, ...],
    out: Tensor | None = None,
    filter: str = BILINEAR,
    fetched: Fetched | None = None,
) -> ReadPhoto:
    """Read, digest and decode one photo. An error with its file is returned, not raised.

    out, filter: where the pixels go, and how; see `preprocess`. The content of `out` is undefined
    if there is an error. fetched: remote photos that were asked for before. Waits while other
    readers decode so much that the memory for this photo is not to be had. Raises ShortageError if
    files, memory or the drive fall short, and SourceError if what the photo lies in cannot be read.
    """
    try:
        with file_budget().reservation() as of_file:
            return photo_of(path, read_file(path, of_file, fetched), size, views, out, filter)
    except Exception as error:
        return reading_fails(path, error)


def photo_of(
    path: Place,
    data: bytes,
    size: int,
    views: tuple[str, ...],
    out: Tensor | None = None,
    filter: str = BILINEAR,
) -> ReadPhoto:
    """`read_photo` of a file whose bytes are known."""
    digest = file_digest(data)
    try:
        with pixel_budget().reservation() as of_pixels:
            return ReadPhoto(preprocess(data, size, views, out, of_pixels, filter), digest)
    except Exception as error:
        return reading_fails(path, error, digest)


def reading_fails(
    path: Place, error: Exception, digest: NDArray[np.uint8] | None = None
) -> ReadPhoto:
    """The photo of a file that cannot be read or decoded, with the reason.

    Raises ShortageError, and the error itself if it is neither the file's nor the machine's fault,
    as a SourceError.
    """
    if digest is None:
        digest = np.zeros(DIGEST_BYTES, np.uint8)
    if isinstance(error, ImageError):
        return ReadPhoto(None, digest, str(error))
    if isinstance(error, IsADirectoryError):
        return ReadPhoto(None, digest, "not a regular file")
    if isinstance(error, FileNotFoundError):
        return ReadPhoto(None, digest, "file not found", missing=True)
    if isinstance(error, (OSError, MemoryError, RuntimeError)):
        check_shortage(shown(path), error)
    if not isinstance(error, OSError):
        raise error
    return ReadPhoto(None, digest, f"cannot read ({error.strerror or error})")


def read_file(
    path: Place, reservation: Reservation | None = None, fetched: Fetched | None = None
) -> bytes:
    """The bytes of a photo. Raises OSError, or ImageError if it is no regular file or too large;
    SourceError if what it lies in cannot be read.

    reservation: of the memory for them; it is made once their number is known. fetched: remote
    photos that were asked for before.
    """
    if not isinstance(path, (str, Path)):
        size = 0 if isinstance(path, Cell) else path.size
        if size > MAX_FILE_BYTES:
            raise ImageError(f"too large ({size / 1e6:.0f} MB)")
        if reservation is not None and size > 0:
            reservation.change(size)
        data = bytes_of(path, fetched)
        if data is None:
            raise ImageError("no picture in this row")
        return data
    with open_file(path) as file:
        if reservation is not None:
            reservation.change(os.fstat(file.fileno()).st_size)
        return file.read()


def open_file(path: str | Path) -> FileIO:
    """A file. Raises OSError, or ImageError if it is no regular file or too large."""
    # O_NONBLOCK, because opening a named pipe would otherwise wait until somebody writes into it.
    file = FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    try:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise ImageError(f"too large ({status.st_size / 1e6:.0f} MB)")
    except BaseException:
        file.close()
        raise
    return file


def fill_from_file(file: FileIO, memory: memoryview) -> int | None:
    """Read a whole file into `memory`: how many bytes it has; None if there is no room for it and
    one more. Raises OSError.
    """
    filled = 0
    while filled < len(memory):
        count = file.readinto(memory[filled:])
        if not count:
            return filled
        filled += count
    return None


def file_digest(data: bytes | memoryview) -> NDArray[np.uint8]:
    """BLAKE2b-128 of a file's bytes, (16,) uint8. It tells which file a row was made from."""
    return np.frombuffer(hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest(), np.uint8)
