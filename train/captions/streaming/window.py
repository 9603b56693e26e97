"""The order of an epoch whose photos do not fit into memory: windows of blocks.

Photos are cut into blocks that follow one another in the cache. An epoch shuffles the blocks and
takes several at a time, a window. What is trained on (captions, or photos in self-critical epochs;
*items* here) is shuffled within its window. Batches are all full but the last one, as if everything
were in memory: items of a window that do not fill a batch move to the next window, and take their
photos with them.

Everything follows from the seed, the epoch and the layout alone, so a resumed run needs no saved
order, and finds its window without going through those before.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.captions.epoch_order import in_batches_of_similar_length

_BLOCK_BYTES = 4 << 20  # read at once; more would gain nothing, even on a disk that turns
_LEAST_BLOCKS = 8  # of a window: with few, a window is no random sample of the photos
# What the random numbers are for, beside the seed and the epoch. `epoch_order` has 1, others 2, 3.
_BLOCKS, _ITEMS, _VIEWS = 4, 5, 6


@dataclass(frozen=True)
class Layout:
    """How photos are cut into blocks and windows. The order of an epoch depends on it."""

    block_photos: int
    blocks: int  # of a window

    @property
    def photos(self) -> int:
        """Of a window, without those that move to it from the one before."""
        return self.block_photos * self.blocks


@dataclass(frozen=True)
class Window:
    """What is trained on while some photos are in memory."""

    photos: NDArray[np.int64]  # (p,) ascending, numbers among the photos trained on
    # For each step: items (B,), and the view of each one's photo (B,), or None for the full one.
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64] | None]]


def window_layout(photos_in_memory: int, photo_bytes: int, moved: int) -> Layout | None:
    """The layout for so many photos in memory, of which half are trained on while the others are
    read. None if they are too few.

    moved: the most photos that may move from a window to the next, see `most_moved`.
    """
    photos = photos_in_memory // 2 - moved
    block = min(max(1, _BLOCK_BYTES // photo_bytes), photos // _LEAST_BLOCKS)
    return Layout(block, photos // block) if block else None


def least_photos_in_memory(batch_size: int, moved: int) -> int:
    """The fewest photos in memory with which every window has enough for a batch.

    A window may have the last block, which may have a single photo.
    """
    return 2 * (moved + -(-2 * batch_size // _LEAST_BLOCKS) * _LEAST_BLOCKS)


def most_moved(items: NDArray[np.int64], batch_size: int) -> int:
    """The most photos whose items may move to the next window: less than a batch of items.

    items: (P,) the number of items of each photo, at least 1.
    """
    fewest = np.sort(items)[:batch_size]
    # The last one may leave some of its items behind.
    return min(len(items), int(np.searchsorted(np.cumsum(fewest), batch_size - 1)) + 1)


class WindowedOrder:
    """The windows of every epoch."""

    def __init__(
        self,
        photo_of: NDArray[np.int32],
        photos: int,
        layout: Layout,
        batch_size: int,
        lengths: NDArray[np.int64] | None = None,
    ) -> None:
        """photo_of: (I,) the photo of each item, ascending; each of the P photos has one or more.
        lengths: (I,) of items that share a batch with those of similar length.
        """
        self._photo_of, self._layout, self._batch_size = photo_of, layout, batch_size
        self._lengths = lengths
        # (P + 1,) where each photo's items begin.
        self._starts = np.searchsorted(photo_of, np.arange(photos + 1)).astype(np.int64)
        self._blocks = -(-photos // layout.block_photos)
        edges = np.minimum(np.arange(self._blocks + 1) * layout.block_photos, photos)
        self._edges = edges  # (blocks + 1,) where each block's photos begin
        self._block_items = np.diff(self._starts[edges])

    def __len__(self) -> int:
        """Steps of an epoch."""
        return -(-len(self._photo_of) // self._batch_size)

    def windows(
        self, *, seed: int, epoch: int, views: int, first_step: int = 0
    ) -> Generator[Window, None, None]:
        """The windows of an epoch from a step on. views: of a photo, one of which is chosen at
        random; 1: always the full one.
        """
        random = np.random.default_rng((seed, epoch, _BLOCKS))
        order = random.permutation(self._blocks)
        starts = range(0, self._blocks, self._layout.blocks)
        groups = [order[start : start + self._layout.blocks] for start in starts]
        ends = np.cumsum([int(self._block_items[group].sum()) for group in groups])  # in items
        last = len(groups) - 1
        # Items that move on from each window, and the first step of each.
        moving = np.where(np.arange(len(groups)) < last, ends % self._batch_size, 0)
        first_steps = np.concatenate([[0], ends[:-1] // self._batch_size])
        first = int(np.searchsorted(first_steps, first_step, "right")) - 1
        moved = np.zeros(0, np.int64)
        if first:
            moved = self._items(groups[first - 1], (seed, epoch, first - 1), moving)[1]
        for number in range(first, len(groups)):
            kept, moving_on = self._items(groups[number], (seed, epoch, number), moving)
            items = np.concatenate([moved, kept])
            moved = moving_on
            skipped = max(0, first_step - int(first_steps[number]))
            yield self._window(items, (seed, epoch, number), views, skipped)

    def _items(
        self, blocks: NDArray[np.int64], key: tuple[int, int, int], moving: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(the items of a window's own blocks that stay, those that move to the next window)."""
        random = _random(key, _ITEMS)
        photos = np.concatenate([np.arange(*self._edges[block : block + 2]) for block in blocks])
        photos = random.permutation(photos)
        counts = self._starts[photos + 1] - self._starts[photos]
        # Photo after photo, so that those that move belong to few photos.
        ends = np.cumsum(counts)
        items = np.arange(ends[-1]) + np.repeat(self._starts[photos] - (ends - counts), counts)
        kept = len(items) - int(moving[key[2]])
        return items[:kept], items[kept:]

    def _window(
        self, items: NDArray[np.int64], key: tuple[int, int, int], views: int, skipped: int
    ) -> Window:
        random = _random(key, _VIEWS)
        items = random.permutation(items)
        if self._lengths is not None:
            batches = in_batches_of_similar_length(items, self._lengths, self._batch_size, random)
        else:
            starts = range(0, len(items), self._batch_size)
            batches = [items[start : start + self._batch_size] for start in starts]
        chosen = [
            None if views == 1 else random.integers(views, size=len(batch)) for batch in batches
        ]
        steps = list(zip(batches, chosen, strict=True))[skipped:]
        needed = np.concatenate([batch for batch, _ in steps]) if steps else items[:0]
        return Window(np.unique(self._photo_of[needed]).astype(np.int64), steps)


def _random(key: tuple[int, int, int], what: int) -> np.random.Generator:
    seed, epoch, window = key
    # Not 0 at the end, since NumPy's seeds (1, 2) and (1, 2, 0) are the same.
    return np.random.default_rng((seed, epoch, what, window + 1))
