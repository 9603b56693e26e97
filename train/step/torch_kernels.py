"""The operations of `train.step.kernels` by PyTorch, on any device.

`kernels.cu` must agree with them. They replace it where it cannot be compiled.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from train import private_torch
from train.captions.vocabulary import END, PAD


class TorchKernels:
    """Implements `Kernels`. On a GPU the LSTM cell is PyTorch's fused one.

    fused: False means plain float32 operations for that cell and for the products.
    """

    name = "torch"

    def __init__(self, device: torch.device, dtype: torch.dtype, *, fused: bool = True) -> None:
        self._dtype = dtype
        self._device = device
        self._fused = fused
        # Not every device has these operations, which only a try can tell.
        self._float_products = (
            fused and dtype is not torch.float32 and self._works(self._float_product)
        )
        self._fused_cells = fused and device.type == "cuda" and self._works(self._fused_cell)

    def product(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        if self._float_products:
            torch.mm(left, right, out_dtype=torch.float32, out=out)
        elif self._dtype is torch.float32:
            torch.mm(left, right, out=out)
        elif self._device.type == "cpu" or not self._fused:
            torch.mm(left.float(), right.float(), out=out)
        else:
            out.copy_(left @ right)

    def gather_words(
        self,
        captions: Tensor,
        starts: Tensor,
        lengths: Tensor,
        tokens: Tensor,
        words: Tensor,
        targets: Tensor,
    ) -> None:
        count = len(captions)
        steps = torch.arange(len(words) // count, device=words.device).unsqueeze(1)  # (T, 1)
        last = lengths[captions] - 1  # (B,)
        places = (starts[captions] + steps).clamp_max(len(tokens) - 1)  # (T, B)
        true_words = torch.where(steps < last, tokens[places].long(), PAD)
        shape = (len(steps), count)
        targets.view(shape).copy_(torch.where(steps == last, END, true_words))
        words.view(shape)[0] = PAD
        words.view(shape)[1:] = true_words[:-1]

    def read_inputs(
        self,
        words: Tensor,
        embeddings: Tensor,
        photos: Tensor,
        mask: Tensor | None,
        inputs: Tensor,
        *,
        photo_every_step: bool,
    ) -> None:
        count = len(photos)
        values = embeddings[words].view(-1, count, photos.shape[1])
        if photo_every_step:
            values += photos
        values[0] = photos
        values = values.view_as(inputs)
        inputs.copy_(values if mask is None else values * mask)

    def cell_forward(
        self,
        gates: Tensor,
        recurrent: Tensor | None,
        biases: tuple[Tensor, Tensor],
        before: Tensor | None,
        mask: Tensor | None,
        cells: Tensor,
        hidden: Tensor,
        dropped: Tensor,
    ) -> None:
        if recurrent is None or before is None:
            recurrent, before = torch.zeros_like(gates), torch.zeros_like(cells)
        output, cell, activated = private_torch.lstm_cell(
            gates, recurrent, before, biases, fused=self._fused_cells
        )
        gates.copy_(activated)
        cells.copy_(cell)
        hidden.copy_(output)
        if mask is not None:
            dropped.copy_(output * mask)

    def cell_backward(
        self,
        d_outputs: Tensor,
        mask: Tensor | None,
        d_recurrent: Tensor | None,
        d_cells: Tensor,
        gates: Tensor,
        cells: Tensor,
        before: Tensor | None,
        d_gates: Tensor,
    ) -> None:
        d_hidden = d_outputs.float() if mask is None else d_outputs.float() * mask
        d_cells_after = None
        if d_recurrent is not None:
            d_hidden, d_cells_after = d_hidden + d_recurrent, d_cells
        if before is None:
            before = torch.zeros_like(cells)
        gradients, d_before = private_torch.lstm_cell_backward(
            d_hidden, d_cells_after, before, cells, gates, fused=self._fused_cells
        )
        d_gates.copy_(gradients)
        d_cells.copy_(d_before)

    def cross_entropy(
        self,
        logits: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        losses: Tensor,
        *,
        words: int,
        smoothing: float,
    ) -> None:
        ignored = targets == PAD
        row_weights = (~ignored).float() if weights is None else weights.masked_fill(ignored, 0.0)
        values, index = logits.float(), targets.unsqueeze(1)
        log_sum = values.logsumexp(1)
        target_logits = values.gather(1, index).squeeze(1)
        mean = values[:, :words].mean(1)
        losses.copy_((log_sum - (1 - smoothing) * target_logits - smoothing * mean) * row_weights)
        gradients = values.sub_(log_sum.unsqueeze(1)).exp_()
        gradients[:, :words] -= smoothing / words
        gradients.scatter_add_(1, index, torch.full_like(target_logits, smoothing - 1).unsqueeze(1))
        logits.copy_(gradients.mul_(row_weights.unsqueeze(1)))

    def adamw(
        self,
        values: Tensor,
        gradients: Tensor,
        moments: tuple[Tensor, Tensor],
        steps: Tensor,
        rate: Tensor,
        tokens: Tensor,
        norm: Tensor,
        average: Tensor | None,
        weight: Tensor | None,
        low: Tensor | None,
        *,
        matrices: int,
        decay: float,
        clip_norm: float,
    ) -> None:
        divisor = torch.maximum(tokens, norm / clip_norm)
        parts = [(slice(0, matrices), decay), (slice(matrices, None), 0.0)] if decay else []
        for part, decay_of_part in parts or [(slice(None), 0.0)]:
            private_torch.adamw_(
                values[part],
                gradients[part],
                (moments[0][part], moments[1][part]),
                steps,
                rate,
                divisor,
                betas=(0.9, 0.999),
                decay=decay_of_part,
                eps=1e-8,
            )
        if average is not None and weight is not None:
            average.lerp_(values, weight)
        if low is not None:
            low.copy_(values)

    def _float_product(self) -> None:
        left = torch.ones(16, 16, dtype=self._dtype, device=self._device)
        out = torch.empty(16, 16, device=self._device)
        torch.mm(left.t(), left, out_dtype=torch.float32, out=out)

    def _fused_cell(self) -> None:
        gates = torch.zeros(2, 16, device=self._device)
        cells, bias = torch.zeros(2, 4, device=self._device), torch.zeros(16, device=self._device)
        _, cell, activated = private_torch.lstm_cell(gates, gates, cells, (bias, bias), fused=True)
        private_torch.lstm_cell_backward(cells, None, cells, cell, activated, fused=True)

    @staticmethod
    def _works(operation: Callable[[], None]) -> bool:
        try:
            operation()
        except (RuntimeError, AttributeError):  # not for this dtype, device or version of PyTorch
            return False
        return True
