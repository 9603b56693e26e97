"""AdamW over a decoder's flat parameters, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from train.config import FixedRecipe, Recipe
from train.model.flat_parameters import FlatParameters
from train.step.kernels import Kernels
from train.step.torch_kernels import TorchKernels
from train.step.update.weight_average import WeightAverage


def learning_rate(recipe: FixedRecipe, step: int, steps: int) -> float:
    """The rate of one of `steps` steps, from 0: a linear rise, then constant or half a cosine."""
    warmup = math.ceil(recipe.warmup * steps)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    if recipe.decay == "constant":
        return recipe.learning_rate
    share = (step - warmup) / max(1, steps - warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


class FlatAdamW:
    """AdamW (Loshchilov & Hutter, 2019) with β 0.9 and 0.999; only matrices decay.

    Gradients are sums over the tokens of a batch. One pass over them divides by the number of
    tokens, clips to a norm and updates.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        recipe: Recipe,
        *,
        rate: Tensor | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        """rate: a float32 scalar on the parameters' device from which steps read the learning rate;
        None: a new one. kernels: None means PyTorch's.
        """
        self.parameters = parameters
        self._recipe = recipe
        self._mean = torch.zeros_like(parameters.values)
        self._mean_of_squares = torch.zeros_like(parameters.values)
        device = parameters.values.device
        self._kernels = kernels or TorchKernels(device, torch.float32)
        # Tensors, because a captured graph reads their current values at every replay.
        self._steps = torch.zeros((), device=device)
        self._rate = torch.zeros((), device=device) if rate is None else rate

    @property
    def tensors(self) -> list[Tensor]:
        """All that it remembers: moments (P,) and the number of steps, float32, on the device."""
        return [self._mean, self._mean_of_squares, self._steps]

    def set_rate(self, rate: float) -> None:
        self._rate.fill_(rate)

    @torch.no_grad()
    def step(
        self, count: Tensor, average: WeightAverage | None = None, low: Tensor | None = None
    ) -> None:
        """Update the parameters.

        count: a scalar, the number of tokens that the gradients are summed over. average: is
        updated with the new parameters. low: (P,) receives them in the dtype of `kernels`.
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
        """The number of steps, and the moments as plain tensors by parameter name."""
        return {
            "steps": int(self._steps),
            "mean": self.parameters.named(self._mean),
            "mean_of_squares": self.parameters.named(self._mean_of_squares),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned. Raises KeyError or RuntimeError if it does not fit."""
        self._steps.fill_(state["steps"])
        self.parameters.load(state["mean"], self._mean)
        self.parameters.load(state["mean_of_squares"], self._mean_of_squares)
