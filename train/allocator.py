"""Large memory that is freed and needed again at once stays with the process.

glibc gives every block above 32 MB back to the system when it is freed, and the next one is cleared
and mapped anew, page by page, with the processor's time. A network whose layers' results are that
large, or whose intermediate results are, may spend more time there than in its products.
"""

from __future__ import annotations

import ctypes
import sys

# Of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 128 << 10, 65536
_NEVER = 2**31 - 1  # bytes at the heap's end, the most that fits an int


def keep_freed_memory(keep: bool = True) -> bool:
    """Have this process keep what it frees, or give it back as usual. Says whether that worked.

    Its peak stays about the same; what is kept are blocks of the main thread. Without glibc nothing
    changes.
    """
    if sys.platform != "linux":
        return False
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):  # musl has none
        return False
    maps, trim = (0, _NEVER) if keep else (_DEFAULT_MMAP_MAX, _DEFAULT_TRIM_THRESHOLD)
    done = bool(mallopt(_M_MMAP_MAX, maps)) and bool(mallopt(_M_TRIM_THRESHOLD, trim))
    if not keep:
        malloc_trim(ctypes.c_size_t(0))  # what is kept by now
    return done
