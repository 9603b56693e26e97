"""The order of an epoch whose photos do not fit into memory: windows of blocks.

Photos are cut into blocks that follow one another in the cache. An epoch shuffles the blocks and
takes several at a time, a window. What is trained on (captions, or photos in self-critical epochs;
*items* here) is shuffled within its window. Batches are all full but the last one, as if everything
were in memory: items of a window that do not fill a batch move to the next window, and take their
photos with them.

All captions of a few photos, one soon after the other, would make the model fit these photos. So if
windows are small, an epoch goes through the photos in several passes, each with other captions.

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
# So many photos between two captions of one, or more, are taken for enough. With 272 and one pass,
# the loss after an epoch of Flickr8k was higher by several times its noise.
_PHOTOS_BETWEEN = 1 << 14
_MOST_PASSES = 8  # each reads all features
# What the random numbers are for, beside the seed and the epoch. `epoch_order` has 1, others 2, 3.
_BLOCKS, _ITEMS, _VIEWS, _PASSES = 4, 5, 6, 7


@dataclass(frozen=True)
class Layout:
    """How an epoch goes through the photos. Its order depends on it."""

    block_photos: int
    blocks: int  # of a window
    passes: int = 1  # through all photos

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


def window_layout(
    photos_in_memory: int, photo_bytes: int, captions: NDArray[np.int64], batch_size: int
) -> Layout | None:
    """The layout for so many photos in memory, of which half are trained on while the others are
    read. None if these are too few for a batch in each window.

    captions: (P,) the number of captions of each photo. batch_size: the larger one, of captions and
    of photos in self-critical epochs.
    """
    for passes in range(min(_MOST_PASSES, round(captions.mean())), 0, -1):
        photos = photos_in_memory // 2 - most_moved(captions, batch_size, passes)
        block = min(max(1, _BLOCK_BYTES // photo_bytes), photos // _LEAST_BLOCKS)
        if block < 1:
            continue
        layout = Layout(block, photos // block, passes)
        # The last block may have a single photo.
        enough = (layout.blocks - 1) * block + 1 >= batch_size
        if enough and (passes - 1) * layout.photos < _PHOTOS_BETWEEN:
            return layout
    return None


def least_photos_in_memory(captions: NDArray[np.int64], batch_size: int) -> int:
    """A number of photos in memory for which `window_layout` finds a layout."""
    blocks = -(-2 * batch_size // _LEAST_BLOCKS)
    return 2 * (most_moved(captions, batch_size) + blocks * _LEAST_BLOCKS)


def most_moved(captions: NDArray[np.int64], batch_size: int, passes: int = 1) -> int:
    """The most photos whose items may move to the next window: less than a batch of items.

    captions: (P,) the number of items of each photo, at least 1.
    """
    if passes > 1:  # a pass may have one caption of a photo
        return min(len(captions), batch_size - 1)
    fewest = np.sort(captions)[:batch_size]
    # The last one may leave some of its items behind.
    return min(len(captions), int(np.searchsorted(np.cumsum(fewest), batch_size - 1)) + 1)


class _Epoch:
    """Which items each window of an epoch has, by the number of the window."""

    def __init__(self, order: WindowedOrder, seed: int, epoch: int) -> None:
        layout, starts = order.layout, order.starts
        self._order, self._key = order, (seed, epoch)
        random = np.random.default_rng((seed, epoch, _PASSES))
        passes = layout.passes
        # Item i of a photo is in pass (i + shift) % passes.
        self._shifts = random.integers(passes, size=len(starts) - 1, dtype=np.uint8)
        random = np.random.default_rng((seed, epoch, _BLOCKS))
        self._windows: list[tuple[int, NDArray[np.int64]]] = []  # (pass, its blocks)
        sizes: list[int] = []
        counts = np.diff(starts)
        for number in range(passes):
            # Of each photo: captions in all passes alike, and one more in some.
            further = (number - self._shifts.astype(np.int64)) % passes < counts % passes
            own = np.add.reduceat(counts // passes + further, order.edges[:-1])
            blocks = random.permutation(len(own))
            for start in range(0, len(blocks), layout.blocks):
                group = blocks[start : start + layout.blocks]
                self._windows.append((number, group))
                sizes.append(int(own[group].sum()))
        ends = np.cumsum(sizes)
        # Items that move on from each window, and the first step of each.
        self.moving: list[int] = [*(ends[:-1] % order.batch_size).tolist(), 0]
        self.first_steps: list[int] = [0, *(ends[:-1] // order.batch_size).tolist()]

    def __len__(self) -> int:
        return len(self._windows)

    def window_of(self, step: int) -> int:
        """The window that a step is in."""
        return int(np.searchsorted(self.first_steps, step, "right")) - 1

    def moved_from(self, number: int) -> NDArray[np.int64]:
        """The items that move on from a window; none before the first one."""
        if number < 0:
            return np.zeros(0, np.int64)
        own = self.items(number)
        if len(own) < self.moving[number]:
            own = np.concatenate([self.moved_from(number - 1), own])
        return own[len(own) - self.moving[number] :]

    def items(self, number: int) -> NDArray[np.int64]:
        """The items of a window's own blocks, photo after photo, so that those that move belong to
        few photos.
        """
        starts, edges, passes = self._order.starts, self._order.edges, self._order.layout.passes
        in_pass, blocks = self._windows[number]
        photos = np.concatenate([np.arange(*edges[block : block + 2]) for block in blocks])
        photos = _random((*self._key, number), _ITEMS).permutation(photos)
        counts = starts[photos + 1] - starts[photos]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        items = within + np.repeat(starts[photos], counts)
        chosen = (within + np.repeat(self._shifts[photos], counts)) % passes == in_pass
        own: NDArray[np.int64] = items[chosen]
        return own


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
        self._photo_of, self.layout, self.batch_size = photo_of, layout, batch_size
        self._lengths = lengths
        # (P + 1,) where each photo's items begin.
        self.starts = np.searchsorted(photo_of, np.arange(photos + 1)).astype(np.int64)
        self._blocks = -(-photos // layout.block_photos)
        edges = np.minimum(np.arange(self._blocks + 1) * layout.block_photos, photos)
        self.edges = edges  # (blocks + 1,) where each block's photos begin

    def __len__(self) -> int:
        """Steps of an epoch."""
        return -(-len(self._photo_of) // self.batch_size)

    def windows(
        self, *, seed: int, epoch: int, views: int, first_step: int = 0
    ) -> Generator[Window, None, None]:
        """The windows of an epoch from a step on. views: of a photo, one of which is chosen at
        random; 1: always the full one.
        """
        made = _Epoch(self, seed, epoch)
        first = made.window_of(first_step)
        moved = made.moved_from(first - 1)
        for number in range(first, len(made)):
            items = np.concatenate([moved, made.items(number)])
            kept, moved = np.split(items, [len(items) - made.moving[number]])
            skipped = max(0, first_step - made.first_steps[number])
            if len(kept):
                yield self._window(kept, (seed, epoch, number), views, skipped)

    def _window(
        self, items: NDArray[np.int64], key: tuple[int, int, int], views: int, skipped: int
    ) -> Window:
        random = _random(key, _VIEWS)
        items = random.permutation(items)
        if self._lengths is not None:
            batches = in_batches_of_similar_length(items, self._lengths, self.batch_size, random)
        else:
            starts = range(0, len(items), self.batch_size)
            batches = [items[start : start + self.batch_size] for start in starts]
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
