"""Whether compiled kernels compute what PyTorch's operations do."""

from __future__ import annotations

import torch
from torch import Tensor

from train.captions.vocabulary import PAD
from train.model.flat_parameters import IMPOSSIBLE_LOGIT
from train.step.cuda.nvrtc import KernelError
from train.step.kernels import Kernels
from train.step.torch_kernels import TorchKernels


def check_kernels(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    """Raise KernelError, naming the first kernel that strays from plain operations on seeded
    numbers.

    The sizes leave blocks of threads half full, and rows both shorter and longer than a block.
    """
    for vocabulary, captions, size in ((70, 3, 13), (4999, 37, 40)):
        reference = TorchKernels(device, dtype, fused=False)
        _Check(kernels, reference, device, dtype).run(vocabulary, captions, size)


class _Check:
    def __init__(
        self, mine: Kernels, theirs: Kernels, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._both = (mine, theirs)
        self._device = device
        self._dtype = dtype
        self._generator = torch.Generator().manual_seed(0)

    def run(self, vocabulary: int, captions: int, size: int) -> None:
        self._products(captions, size)
        self._gathered_words(captions)
        for flag in (False, True):
            self._inputs(vocabulary, captions, size, flag)
            self._cells(captions, size, flag)
            self._losses(vocabulary, captions, flag)
            self._updates(16 * captions, flag)

    def _products(self, captions: int, size: int) -> None:
        left, right = self._low(4 * captions, 2 * size), self._low(2 * size, 3 * size)
        for a, b in ((left, right), (left.t().contiguous().t(), right.t().contiguous().t())):
            found = []
            for kernels in self._both:
                out = self._unwritten(len(a), b.shape[1])
                kernels.product(a, b, out)
                found.append(out)
            # Sums of `2 * size` numbers near 1, added up in whatever order.
            self._agree("product", found, rtol=1e-4, atol=1e-4)

    def _gathered_words(self, captions: int) -> None:
        lengths = torch.randint(1, 9, (captions + 5,), generator=self._generator)
        starts = (lengths - 1).cumsum(0) - (lengths - 1)
        count = int((lengths - 1).sum())
        tokens = torch.randint(4, 99, (count,), generator=self._generator)
        chosen = torch.randperm(captions + 5, generator=self._generator)[:captions]
        rows = captions * int(lengths[chosen].max())
        found = []
        for kernels in self._both:
            words, targets = (torch.full((rows,), -1, device=self._device) for _ in range(2))
            kernels.gather_words(
                chosen.to(self._device),
                starts.to(self._device),
                lengths.to(self._device),
                tokens.int().to(self._device),
                words,
                targets,
            )
            found.append(torch.stack([words, targets]))
        self._agree("gather_words", found, rtol=0, atol=0)

    def _inputs(self, vocabulary: int, captions: int, size: int, flag: bool) -> None:
        rows = 5 * captions
        words = torch.randint(vocabulary, (rows,), generator=self._generator).to(self._device)
        embeddings, photos = self._float(vocabulary, size), self._float(captions, size)
        mask = self._mask(rows, size) if flag else None
        found = []
        for kernels in self._both:
            inputs = self._unwritten(rows, size).to(self._dtype)
            kernels.read_inputs(words, embeddings, photos, mask, inputs, photo_every_step=flag)
            found.append(inputs)
        self._agree("read_inputs", found)

    def _cells(self, captions: int, size: int, flag: bool) -> None:
        """A first and a last step (flag), or one in between."""
        gates, recurrent = self._float(captions, 4 * size), self._float(captions, 4 * size)
        biases = (self._float(4 * size), self._float(4 * size))
        before, mask = self._float(captions, size), self._mask(captions, size) if flag else None
        d_outputs, d_recurrent = self._low(captions, size), self._float(captions, size)
        d_after = self._float(captions, size)
        found = []
        for kernels in self._both:
            values = gates.clone()
            cells, d_cells = self._unwritten(captions, size), d_after.clone()
            hidden, dropped = (
                self._unwritten(captions, size).to(self._dtype),
                torch.zeros_like(d_outputs),
            )
            d_gates = self._unwritten(captions, 4 * size).to(self._dtype)
            past = (None, None) if flag else (recurrent, before)
            kernels.cell_forward(values, past[0], biases, past[1], mask, cells, hidden, dropped)
            kernels.cell_backward(
                d_outputs, mask, None if flag else d_recurrent, d_cells, values, cells, past[1],
                d_gates,
            )  # fmt: skip
            found.append((values, cells, hidden, dropped, d_cells, d_gates))
        names = ("gates", "cells", "hidden", "dropped", "d_cells", "d_gates")
        for name, *pair in zip(names, *found, strict=True):
            self._agree(f"cell ({name})", pair)

    def _losses(self, vocabulary: int, captions: int, flag: bool) -> None:
        """With weights and smoothing, or without."""
        rows, padded = 3 * captions, -(-vocabulary // 16) * 16
        logits = self._low(rows, padded).mul_(3)
        logits[:, vocabulary:] = IMPOSSIBLE_LOGIT
        targets = torch.randint(vocabulary, (rows,), generator=self._generator)
        targets[::4] = PAD
        targets = targets.to(self._device)
        weights = self._float(rows) if flag else None
        losses_found, gradients = [], []
        for kernels in self._both:
            losses, values = self._unwritten(rows), logits.clone()
            kernels.cross_entropy(
                values, targets, weights, losses, words=vocabulary, smoothing=0.1 if flag else 0.0
            )
            losses_found.append(losses)
            gradients.append(values)
        self._agree("cross_entropy (losses)", losses_found)
        self._agree("cross_entropy (gradient)", gradients, atol=1e-7)

    def _updates(self, size: int, flag: bool) -> None:
        """Two steps, clipped, decaying and averaged, or not."""
        start, average = self._float(size), self._float(size) if flag else None
        gradients = (self._float(size).mul_(7), self._float(size))
        found = []
        for kernels in self._both:
            values, moments = start.clone(), (torch.zeros_like(start), torch.zeros_like(start))
            mean = None if average is None else average.clone()
            low = torch.zeros_like(start, dtype=self._dtype)
            for n, gradient in enumerate(gradients, 1):
                kernels.adamw(
                    values, gradient.clone(), moments, self._scalar(n), self._scalar(0.01),
                    self._scalar(20), gradient.norm(), mean,
                    self._scalar(0.3) if flag else None, low,
                    matrices=size // 2, decay=0.1 if flag else 0.0, clip_norm=0.1 if flag else 1e9,
                )  # fmt: skip
            found.append((values, *moments, values if mean is None else mean, low))
        names = ("values", "mean", "mean of squares", "average", "low")
        for name, *pair in zip(names, *found, strict=True):
            self._agree(f"adamw ({name})", pair, atol=1e-7)

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=self._device)

    def _float(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self._device)

    def _low(self, *shape: int) -> Tensor:
        return self._float(*shape).to(self._dtype)

    def _mask(self, *shape: int) -> Tensor:
        return (self._float(*shape) > 0).to(self._dtype).mul_(2)

    def _unwritten(self, *shape: int) -> Tensor:
        return torch.full(shape, 77.0, device=self._device)

    def _agree(
        self,
        name: str,
        found: list[Tensor],
        rtol: float | None = None,
        atol: float = 1e-5,
    ) -> None:
        """rtol: None: of one rounding to the products' dtype, where the numbers have that."""
        mine, theirs = found
        if rtol is None:
            rtol = 1e-2 if mine.dtype is torch.bfloat16 else 1e-4
        far = ~torch.isclose(mine.float(), theirs.float(), rtol=rtol, atol=atol)
        if far.any():
            raise KernelError(f"{name} is wrong in {int(far.sum())} of {far.numel()} numbers")
