"""What a training step on a GPU does between its matrix products, one kernel each."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Kernels(Protocol):
    """Shapes: B captions, R rows (T steps of B), sizes E of an input and H of the LSTM, W words.

    «low» is the dtype of the products, float32 or bfloat16; what is not called so is float32, words
    and targets are int64. All tensors are contiguous, but for the operands of `product`.
    """

    name: str

    def product(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """left @ right of low matrices, summed and written in float32."""

    def gather_words(
        self,
        captions: Tensor,
        starts: Tensor,
        lengths: Tensor,
        tokens: Tensor,
        words: Tensor,
        targets: Tensor,
    ) -> None:
        """Write the word that each row reads and the one it should say: `words`, `targets` (R,).

        captions: (B,); starts, lengths: (M,) int64, of every caption's tokens and of its targets,
        one more; tokens: int32.
        """

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
        """Write what the first layer reads: low `inputs` (R, E), photos in the first B rows.

        words: (R,); embeddings: (W, E); photos: (B, E); mask: low, (R, E).
        """

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
        """One step of a layer: writes `cells` and low `hidden` and, with a mask, `dropped`, all
        (B, H). `gates` (B, 4H) come in as the inputs' part and go out as i, f, g, o.

        recurrent: (B, 4H), the hidden state's part; None at the first step, as is `before`: the
        cells (B, H) of the step before.
        """

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
        """The gradients of that step: writes low `d_gates` (B, 4H).

        d_outputs: low, (B, H), of the outputs after the mask; d_recurrent: (B, H), of the hidden
        state, from the step after, None at the last one; d_cells: (B, H), from there likewise, not
        read at the last one; becomes that of the step before.
        """

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
        """Write each row's `losses` (R,), times its weight; low `logits` (R, padded W) become their
        gradient. Rows whose target is <pad> have none. The first `words` columns are words.
        """

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
        """AdamW, β 0.9 and 0.999, on all parameters (P,); the first `matrices` of them decay.

        gradients: sums over `tokens`, of this `norm`; divided by the tokens they are clipped to
        `clip_norm`. moments: of the gradient and its square. steps: how many, with this one.
        average: a moving average that then takes in the parameters with this `weight`. low: gets
        them in the products' dtype. All but P are scalars; the gradients may be changed.
        """
