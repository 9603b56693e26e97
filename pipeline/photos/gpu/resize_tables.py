"""What torch's antialiased resize of uint8 on a CPU reads along one axis, so that others can do the
same in integers.

The source of the formulas is `UpSampleKernel.cpp` of PyTorch: the windows and weights of
`_compute_indices_min_size_weights_aa` in float64, rounded to int16 as in
`_compute_index_ranges_int16_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Filter = Callable[[NDArray[np.float64]], NDArray[np.float64]]

_MOST_PRECISION = 22  # bits behind the point


class ResizeTable(NamedTuple):
    """Windows and weights of the places of one axis of the result.

    first: (n,) int32, where each window begins. weights: (n, K) int16, K for all windows, none of
    which leaves the axis. A value is `(sum of weight × pixel + 2^(precision - 1)) >> precision`,
    clamped to 0 … 255.
    """

    first: NDArray[np.int32]
    weights: NDArray[np.int16]
    precision: int


def _triangle(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic with a = -0.5, as torch's with antialiasing and Pillow's."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


# By the names of `Preprocessing.filter`: the filter of the distance in pixels of the smaller axis,
# and the distance beyond which it is zero.
_FILTERS: dict[str, tuple[Filter, float]] = {
    "bilinear": (_triangle, 1.0),
    "bicubic": (_cubic, 2.0),
}


def resize_table(length: int, out_length: int, filter: str = "bilinear") -> ResizeTable:
    """The table for an axis of `length` pixels that becomes `out_length`.

    filter: `bilinear` or `bicubic`. Equal lengths give every pixel back.
    """
    of_distance, reach = _FILTERS[filter]
    scale = length / out_length
    support = reach * scale if scale >= 1.0 else reach
    inverse = 1.0 / scale if scale >= 1.0 else 1.0
    center = scale * (np.arange(out_length) + 0.5)
    # int64 cuts towards zero, as C does
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    size = np.minimum((center + support + 0.5).astype(np.int64), length) - first
    size = np.clip(size, 0, 2 * math.ceil(support) + 1)
    most = max(1, int(size.max()))
    at = np.arange(most)
    weights = of_distance((at + first[:, None] - center[:, None] + 0.5) * inverse)
    weights[at >= size[:, None]] = 0.0
    total = np.zeros(out_length)
    for column in weights.T:  # one after the other, because the order of a sum decides its last bit
        total += column
    weights /= np.where(total != 0.0, total, 1.0)[:, None]
    precision, greatest = 0, float(weights.max())
    while precision < _MOST_PRECISION and int(0.5 + greatest * (2 << precision)) < 1 << 15:
        precision += 1
    scaled = weights * (1 << precision)
    whole = (scaled + np.copysign(0.5, weights)).astype(np.int16)
    most = int(np.flatnonzero(whole.any(0))[-1]) + 1
    whole, at = whole[:, :most], at[:most]
    # Windows that would leave the axis, if all were K long, begin earlier, with weights of zero.
    shift = np.maximum(first + most - length, 0)
    if shift.any():
        source = at - shift[:, None]
        whole = np.where(source < 0, 0, np.take_along_axis(whole, np.maximum(source, 0), 1))
    return ResizeTable((first - shift).astype(np.int32), whole, precision)
