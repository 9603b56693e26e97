"""The inputs of one training step, sent from the host to the device in one copy."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# How many steps the host may be ahead of the device before it waits.
_SLOTS = 32


class StepInputs:
    """Everything that changes from step to step, on the device.

    numbers: (4,) float32: the number of tokens of the batch, the learning rate, the weight of the
    moving average, and one unused. The addresses of these numbers and of the captions never change,
    because captured graphs read them.
    """

    def __init__(self, batch_size: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._device = torch.zeros(2 + 2 * batch_size, dtype=torch.int64, device=device)
        self.numbers = self._device[:2].view(torch.float32)
        self._slots = [
            torch.zeros(2 + 2 * batch_size, dtype=torch.int64, pin_memory=on_gpu)
            for _ in range(_SLOTS)
        ]
        self._copied = [torch.cuda.Event() for _ in self._slots] if on_gpu else []
        self._next = 0

    def send(
        self,
        captions: NDArray[np.int64],
        views: NDArray[np.int64] | int,
        *,
        tokens: int,
        rate: float,
        average_weight: float,
    ) -> tuple[Tensor, Tensor]:
        """Queue the copy. Returns the captions (B,) and their views (B,) on the device.

        captions: (B,). views: (B,), or one view for all.
        """
        slot = self._next
        self._next = (slot + 1) % len(self._slots)
        if self._copied:
            self._copied[slot].synchronize()  # the last copy from this slot; seldom has to wait
        count = len(captions)
        values = self._slots[slot].numpy()
        values[:2].view(np.float32)[:3] = tokens, rate, average_weight
        values[2 : 2 + count] = captions
        values[2 + count : 2 + 2 * count] = views
        used = 2 + 2 * count
        self._device[:used].copy_(self._slots[slot][:used], non_blocking=True)
        if self._copied:
            self._copied[slot].record(torch.cuda.current_stream(self._device.device))
        return self._device[2 : 2 + count], self._device[2 + count : used]
