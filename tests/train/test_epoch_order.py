from __future__ import annotations

import numpy as np

from train.captions.epoch_order import epoch_batches, epoch_views


def test_an_epoch_has_every_caption_once_with_its_like_in_length() -> None:
    lengths = np.random.default_rng(0).integers(3, 30, 10_000)
    batches = epoch_batches(lengths, 128, seed=1, epoch=2)
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(10_000))
    assert sorted({len(batch) for batch in batches}) == [10_000 % 128, 128]
    again = epoch_batches(lengths, 128, seed=1, epoch=2)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    other = epoch_batches(lengths, 128, seed=1, epoch=3)
    assert not all(np.array_equal(a, b) for a, b in zip(batches, other, strict=True))
    padded = sum(lengths[batch].max() * len(batch) for batch in batches)
    assert padded < 1.05 * lengths.sum()
    means = [lengths[batch].mean() for batch in batches]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.3  # no curriculum by accident


def test_views_are_drawn_anew_each_epoch() -> None:
    views = epoch_views(1000, 2, seed=0, epoch=0)
    assert views is not None
    assert 400 < views.sum() < 600
    others = epoch_views(1000, 2, seed=0, epoch=1)
    assert others is not None
    assert 400 < (views != others).sum() < 600
    assert epoch_views(1000, 1, seed=0, epoch=0) is None
