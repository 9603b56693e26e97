"""Decides which epoch's model is the best one.

CIDEr over a few hundred photos has a standard error of several points. The highest of twenty
epochs' scores is therefore the luckiest one, and often an early epoch's. So epochs are compared
photo by photo, and one that trails by no more than the standard error of the difference counts as
equal. Among equals the validation loss decides, because it changes smoothly. This is the
one-standard-error rule of model selection (Breiman et al., 1984), with paired differences. Where
there are fewer than fifty photos, all epochs count as equal.

Self-critical epochs are an exception. They raise CIDEr at the cost of the loss, so the loss cannot
compare them with other epochs. Among equals, a self-critical epoch wins over an ordinary one,
because whoever adds such epochs wants their effect, and the latest of them wins. One that trails by
more than the standard error does not win.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

# CIDEr over fewer photos than these is luck: one photo whose caption happens to match outweighs the
# others. The loss, to which each word contributes, is steadier.
FEWEST_PHOTOS = 50

# The number of the epoch that has the model a run starts from.
BEFORE_TRAINING = -1


@dataclass(frozen=True)
class ValidatedEpoch:
    """The validation scores of a model after an epoch. In checkpoints the field names are keys."""

    epoch: int
    val_loss: float
    ciders: NDArray[np.float64]  # (N,) of the validation photos, always in the same order
    rewarded: bool = False  # a self-critical epoch, which does not aim at a low loss

    def trails(self, other: ValidatedEpoch) -> bool:
        """Whether the mean CIDEr is lower by more than the standard error of the difference.

        Few photos show nothing.
        """
        gaps = other.ciders - self.ciders
        count = len(gaps)
        if count < FEWEST_PHOTOS:
            return False
        return float(gaps.mean()) > float(gaps.std(ddof=1)) / math.sqrt(count)

    def tie_break(self) -> tuple[bool, float]:
        """What decides between epochs of equal CIDEr: larger is better.

        Self-critical epochs win over others. Among them the latest wins, else the lowest loss.
        """
        return self.rewarded, self.epoch if self.rewarded else -self.val_loss


class BestEpochTracker:
    """Decides after each epoch whether its model becomes the best one.

    The models of earlier epochs are gone by then, so only the newest can be chosen.
    """

    def __init__(self, *, by_loss: bool = False) -> None:
        """by_loss: ignore CIDEr; the lowest validation loss wins."""
        self._by_loss = by_loss
        self.best: ValidatedEpoch | None = None
        self._leader: ValidatedEpoch | None = None  # the highest mean CIDEr, which may be luck

    def update(self, newest: ValidatedEpoch) -> bool:
        """Take in the newest epoch. Returns whether its model is now the best one."""
        if self._is_best(newest):
            self.best = newest
            return True
        return False

    def _is_best(self, newest: ValidatedEpoch) -> bool:
        best = self.best
        if self._by_loss:
            return best is None or newest.val_loss < best.val_loss
        leader = self._leader
        if leader is None or newest.ciders.mean() > leader.ciders.mean():
            leader = self._leader = newest
        if newest.trails(leader):
            return False
        return best is None or best.trails(leader) or newest.tie_break() > best.tie_break()

    def state(self) -> dict[str, Any]:
        """Plain values and tensors, which `load` takes."""
        return {"best": _to_state(self.best), "leader": _to_state(self._leader)}

    def load(self, state: dict[str, Any]) -> None:
        self.best, self._leader = _from_state(state["best"]), _from_state(state["leader"])


def _to_state(epoch: ValidatedEpoch | None) -> dict[str, Any] | None:
    return None if epoch is None else {**vars(epoch), "ciders": torch.from_numpy(epoch.ciders)}


def _from_state(state: dict[str, Any] | None) -> ValidatedEpoch | None:
    return None if state is None else ValidatedEpoch(**{**state, "ciders": state["ciders"].numpy()})
