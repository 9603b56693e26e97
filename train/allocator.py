"""Keeps freed memory in the process, for work that needs large blocks again and again.

glibc returns every freed block above 32 MB to the system, which clears and maps the next one page
by page. A network whose layers return, or work on, blocks of that size may spend more time on this
than on its matrix products.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator

# Parameters of mallopt(3) and their defaults.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 128 << 10, 65536
_NEVER_TRIM = 2**31 - 1  # bytes of free memory at the heap's end: the largest int
_SMALL_BYTES = 32 << 20  # the largest M_MMAP_THRESHOLD


def keep_freed_memory(keep: bool = True) -> bool:
    """Let this process keep the memory it frees, or return it to the system as usual.

    Only the main thread's blocks are kept. The peak memory stays about the same. Returns whether
    the setting took effect; without glibc it does not.
    """
    mallopt = _mallopt()
    if mallopt is None:
        return False
    mmap_max, trim = (0, _NEVER_TRIM) if keep else (_DEFAULT_MMAP_MAX, _DEFAULT_TRIM_THRESHOLD)
    done = bool(mallopt(_M_MMAP_MAX, mmap_max)) and bool(mallopt(_M_TRIM_THRESHOLD, trim))
    if not keep:
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))  # returns what has been kept so far
    return done


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Python's collector of cycles rests, for work that makes millions of objects and no cycles.

    Otherwise it looks through all of them again and again: a tenth to a quarter of the time in
    which COCO's captions are read.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def keep_small_blocks() -> bool:
    """Let this process keep freed blocks of up to 32 MB, as those of a photo, for the next one.

    Larger ones go back to the system, so that one huge photo does not make it large for ever.
    Returns whether the setting took effect, as `keep_freed_memory` does.
    """
    mallopt = _mallopt()
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _SMALL_BYTES)) and bool(
        mallopt(_M_TRIM_THRESHOLD, 2 * _SMALL_BYTES)
    )


def _mallopt() -> Callable[[int, int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return None
