"""AdamW over a decoder's flat parameters, and the learning rate's course."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from train.config import Recipe
from train.model.flat_parameters import FlatParameters
from train.step.kernels import Kernels
from train.step.torch_kernels import TorchKernels
from train.step.weight_average import WeightAverage


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The rate of step `step` of `steps` in all: a linear rise, then level or half a cosine."""
    warmup = math.ceil(recipe.warmup * steps)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    if recipe.decay == "constant":
        return recipe.learning_rate
    share = (step - warmup) / max(1, steps - warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


class FlatAdamW:
    """AdamW (Loshchilov & Hutter, 2019), decoupled weight decay on matrices alone; β 0.9, 0.999.

    Gradients are the sum over a batch's tokens; they are divided by the number of tokens, and
    clipped to a norm, in the pass that reads them anyway.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        recipe: Recipe,
        *,
        rate: Tensor | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        """rate: where steps read the learning rate, a float32 scalar on the parameters' device;
        None: one of its own. kernels: None: PyTorch's.
        """
        self.parameters = parameters
        self._recipe = recipe
        self._mean = torch.zeros_like(parameters.values)
        self._mean_of_squares = torch.zeros_like(parameters.values)
        device = parameters.values.device
        self._kernels = kernels or TorchKernels(device, torch.float32)
        # Tensors, so that a captured graph reads them anew at every replay.
        self._steps = torch.zeros((), device=device)
        self._rate = torch.zeros((), device=device) if rate is None else rate

    def set_rate(self, rate: float) -> None:
        self._rate.fill_(rate)

    @torch.no_grad()
    def step(
        self, count: Tensor, average: WeightAverage | None = None, low: Tensor | None = None
    ) -> None:
        """Update the parameters. count: scalar, the tokens behind the gradients' sum.

        average: takes in the new weights. low: gets them, in its own dtype, that of `kernels`.
        """
        values, gradients = self.parameters.values, self.parameters.gradients
        norm = gradients.norm()
        self._steps.add_(1)
        self._kernels.adamw(
            values,
            gradients,
            (self._mean, self._mean_of_squares),
            self._steps,
            self._rate,
            count.float(),
            norm,
            average.values if average else None,
            average.weight if average else None,
            low,
            matrices=self.parameters.matrices,
            decay=self._recipe.weight_decay,
            clip_norm=self._recipe.clip_norm,
        )

    def state(self) -> dict[str, Any]:
        """The moments by parameter name, and the number of steps: plain tensors."""
        return {
            "steps": int(self._steps),
            "mean": self.parameters.named(self._mean),
            "mean_of_squares": self.parameters.named(self._mean_of_squares),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """The reverse of `state`. Raises KeyError or RuntimeError if it does not fit."""
        self._steps.fill_(state["steps"])
        self.parameters.load(state["mean"], self._mean)
        self.parameters.load(state["mean_of_squares"], self._mean_of_squares)
