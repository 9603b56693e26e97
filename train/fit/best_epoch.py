"""Which epoch's model is the best one, as far as the validation photos can tell.

A few hundred photos give CIDEr a standard error of some points: the highest of twenty epochs' is
the luckiest, often an early one. So the photos' own scores are compared, and an epoch that is
behind by less than its standard error counts as equal; among equals the validation loss decides,
which changes smoothly. This is the one-standard-error rule of model selection (Breiman et al.,
1984), with paired differences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Judged:
    """A model's validation scores after an epoch."""

    epoch: int
    val_loss: float
    ciders: NDArray[np.float64]  # (N,) of the validation photos, always in the same order
    rewarded: bool = False  # by a self-critical epoch, which does not mind the loss

    def _is_behind(self, other: Judged) -> bool:
        """By more than the photos' chance: the standard error of the mean difference."""
        behind = other.ciders - self.ciders
        count = len(behind)
        error = float(behind.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
        return float(behind.mean()) > error

    def _merit(self) -> tuple[bool, float]:
        """Among equals in CIDEr: the larger the better."""
        return self.rewarded, self.epoch if self.rewarded else -self.val_loss


class Choice:
    """Is told of one epoch after the other, and says which to keep: only the last can be kept."""

    def __init__(self, *, by_loss: bool = False) -> None:
        """by_loss: by the validation loss alone."""
        self._by_loss = by_loss
        self.best: Judged | None = None
        self._leader: Judged | None = None  # the highest mean CIDEr, by luck or not

    def takes(self, judged: Judged) -> bool:
        """Whether this epoch's model is now the best one."""
        if self._takes(judged):
            self.best = judged
            return True
        return False

    def _takes(self, judged: Judged) -> bool:
        best = self.best
        if self._by_loss:
            return best is None or judged.val_loss < best.val_loss
        leader = self._leader
        if leader is None or judged.ciders.mean() > leader.ciders.mean():
            leader = self._leader = judged
        if judged._is_behind(leader):
            return False
        return best is None or best._is_behind(leader) or judged._merit() > best._merit()

    def state(self) -> dict[str, Any]:
        """Plain values and tensors: what `load` takes."""
        return {"best": _state(self.best), "leader": _state(self._leader)}

    def load(self, state: dict[str, Any]) -> None:
        self.best, self._leader = _judged(state["best"]), _judged(state["leader"])


def _state(judged: Judged | None) -> dict[str, Any] | None:
    if judged is None:
        return None
    return {**vars(judged), "ciders": torch.from_numpy(judged.ciders)}


def _judged(state: dict[str, Any] | None) -> Judged | None:
    return None if state is None else Judged(**{**state, "ciders": state["ciders"].numpy()})
