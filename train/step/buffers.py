"""Memory that is allocated once and reused at every step."""

from __future__ import annotations

import torch
from torch import Tensor


class Buffers:
    """Uninitialised tensors by name. A name keeps its memory until a larger shape is asked for.

    generation: a number that changes whenever a buffer is reallocated.
    """

    def __init__(self, low_dtype: torch.dtype, device: torch.device) -> None:
        self._low_dtype = low_dtype
        self._device = device
        self._memory: dict[str, Tensor] = {}
        self._max_captions = self._max_rows = 0
        self.generation = 0

    def reserve(self, captions: int, rows: int) -> None:
        """Allocate buffers from now on so that they need not grow up to these first dimensions.

        captions: of buffers with one row a caption; rows: of buffers with more.
        """
        self._max_captions, self._max_rows = captions, rows

    def low(self, name: str, *shape: int) -> Tensor:
        """A tensor in the dtype of the matrix products, bfloat16 or float32."""
        return self._tensor(name, shape, self._low_dtype)

    def float(self, name: str, *shape: int) -> Tensor:
        """A float32 tensor."""
        return self._tensor(name, shape, torch.float32)

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        memory = self._memory.get(name)
        if memory is None or memory.numel() < size:
            rows = shape[0]
            reserved = self._max_rows if rows > self._max_captions else self._max_captions
            memory = torch.empty(
                size // rows * max(rows, reserved), dtype=dtype, device=self._device
            )
            self._memory[name] = memory
            self.generation += 1
        return memory[:size].view(shape)
