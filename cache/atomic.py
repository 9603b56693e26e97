"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from cache.errors import CapError


class WriteError(CapError):
    """A full disk, or a folder that is not there or not to be written to. One line, file first."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a temporary file, sync it and rename it to `path`.

    Raises WriteError where `write` or the system raises OSError; `path` is then what it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise WriteError(f"{path}: cannot write ({error.strerror or error})") from None
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically. Raises WriteError."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
