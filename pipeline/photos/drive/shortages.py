"""Shortages of the machine, which are no fault of the photo that was read just then.

They stop a run. If the photo were set aside instead, it would stay aside for good.
"""

from __future__ import annotations

import errno
from pathlib import Path

from cache.errors import CapError

_AGAIN = "then run the same command again"
_DRIVE = f"see whether the drive is well, {_AGAIN}; if it is always this file, replace the file"
_NETWORK = f"see whether the drive is connected, {_AGAIN}"
_MEMORY = f"end other programs or use a machine with more memory, {_AGAIN}"
_REMEDIES = {
    errno.EMFILE: f"allow more open files with `ulimit -n 65536`, {_AGAIN}",
    errno.ENFILE: f"end other programs, {_AGAIN}",
    errno.ENOMEM: _MEMORY,
    errno.ENOBUFS: _MEMORY,
    errno.EIO: _DRIVE,
    errno.EREMOTEIO: _DRIVE,
    errno.ENODEV: _NETWORK,
    errno.ENOMEDIUM: _NETWORK,
    errno.ENOTCONN: _NETWORK,  # also of a FUSE file system whose process has ended
    errno.ESHUTDOWN: _NETWORK,
    errno.ESTALE: _NETWORK,
    errno.ETIMEDOUT: _NETWORK,
    errno.EHOSTDOWN: _NETWORK,
    errno.EHOSTUNREACH: _NETWORK,
    errno.ENETDOWN: _NETWORK,
    errno.ENETUNREACH: _NETWORK,
    errno.ECONNREFUSED: _NETWORK,
    errno.ECONNRESET: _NETWORK,
    errno.ECONNABORTED: _NETWORK,
}


class ShortageError(CapError):
    """Raised when files, memory or the drive fall short while a photo is read. One line."""


def is_shortage(error: BaseException) -> bool:
    """Whether an error is one of the machine, not of the file.

    Libraries report a lack of memory in words as well: Pillow's decoders as an OSError without a
    number, torch and libheif as a RuntimeError. libheif uses the same words for a file that
    demands more than a limit of its own.
    """
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _REMEDIES
    text = str(error).lower()
    words = ("out of memory", "allocate memory", "not enough memory", "memory allocation error")
    return any(word in text for word in words) and "limit" not in text


def check_shortage(path: Path | str, error: BaseException) -> None:
    """Raise ShortageError if `is_shortage`; path: what was being read."""
    if not is_shortage(error):
        return
    number = error.errno if isinstance(error, OSError) else None
    reason = error.strerror if isinstance(error, OSError) and number else "out of memory"
    raise ShortageError(
        f"{path}: cannot read ({reason}), which is not the photo's fault; "
        f"{_REMEDIES.get(number or errno.ENOMEM, _MEMORY)}"
    ) from None
