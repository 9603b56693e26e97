"""Matrix products into memory that is there already, by the fastest library of the device.

torch gives float32 products on a CPU to MKL, which on AMD's processors runs at half the rate of
oneDNN; on Intel's the two are alike. oneDNN is reached through an operator that has no `out`, so it
works on a few rows at a time: their result is still in the processor's cache when it is copied, and
the allocator has the memory at hand, where a fresh result of 60 MB is paged in anew at every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train import private_torch

_CHUNK_BYTES = 8 << 20
_ROWS_MULTIPLE = 64  # of a chunk: oneDNN makes a kernel for every size


def multiply(left: Tensor, right: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """left (M, K) @ right (K, N), plus bias (N,), into out (M, N), which is returned."""
    if _by_onednn(left):
        for rows in _chunks(out):
            out[rows].copy_(private_torch.linear(left[rows], right, bias))
    elif bias is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(bias, left, right, out=out)
    return out


def add_product_(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Add left (M, K) @ right (K, N) to out (M, N), which is returned."""
    if _by_onednn(left):
        for rows in _chunks(out):
            out[rows].add_(private_torch.linear(left[rows], right, None))
        return out
    return out.addmm_(left, right)


def _by_onednn(left: Tensor) -> bool:
    return (
        left.device.type == "cpu"
        and left.dtype is torch.float32
        and torch.backends.mkldnn.is_available()
    )


def _chunks(out: Tensor) -> list[slice]:
    rows, columns = out.shape
    count = _CHUNK_BYTES // (4 * max(1, columns)) // _ROWS_MULTIPLE * _ROWS_MULTIPLE
    count = max(_ROWS_MULTIPLE, count)
    return [slice(start, start + count) for start in range(0, rows, count)]
