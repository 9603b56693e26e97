"""The order of an epoch whose photos do not fit into memory."""

from __future__ import annotations

import numpy as np
import pytest

from train.captions.streaming.window import (
    Layout,
    WindowedOrder,
    least_photos_in_memory,
    most_moved,
    window_layout,
)


def counts_of(kind: str, photos: int) -> np.ndarray:
    """Captions of each photo."""
    if kind == "one":
        return np.ones(photos, np.int64)
    if kind == "five":
        return np.full(photos, 5)
    return np.random.default_rng(0).integers(1, 9, photos)


@pytest.mark.parametrize("kind", ["one", "five", "mixed"])
@pytest.mark.parametrize(
    "layout",
    [Layout(1, 40), Layout(7, 8), Layout(16, 9), Layout(1000, 8), Layout(5, 9, 5), Layout(2, 8, 3)],
)
@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_an_epoch_has_every_item_once_in_full_batches(
    kind: str, layout: Layout, batch_size: int
) -> None:
    counts = counts_of(kind, 301)
    photo_of = np.repeat(np.arange(301), counts).astype(np.int32)
    order = WindowedOrder(photo_of, 301, layout, batch_size, np.ones(len(photo_of), np.int64))
    windows = list(order.windows(seed=1, epoch=2, views=3))
    blocks = -(-301 // layout.block_photos)
    if batch_size == 1:  # else a window may have less than a batch
        assert len(windows) == -(-blocks // layout.blocks) * layout.passes
    steps = [step for window in windows for step in window.steps]
    assert np.array_equal(
        np.sort(np.concatenate([items for items, _ in steps])), np.arange(len(photo_of))
    )
    sizes = sorted(len(items) for items, _ in steps)
    assert sizes[1:] == [batch_size] * (len(steps) - 1)
    assert len(steps) == len(order) == -(-len(photo_of) // batch_size)
    moved = most_moved(counts, batch_size, layout.passes)
    for window in windows:
        assert len(window.photos) <= layout.photos + moved
        items = np.concatenate([items for items, _ in window.steps])
        assert np.array_equal(window.photos, np.unique(photo_of[items]))
    for items, views in steps:
        assert views is not None
        assert len(views) == len(items)
        assert set(views.tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("layout", [Layout(3, 8), Layout(2, 2, 4)])
def test_an_epoch_can_be_begun_at_any_step(layout: Layout) -> None:
    counts = counts_of("mixed", 90)
    photo_of = np.repeat(np.arange(90), counts).astype(np.int32)
    lengths = np.random.default_rng(1).integers(2, 20, len(photo_of))
    order = WindowedOrder(photo_of, 90, layout, 8, lengths)
    whole = [step for w in order.windows(seed=0, epoch=0, views=2) for step in w.steps]
    for first in range(len(whole)):
        windows = list(order.windows(seed=0, epoch=0, views=2, first_step=first))
        rest = [step for window in windows for step in window.steps]
        assert len(rest) == len(whole) - first
        for (items, views), (same_items, same_views) in zip(rest, whole[first:], strict=True):
            assert np.array_equal(items, same_items)
            assert views is not None
            assert same_views is not None
            assert np.array_equal(views, same_views)
        first_items = np.concatenate([items for items, _ in windows[0].steps])
        assert np.isin(photo_of[first_items], windows[0].photos).all()


def test_epochs_and_seeds_differ_and_repeat() -> None:
    photo_of = np.repeat(np.arange(200), 5).astype(np.int32)
    order = WindowedOrder(photo_of, 200, Layout(2, 16), 10, np.ones(1000, np.int64))

    def items(seed: int, epoch: int) -> list[int]:
        windows = order.windows(seed=seed, epoch=epoch, views=1)
        return [n for window in windows for chosen, _ in window.steps for n in chosen.tolist()]

    assert items(0, 0) == items(0, 0)
    assert items(0, 0) != items(0, 1)
    assert items(0, 0) != items(1, 0)
    windows = list(order.windows(seed=0, epoch=0, views=1))
    assert all(views is None for window in windows for _, views in window.steps)
    # A window has blocks from all over the cache, and batches are not photo after photo.
    for window in windows[:-1]:
        assert np.ptp(window.photos) > 100
        assert all(len(np.unique(photo_of[chosen])) > 3 for chosen, _ in window.steps)


def test_captions_of_similar_length_share_a_batch() -> None:
    random = np.random.default_rng(0)
    photo_of = np.repeat(np.arange(2000), 5).astype(np.int32)
    lengths = random.integers(3, 30, 10_000)
    order = WindowedOrder(photo_of, 2000, Layout(10, 20), 32, lengths)
    steps = [s for w in order.windows(seed=0, epoch=0, views=1) for s, _ in w.steps]
    padded = sum(lengths[items].max() * len(items) for items in steps)
    assert padded < 1.1 * lengths.sum()
    means = [lengths[items].mean() for items in steps]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.3


def test_at_most_less_than_a_batch_moves_to_the_next_window() -> None:
    assert most_moved(np.full(100, 5), 128) == 26  # 25 photos and a part of one
    assert most_moved(np.ones(1000, np.int64), 128) == 127
    assert most_moved(np.array([200, 200]), 128) == 1
    assert most_moved(np.array([1, 2]), 128) == 2
    assert most_moved(np.array([5, 5]), 1) == 1


def test_the_captions_of_a_photo_are_in_different_passes() -> None:
    photo_of = np.repeat(np.arange(40), 4).astype(np.int32)
    order = WindowedOrder(photo_of, 40, Layout(2, 5, 4), 10)
    steps = [s for w in order.windows(seed=0, epoch=0, views=1) for s, _ in w.steps]
    items = np.concatenate(steps)
    passes = [items[start : start + 40] for start in range(0, 160, 40)]
    assert all(len(np.unique(photo_of[items])) == 40 for items in passes)
    # Not the first captions of all photos first.
    assert all(len(np.unique(items % 4)) == 4 for items in passes)


def test_a_layout_has_blocks_of_a_few_megabytes() -> None:
    five = np.full(6000, 5)
    layout = window_layout(400_000, 2560, five, 128)
    assert layout == Layout(1638, 122)
    assert layout is not None
    assert 4.1e6 < layout.block_photos * 2560 <= 4 << 20
    assert window_layout(60, 5120, five, 128) is None
    for captions in (five, np.ones(1000, np.int64), counts_of("mixed", 900)):
        for batch in (1, 8, 100, 128):
            least = least_photos_in_memory(captions, batch)
            small = window_layout(least, 2560, captions, batch)
            assert small is not None
            # All blocks but the last one, which may have a single photo, are enough for a batch.
            assert (small.blocks - 1) * small.block_photos + 1 >= batch
            assert 2 * (small.photos + most_moved(captions, batch, small.passes)) <= least


def test_small_windows_take_several_passes() -> None:
    five = np.full(6000, 5)
    assert window_layout(600, 5120, five, 128) == Layout(21, 8, 5)
    passes = [
        layout.passes
        for photos in (600, 6_000, 12_000, 24_000, 48_000)
        if (layout := window_layout(photos, 5120, five, 128))
    ]
    assert passes == [5, 5, 3, 2, 1]
    # Too few photos for 127 that move on.
    assert window_layout(450, 5120, five, 128) == Layout(24, 8, 1)
    hundreds = window_layout(600, 5120, np.full(60, 700), 128)
    assert hundreds is not None
    assert hundreds.passes == 8
