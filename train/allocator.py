"""Keeps freed memory in the process, for work that needs large blocks again and again.

glibc returns every freed block above 32 MB to the system, which clears and maps the next one page
by page. A network whose layers return, or work on, blocks of that size may spend more time on this
than on its matrix products.
"""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt(3) and their defaults.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 128 << 10, 65536
_NEVER_TRIM = 2**31 - 1  # bytes of free memory at the heap's end: the largest int


def keep_freed_memory(keep: bool = True) -> bool:
    """Let this process keep the memory it frees, or return it to the system as usual.

    Only the main thread's blocks are kept. The peak memory stays about the same. Returns whether
    the setting took effect; without glibc it does not.
    """
    if sys.platform != "linux":
        return False
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):  # musl has no mallopt
        return False
    mmap_max, trim = (0, _NEVER_TRIM) if keep else (_DEFAULT_MMAP_MAX, _DEFAULT_TRIM_THRESHOLD)
    done = bool(mallopt(_M_MMAP_MAX, mmap_max)) and bool(mallopt(_M_TRIM_THRESHOLD, trim))
    if not keep:
        malloc_trim(ctypes.c_size_t(0))  # returns what has been kept so far
    return done
