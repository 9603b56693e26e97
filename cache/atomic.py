"""Writing files so that they are either complete or not there."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from cache.errors import CapError


class WriteError(CapError):
    """Raised when a file cannot be written: a full disk, or a folder that is missing or read-only.

    The message is one line that begins with the file.
    """


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with the path of a temporary file, sync that file, and rename it to `path`.

    The file gets the mode of any new file (0o666 less the umask), whatever mode `write` gives it.
    Raises WriteError if `write` or the system raises OSError; `path` is then unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        # Asking for the umask would mean setting it, for all threads. A new file shows it. A file
        # that a killed process left there may have another mode.
        temporary.unlink(missing_ok=True)
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        write(temporary)
        if stat.S_IMODE(temporary.stat().st_mode) != mode:  # safetensors makes files of mode 600
            temporary.chmod(mode)
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
