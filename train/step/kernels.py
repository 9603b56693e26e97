"""The operations of a training step around its matrix products, one kernel each on a GPU."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Kernels(Protocol):
    """Sizes: B captions, R rows (T steps of B rows), E an input, H the LSTM's state, W words, P
    parameters.

    "Low" tensors have the dtype of the products, float32 or bfloat16. All others are float32, but
    words and targets are int64. All are contiguous, except the operands of `product`.
    """

    name: str

    def product(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Write left @ right to `out`. The operands are low; sums and `out` are float32."""

    def gather_words(
        self,
        captions: Tensor,
        starts: Tensor,
        lengths: Tensor,
        tokens: Tensor,
        words: Tensor,
        targets: Tensor,
    ) -> None:
        """Write the word that each row reads to `words` (R,) and its target to `targets` (R,).

        captions: (B,) int64. starts: (M,) int64, the place of every caption's first token in
        `tokens`. lengths: (M,) int64, the number of every caption's targets, one more than its
        tokens. tokens: int32.
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
        """Write the first layer's inputs to `inputs` (R, E), low. The first B rows read the photos.

        words: (R,). embeddings: (W, E). photos: (B, E). mask: (R, E), low.
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
        """Compute one step of a layer. Writes `cells` (B, H) and `hidden` (B, H), low, and with a
        mask `dropped` (B, H), low: hidden times mask.

        gates: (B, 4H), holds the inputs' part of the sums without biases; becomes i, f, g, o.
        recurrent: (B, 4H), the hidden state's part. before: (B, H), the cells of the step before.
        recurrent and before are None at the first step.
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
        """Compute the gradients of that step. Writes `d_gates` (B, 4H), low.

        d_outputs: (B, H), low, the gradient of the outputs after the mask. d_recurrent: (B, H), the
        gradient of the hidden state from the step after; None at the last step. d_cells: (B, H),
        the gradient of the cells from the step after, not read at the last step; becomes that of
        the cells of the step before.
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
        """Write each row's loss times its weight to `losses` (R,), and its gradient to `logits`.

        logits: (R, padded W), low; the first `words` columns are words. weights: (R,), None: all
        are 1. The loss and the gradient are zero in rows whose target is <pad>.
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
        """Update all parameters `values` (P,) by AdamW with β 0.9 and 0.999.

        gradients: (P,), sums over `tokens` tokens, with the norm `norm`. Divided by the tokens,
        they are clipped to `clip_norm`. They may be changed. moments: (P,) each, the moving
        averages of the gradient and of its square. steps: the number of steps, with this one.
        average: (P,), a moving average, then moves towards the parameters by `weight`. low: (P,),
        receives them in the products' dtype. Only the first `matrices` parameters decay. All other
        tensors are scalars.
        """
