"""Checks that kernels compute the same as plain PyTorch operations, before they train anything."""

from __future__ import annotations

import torch
from torch import Tensor

from train.captions.vocabulary import PAD
from train.model.flat_parameters import IMPOSSIBLE_LOGIT
from train.step.cuda.launch import KernelError
from train.step.kernels import Kernels
from train.step.torch_kernels import TorchKernels
from train.torch_import import seeded_generator


def check_kernels(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    """Compare kernels with plain operations on seeded random numbers.

    The sizes are chosen so that some blocks of threads are partly filled, and rows are both shorter
    and longer than a block. Raises KernelError, which names the first kernel that is wrong.
    """
    for vocabulary, captions, size in ((70, 3, 13), (4999, 37, 40)):
        reference = TorchKernels(device, dtype, fused=False)
        _Check(kernels, reference, device, dtype).run(vocabulary, captions, size)


class _Check:
    def __init__(
        self, kernels: Kernels, reference: Kernels, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._both = (kernels, reference)
        self._device = device
        self._dtype = dtype
        self._generator = seeded_generator(0)

    def run(self, vocabulary: int, captions: int, size: int) -> None:
        self._products(captions, size)
        self._gathered_words(captions)
        for with_options in (False, True):
            self._inputs(vocabulary, captions, size, with_options)
            self._cells(captions, size, with_options)
            self._losses(vocabulary, captions, with_options)
            self._updates(16 * captions, with_options)

    def _products(self, captions: int, size: int) -> None:
        left, right = self._low(4 * captions, 2 * size), self._low(2 * size, 3 * size)
        for a, b in ((left, right), (left.t().contiguous().t(), right.t().contiguous().t())):
            found = []
            for kernels in self._both:
                out = self._unwritten(len(a), b.shape[1])
                kernels.product(a, b, out)
                found.append(out)
            # Sums of `2 * size` products near 1, whose order of addition is open.
            self._compare("product", found, rtol=1e-4, atol=1e-4)

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
        self._compare("gather_words", found, rtol=0, atol=0)

    def _inputs(self, vocabulary: int, captions: int, size: int, with_options: bool) -> None:
        """With the photo at every step and dropout, or without both."""
        rows = 5 * captions
        words = torch.randint(vocabulary, (rows,), generator=self._generator).to(self._device)
        embeddings, photos = self._float(vocabulary, size), self._float(captions, size)
        mask = self._mask(rows, size) if with_options else None
        found = []
        for kernels in self._both:
            inputs = self._unwritten(rows, size).to(self._dtype)
            kernels.read_inputs(
                words, embeddings, photos, mask, inputs, photo_every_step=with_options
            )
            found.append(inputs)
        self._compare("read_inputs", found)

    def _cells(self, captions: int, size: int, alone: bool) -> None:
        """alone: a step that is both the first and the last, with dropout; otherwise a step in
        between, without.
        """
        gates, recurrent = self._float(captions, 4 * size), self._float(captions, 4 * size)
        biases = (self._float(4 * size), self._float(4 * size))
        before = self._float(captions, size)
        mask = self._mask(captions, size) if alone else None
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
            past = (None, None) if alone else (recurrent, before)
            kernels.cell_forward(values, past[0], biases, past[1], mask, cells, hidden, dropped)
            kernels.cell_backward(
                d_outputs, mask, None if alone else d_recurrent, d_cells, values, cells, past[1],
                d_gates,
            )  # fmt: skip
            found.append((values, cells, hidden, dropped, d_cells, d_gates))
        names = ("gates", "cells", "hidden", "dropped", "d_cells", "d_gates")
        for name, *pair in zip(names, *found, strict=True):
            self._compare(f"cell ({name})", pair)

    def _losses(self, vocabulary: int, captions: int, with_options: bool) -> None:
        """With weights and label smoothing, or without both."""
        rows, padded = 3 * captions, -(-vocabulary // 16) * 16
        logits = self._low(rows, padded).mul_(3)
        logits[:, vocabulary:] = IMPOSSIBLE_LOGIT
        targets = torch.randint(vocabulary, (rows,), generator=self._generator)
        targets[::4] = PAD
        targets = targets.to(self._device)
        weights = self._float(rows) if with_options else None
        smoothing = 0.1 if with_options else 0.0
        losses_found, gradients = [], []
        for kernels in self._both:
            losses, values = self._unwritten(rows), logits.clone()
            kernels.cross_entropy(
                values, targets, weights, losses, words=vocabulary, smoothing=smoothing
            )
            losses_found.append(losses)
            gradients.append(values)
        self._compare("cross_entropy (losses)", losses_found)
        self._compare("cross_entropy (gradient)", gradients, atol=1e-7)

    def _updates(self, size: int, with_options: bool) -> None:
        """Two steps, with clipping, weight decay and averaging, or without."""
        start, average = self._float(size), self._float(size) if with_options else None
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
                    self._scalar(0.3) if with_options else None, low, matrices=size // 2,
                    decay=0.1 if with_options else 0.0, clip_norm=0.1 if with_options else 1e9,
                )  # fmt: skip
            found.append((values, *moments, values if mean is None else mean, low))
        names = ("values", "mean", "mean of squares", "average", "low")
        for name, *pair in zip(names, *found, strict=True):
            self._compare(f"adamw ({name})", pair, atol=1e-7)

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

    def _compare(
        self,
        name: str,
        found: list[Tensor],
        rtol: float | None = None,
        atol: float = 1e-5,
    ) -> None:
        """Raise KernelError if the kernel's numbers are not close to the reference's.

        rtol: None allows for one rounding to bfloat16 in bfloat16 numbers, and is strict in others.
        """
        numbers, expected = found
        if rtol is None:
            rtol = 1e-2 if numbers.dtype is torch.bfloat16 else 1e-4
        wrong = ~torch.isclose(numbers.float(), expected.float(), rtol=rtol, atol=atol)
        if wrong.any():
            raise KernelError(f"{name} is wrong in {int(wrong.sum())} of {wrong.numel()} numbers")
