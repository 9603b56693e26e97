"""A moving average of a decoder's weights, which is validated and saved instead of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from train.model.flat_parameters import FlatParameters


class WeightAverage:
    """A moving average of the weights (Polyak & Juditsky, 1992).

    A lower decay in the first steps keeps the random initial weights out of the average.

    values: the average, laid out like the parameters' values. weight: the share of the newest
    parameters in the next update, a scalar on the device.
    """

    def __init__(
        self, parameters: FlatParameters, decay: float, weight: Tensor | None = None
    ) -> None:
        """weight: a float32 scalar on the parameters' device from which updates read the share of
        the newest parameters; None: a new one.
        """
        self._parameters = parameters
        self.values = parameters.values.clone()
        self._decay = decay
        # A tensor, because a captured graph reads its current value at every replay.
        device = parameters.values.device
        self.weight = torch.zeros((), device=device) if weight is None else weight

    def weight_at(self, step: int) -> float:
        """The share of the newest parameters after this step of the run (from 0)."""
        return 1 - min(self._decay, (1 + step) / (10 + step))

    def set_step(self, step: int) -> None:
        """Set the share of the newest parameters for the `update` after this step (from 0)."""
        self.weight.fill_(self.weight_at(step))

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights."""
        self.values.lerp_(self._parameters.values, self.weight)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the decoder the averaged weights within this context."""
        own_values = self._parameters.values.clone()
        self.take()
        try:
            yield
        finally:
            with torch.no_grad():
                self._parameters.values.copy_(own_values)

    @torch.no_grad()
    def take(self) -> None:
        """Give the decoder the averaged weights for good."""
        self._parameters.values.copy_(self.values)

    def state(self) -> dict[str, Tensor]:
        """The average by parameter name, as plain tensors."""
        return self._parameters.named(self.values)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned. Raises KeyError or RuntimeError if it does not fit."""
        self._parameters.load(state, self.values)
