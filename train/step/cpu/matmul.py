"""Matrix products into existing memory, by the fastest library for the device.

On a CPU PyTorch gives float32 products to MKL, which runs at half the rate of oneDNN on AMD
processors; on Intel processors both are equally fast. The operator that calls oneDNN has no `out`,
so it computes some rows at a time, and the allocator reuses the memory of their result. A whole
result of 60 MB would be paged in again at every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train import private_torch

# Fewer and larger products, but still blocks that glibc keeps when they are freed: up to 32 MB.
_CHUNK_BYTES = 24 << 20
_ROWS_MULTIPLE = 64  # rows of a chunk; oneDNN compiles a kernel for every size


def multiply(left: Tensor, right: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """Write left (M, K) @ right (K, N), plus bias (N,), to out (M, N), and return out."""
    if _uses_onednn(left):
        for rows in _row_chunks(out):
            out[rows].copy_(private_torch.linear(left[rows], right, bias))
    elif bias is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(bias, left, right, out=out)
    return out


def add_product_(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Add left (M, K) @ right (K, N) to out (M, N), and return out."""
    if _uses_onednn(left):
        for rows in _row_chunks(out):
            out[rows].add_(private_torch.linear(left[rows], right, None))
        return out
    return out.addmm_(left, right)


def _uses_onednn(left: Tensor) -> bool:
    return (
        left.device.type == "cpu"
        and left.dtype is torch.float32
        and torch.backends.mkldnn.is_available()
    )


def _row_chunks(out: Tensor) -> list[slice]:
    rows, columns = out.shape
    count = _CHUNK_BYTES // (4 * max(1, columns)) // _ROWS_MULTIPLE * _ROWS_MULTIPLE
    count = max(_ROWS_MULTIPLE, count)
    return [slice(start, start + count) for start in range(0, rows, count)]
