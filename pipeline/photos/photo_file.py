"""Reading one photo file. Whatever is wrong with the file becomes a reason, not an exception."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cache.store import DIGEST_BYTES
from pipeline.photos.decoding import ImageError
from pipeline.photos.preprocessing import preprocess

# A larger file is not a photo, and reading it would only take memory.
MAX_FILE_BYTES = 1 << 29


@dataclass(frozen=True)
class ReadPhoto:
    """One photo after reading and decoding. `error` says why there are no pixels."""

    pixels: Tensor | None  # (V, 3, S, S) uint8, channels last in memory
    digest: NDArray[np.uint8]  # (16,), zeros if the file could not be read
    error: str = ""


def read_photo(
    path: Path, size: int, views: tuple[str, ...], out: Tensor | None = None
) -> ReadPhoto:
    """Read, digest and decode one file. An error with the file is returned, not raised.

    out: where the pixels go; see `preprocess`. Its content is undefined if there is an error.
    """
    digest = np.zeros(DIGEST_BYTES, np.uint8)
    try:
        data = read_file(path)
        digest = file_digest(data)
        return ReadPhoto(preprocess(data, size, views, out), digest)
    except ImageError as error:
        return ReadPhoto(None, digest, str(error))
    except IsADirectoryError:
        return ReadPhoto(None, digest, "not a regular file")
    except FileNotFoundError:
        return ReadPhoto(None, digest, "file not found")
    except OSError as error:
        return ReadPhoto(None, digest, f"cannot read ({error.strerror or error})")
    except MemoryError:
        return ReadPhoto(None, digest, "too large for the memory")


def read_file(path: Path) -> bytes:
    """The bytes of a file. Raises OSError, or ImageError if it is no regular file or too large."""
    # O_NONBLOCK, because opening a named pipe would otherwise wait until somebody writes into it.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise ImageError(f"too large ({status.st_size / 1e6:.0f} MB)")
        return file.read()


def file_digest(data: bytes) -> NDArray[np.uint8]:
    """BLAKE2b-128 of a file's bytes, (16,) uint8. It tells which file a row was made from."""
    return np.frombuffer(hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest(), np.uint8)
