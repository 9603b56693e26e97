"""The kernels of `kernels.cu`, compiled when training starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from train.captions.vocabulary import END, PAD
from train.step.cuda.launch import architecture, compile_source, load_functions

SOURCE = Path(__file__).with_name("kernels.cu")
NAMES = ("gather_words", "read_inputs", "cell_forward", "cell_backward", "cross_entropy", "adamw")


class Launched(Protocol):
    """A kernel that can be started: `train.step.cuda.launch.Function`."""

    def for_each(self, count: int, *arguments: Tensor | int | float) -> None: ...

    def for_each_row(self, rows: int, *arguments: Tensor | int | float) -> None: ...


class CompiledKernels:
    """Implements `train.step.kernels.Kernels` by the functions of `kernels.cu`."""

    name = "compiled"

    def __init__(self, functions: Mapping[str, Launched]) -> None:
        self._gather_words, self._read_inputs = functions["gather_words"], functions["read_inputs"]
        self._cell_forward = functions["cell_forward"]
        self._cell_backward = functions["cell_backward"]
        self._cross_entropy = functions["cross_entropy"]
        self._adamw = functions["adamw"]

    def product(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        if left.dtype is torch.float32:
            torch.mm(left, right, out=out)
        else:
            torch.mm(left, right, out_dtype=torch.float32, out=out)

    def gather_words(
        self,
        captions: Tensor,
        starts: Tensor,
        lengths: Tensor,
        tokens: Tensor,
        words: Tensor,
        targets: Tensor,
    ) -> None:
        self._gather_words.for_each(
            len(words), captions, starts, lengths, tokens, words, targets,
            len(captions), len(words), PAD, END,
        )  # fmt: skip

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
        self._read_inputs.for_each(
            inputs.numel(), words, embeddings, photos, inputs if mask is None else mask, inputs,
            len(photos), inputs.shape[1], inputs.numel(), photo_every_step, mask is not None,
        )  # fmt: skip

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
        self._cell_forward.for_each(
            cells.numel(), gates, gates if recurrent is None else recurrent, *biases,
            cells if before is None else before, hidden if mask is None else mask,
            cells, hidden, dropped,
            cells.numel(), cells.shape[1], before is None, mask is not None,
        )  # fmt: skip

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
        self._cell_backward.for_each(
            cells.numel(), d_outputs, d_outputs if mask is None else mask,
            d_cells if d_recurrent is None else d_recurrent, d_cells, gates, cells,
            cells if before is None else before, d_gates,
            cells.numel(), cells.shape[1], before is None, d_recurrent is None, mask is not None,
        )  # fmt: skip

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
        self._cross_entropy.for_each_row(
            len(logits), logits, targets, losses if weights is None else weights, losses,
            logits.shape[1], words, PAD, weights is not None, float(smoothing),
        )  # fmt: skip

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
        scalars = (norm, tokens, rate, norm if weight is None else weight, steps)
        self._adamw.for_each(
            values.numel() // 4, values, gradients, *moments,
            values if average is None else average, values if low is None else low, *scalars,
            values.numel(), matrices, float(decay), float(clip_norm), average is not None,
            low is not None,
        )  # fmt: skip


def compile_kernels(device: torch.device, dtype: torch.dtype) -> CompiledKernels:
    """Compile and load the kernels for one GPU, in about 0.1 s. dtype: of the products, float32 or
    bfloat16. Raises KernelError.
    """
    options = ("-DBFLOAT16",) if dtype is torch.bfloat16 else ()
    code = compile_source(SOURCE.read_text(encoding="utf-8"), architecture(device), options)
    return CompiledKernels(load_functions(code, NAMES, device))
