"""The best epoch: CIDEr decides if the difference is significant, otherwise the loss does."""

from __future__ import annotations

import numpy as np
import pytest

from train.fit.best_epoch import BestEpochTracker, ValidatedEpoch

_NOISE = np.random.default_rng(0).normal(0, 1, 100)  # the standard error of its mean is 0.1


def judged(epoch: int, loss: float, mean: float, *, rewarded: bool = False) -> ValidatedEpoch:
    """A validated epoch. Its photos' scores differ from the previous epoch's by twice the noise."""
    ciders = mean + (_NOISE - _NOISE.mean()) * (-1) ** epoch
    return ValidatedEpoch(epoch, loss, ciders, rewarded)


def chosen(*epochs: ValidatedEpoch, by_loss: bool = False) -> list[int]:
    """The best epoch so far, after each of these epochs."""
    tracker, best = BestEpochTracker(by_loss=by_loss), []
    for one in epochs:
        is_best = tracker.update(one)
        assert tracker.best is not None
        assert is_best == (tracker.best is one)
        best.append(tracker.best.epoch)
    return best


def test_a_clearly_higher_cider_wins_whatever_the_loss() -> None:
    assert chosen(judged(0, 2.0, 1.0), judged(1, 3.0, 2.0), judged(2, 1.0, 1.0)) == [0, 1, 1]


def test_where_the_photos_cannot_tell_the_loss_decides() -> None:
    # The photos' scores differ by ±2, the means by 0.1: less than the standard error of 0.2.
    lucky, later = judged(0, 3.0, 1.1), judged(1, 2.9, 1.0)
    assert chosen(lucky, later) == [0, 1]
    assert chosen(lucky, judged(1, 3.1, 1.0)) == [0, 0]
    assert chosen(judged(0, 2.9, 1.0), judged(1, 3.0, 1.1)) == [0, 0]


def test_what_is_compared_are_the_photos_not_the_means() -> None:
    # The means differ as before, but now every photo's scores differ by just as much.
    assert chosen(judged(0, 3.0, 1.1), judged(2, 2.9, 1.0)) == [0, 0]


def test_small_steps_down_do_not_add_up() -> None:
    falling = [judged(n, 3.0 - n / 10, 2.0 - 0.15 * n) for n in range(6)]
    # Each is within the error of its predecessor, but only the first two within that of the best.
    assert chosen(*falling)[-1] == 1


def test_one_that_falls_behind_a_new_leader_gives_way() -> None:
    first, leader = judged(0, 2.0, 1.0), judged(1, 3.0, 1.1)
    assert chosen(first, leader, judged(2, 3.0, 1.5)) == [0, 0, 2]


def test_rewarded_epochs_do_not_mind_the_loss() -> None:
    crossed = judged(0, 2.0, 1.0)
    rewarded = [judged(n, 2.0 + n, 1.0, rewarded=True) for n in (1, 2)]
    assert chosen(crossed, *rewarded) == [0, 1, 2]
    assert chosen(crossed, judged(1, 1.0, 0.5, rewarded=True)) == [0, 0]


@pytest.mark.parametrize(("photos", "expected"), [(1, [0, 1, 1, 3]), (49, [0, 1, 1, 3])])
def test_of_few_photos_the_loss_decides(photos: int, expected: list[int]) -> None:
    def of(epoch: int, loss: float, cider: float) -> ValidatedEpoch:
        return ValidatedEpoch(epoch, loss, np.full(photos, cider))

    assert chosen(of(0, 3.0, 1.0), of(1, 2.0, 0.1), of(2, 2.5, 5.0), of(3, 1.9, 0.0)) == expected


def test_of_fifty_photos_the_cider_decides() -> None:
    lucky, worse = (ValidatedEpoch(n, 3.0 - n, np.full(50, 1.0 - n / 10)) for n in (0, 1))
    assert chosen(lucky, worse) == [0, 0]


def test_the_last_self_critical_epoch_wins_where_photos_are_few() -> None:
    few = [ValidatedEpoch(n, 2.0 + n, np.zeros(9), rewarded=n > 0) for n in (0, 1, 2)]
    assert chosen(*few) == [0, 1, 2]


@pytest.mark.parametrize("by_loss", [False, True])
def test_by_the_loss_alone_and_after_a_pause(by_loss: bool) -> None:
    epochs = [judged(0, 3.0, 1.0), judged(1, 2.0, 0.1), judged(2, 2.5, 1.1), judged(3, 2.4, 3.0)]
    expected = [0, 1, 1, 1] if by_loss else [0, 0, 2, 3]
    assert chosen(*epochs, by_loss=by_loss) == expected
    tracker = BestEpochTracker(by_loss=by_loss)
    for one, best in zip(epochs, expected, strict=True):
        resumed = BestEpochTracker(by_loss=by_loss)
        resumed.load(tracker.state())
        tracker = resumed
        tracker.update(one)
        assert tracker.best is not None
        assert tracker.best.epoch == best
