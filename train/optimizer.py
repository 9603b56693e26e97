"""AdamW over a decoder's flat parameters, the learning rate's course, and the weights' average."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from train.config import Recipe
from train.flat import FlatParameters


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
    """AdamW (Loshchilov & Hutter, 2019), decoupled weight decay on matrices alone.

    Gradients are the sum over a batch's tokens; they are divided by the number of tokens, and
    clipped to a norm, in the pass that reads them anyway.
    """

    def __init__(self, parameters: FlatParameters, recipe: Recipe) -> None:
        self.parameters = parameters
        self._clip_norm = recipe.clip_norm
        device = parameters.values.device
        # On a GPU the rate is a tensor: a captured graph reads it anew at every replay.
        on_gpu = device.type == "cuda"
        self._rate = torch.zeros((), device=device)
        cut = parameters.matrices
        self._parts = [nn.Parameter(parameters.values[:cut]), nn.Parameter(parameters.values[cut:])]
        self._parts[0].grad = parameters.gradients[:cut]
        self._parts[1].grad = parameters.gradients[cut:]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": self._parts[:1], "weight_decay": recipe.weight_decay},
                {"params": self._parts[1:], "weight_decay": 0.0},
            ],
            lr=self._rate if on_gpu else recipe.learning_rate,
            fused=True,
            capturable=on_gpu,
        )

    def set_rate(self, rate: float) -> None:
        if self._rate.is_cuda:
            self._rate.fill_(rate)
            return
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    @torch.no_grad()
    def step(self, count: Tensor) -> None:
        """Update the parameters. count: scalar, the tokens behind the gradients' sum."""
        divisor = count.float()
        excess = self.parameters.gradients.norm() / (divisor * self._clip_norm)
        # The protocol by which torch's fused optimizers take a gradient scaler's factor.
        vars(self._optimizer)["grad_scale"] = divisor * excess.clamp_min(1.0)
        self._optimizer.step()

    def state(self) -> dict[str, Any]:
        """`exp_avg` and `exp_avg_sq` by parameter name, and the number of steps: plain tensors."""
        states = [self._optimizer.state[part] for part in self._parts]
        if not states[0]:
            return {"steps": 0}
        moments = {
            name: self.parameters.named(torch.cat([state[name] for state in states]))
            for name in ("exp_avg", "exp_avg_sq")
        }
        return {"steps": int(states[0]["step"]), **moments}

    def load(self, state: Mapping[str, Any]) -> None:
        """The reverse of `state`. Raises KeyError or RuntimeError if it does not fit."""
        if not state["steps"]:
            return
        flat: dict[str, Tensor] = {}
        for name in ("exp_avg", "exp_avg_sq"):
            flat[name] = torch.zeros_like(self.parameters.values)
            self.parameters.load(state[name], flat[name])
        for i, part in enumerate(self._parts):
            start = i * self.parameters.matrices
            moments = {n: v[start : start + len(part)].clone() for n, v in flat.items()}
            steps = torch.tensor(float(state["steps"]), device=self._rate.device)
            self._optimizer.state[part] = {"step": steps, **moments}


class WeightAverage:
    """A moving average of the weights and of BatchNorm's statistics (Polyak & Juditsky, 1992).

    Young averages forget faster, so that the first random weights do not stay in them.
    """

    def __init__(self, parameters: FlatParameters, normalize: nn.BatchNorm1d, decay: float) -> None:
        assert normalize.running_mean is not None
        assert normalize.running_var is not None
        self._parameters = parameters
        self._live = [parameters.values, normalize.running_mean, normalize.running_var]
        self._average = [tensor.clone() for tensor in self._live]
        self._decay = decay
        self._weight = torch.zeros((), device=parameters.values.device)

    def set_step(self, step: int) -> None:
        """Say which step of the run (from 0) the next `update` follows."""
        self._weight.fill_(1 - min(self._decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        for average, live in zip(self._average, self._live, strict=True):
            average.lerp_(live, self._weight)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the decoder has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, live in zip(self._average, self._live, strict=True):
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)

    def state(self) -> dict[str, Any]:
        values, mean, variance = self._average
        return {
            "values": self._parameters.named(values),
            "running_mean": mean.cpu().clone(),
            "running_var": variance.cpu().clone(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """The reverse of `state`. Raises KeyError or RuntimeError if it does not fit."""
        values, mean, variance = self._average
        self._parameters.load(state["values"], values)
        mean.copy_(state["running_mean"])
        variance.copy_(state["running_var"])
