"""Reads rows from an open file, in as few reads as they take."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

_READ_BYTES = 1 << 24  # at a time


def runs(rows: NDArray[np.int64]) -> list[slice]:
    """Slices of `rows` with consecutive numbers. Each slice takes one read or write."""
    cuts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    return [slice(start, stop) for start, stop in pairwise(cuts) if stop > start]


def read_into(fd: int, array: NDArray[Any], position: int) -> bool:
    """Fill a contiguous array with the bytes of a file from `position` on.

    False if the file ends before. Raises OSError.
    """
    left = array.reshape(-1).view(np.uint8).data
    while len(left):
        count = os.preadv(fd, [left[:_READ_BYTES]], position)
        if not count:
            return False
        left, position = left[count:], position + count
    return True
