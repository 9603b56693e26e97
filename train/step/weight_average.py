"""A moving average of a decoder's weights, to be validated and saved in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from train.model.flat_parameters import FlatParameters


class WeightAverage:
    """A moving average of the weights (Polyak & Juditsky, 1992).

    Young averages forget faster, so that the first random weights do not stay in them.

    values: the average, laid out as the parameters' values. weight: of the newest parameters, a
    scalar on the device.
    """

    def __init__(
        self, parameters: FlatParameters, decay: float, weight: Tensor | None = None
    ) -> None:
        """weight: where updates read the weight of the newest parameters, as the optimizer's rate
        is read.
        """
        self._parameters = parameters
        self.values = parameters.values.clone()
        self._decay = decay
        # A tensor, so that a captured graph reads it anew at every replay.
        device = parameters.values.device
        self.weight = torch.zeros((), device=device) if weight is None else weight

    def weight_at(self, step: int) -> float:
        """Of the newest parameters, after this step of the run (from 0)."""
        return 1 - min(self._decay, (1 + step) / (10 + step))

    def set_step(self, step: int) -> None:
        """Say which step of the run (from 0) the next `update` follows."""
        self.weight.fill_(self.weight_at(step))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        self.values.lerp_(self._parameters.values, self.weight)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the decoder has the averaged weights."""
        kept = self._parameters.values.clone()
        self.take()
        try:
            yield
        finally:
            with torch.no_grad():
                self._parameters.values.copy_(kept)

    @torch.no_grad()
    def take(self) -> None:
        """Give the decoder the averaged weights for good."""
        self._parameters.values.copy_(self.values)

    def state(self) -> dict[str, Tensor]:
        """The average by parameter name, as plain tensors."""
        return self._parameters.named(self.values)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The reverse of `state`. Raises KeyError or RuntimeError if it does not fit."""
        self._parameters.load(state, self.values)
