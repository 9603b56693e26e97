"""Reads one window of photos while another is trained on."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.store import FeatureCache
from cache.verify import check_features
from train.captions.streaming.held import HeldFeatures
from train.captions.streaming.window import Layout, Window

_PIECE_BYTES = 4 << 20  # read and checked at a time, so that closing never waits long


class FeatureStream:
    """The features of a training set of which two windows are in memory at a time.

    On a CPU, files are read straight to where training takes them from. On a GPU, they are read to
    pinned memory of the size of a window and copied by a stream of their own.
    """

    def __init__(
        self,
        cache: FeatureCache,
        photos: NDArray[np.int64],
        layout: Layout,
        most_moved: int,
        device: torch.device,
    ) -> None:
        """photos: (P,) ascending rows of the cache. most_moved: as `window.most_moved`, of all
        orders that are streamed. Raises torch.OutOfMemoryError or RuntimeError if memory is short.
        """
        self.layout, self.device = layout, device
        self.window_photos = layout.photos + most_moved
        self._cache = cache
        shape = (self.window_photos, *cache.features.shape[1:])
        self._piece = max(1, _PIECE_BYTES // max(1, 2 * shape[1] * shape[2]))
        self._pinned: Tensor | None = None
        self._copies: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._pinned = torch.zeros(shape, dtype=torch.float16, pin_memory=True)
            self._copies = torch.cuda.Stream(device)
        host_slots = np.full(len(photos), -1, np.int32)
        slots = torch.from_numpy(host_slots)
        self.held = HeldFeatures(
            photos=photos,
            features=torch.zeros((2 * shape[0], *shape[1:]), dtype=torch.float16, device=device),
            # A GPU has a copy, whose places of photos that are not held are not read.
            slots=slots.clamp_min(0).to(device) if device.type == "cuda" else slots,
            host_slots=host_slots,
        )
        self._placed = np.zeros(0, np.int64)  # the photos that are held
        self._checked = np.zeros(len(photos), bool)
        self._stopped = threading.Event()

    @property
    def size_bytes(self) -> int:
        """Of the features in memory: on a GPU, half as much is on the host, too."""
        return self.held.features.nbytes

    def through(self, windows: Iterator[Window]) -> Generator[Window, None, None]:
        """Each window once its photos are held. Closing the generator ends the reading.

        Raises CacheError if a row cannot be read, or is damaged when it is first read.
        """
        self._stopped.clear()
        reader = ThreadPoolExecutor(1, "window")
        half = 0
        try:
            reading = self._begin(reader, windows, half)
            while (window := reading.result()) is not None:
                self._place(window.photos, half)
                half = 1 - half
                reading = self._begin(reader, windows, half)
                yield window
        finally:
            self._stopped.set()
            reader.shutdown(wait=True, cancel_futures=True)

    def _begin(
        self, reader: ThreadPoolExecutor, windows: Iterator[Window], half: int
    ) -> Future[Window | None]:
        """Let the thread read the next window into a half of the memory."""
        done: torch.cuda.Event | None = None
        if self._copies is not None:
            # The steps queued so far, which may still read that half.
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self.device))
        return reader.submit(self._read, windows, half, done)

    def _read(
        self, windows: Iterator[Window], half: int, done: torch.cuda.Event | None
    ) -> Window | None:
        """Read a window, unless it is stopped or there is none. done: the half is free then."""
        window = next(windows, None)
        if window is None:
            return None
        target = self.held.features[half * self.window_photos :][: len(window.photos)]
        host = (target if self._pinned is None else self._pinned[: len(target)]).numpy()
        for start in range(0, len(host), self._piece):
            if self._stopped.is_set():
                return None
            photos = window.photos[start : start + self._piece]
            rows, features = self.held.photos[photos], host[start : start + len(photos)]
            self._cache.read_rows(rows, out=features)
            new = ~self._checked[photos]
            if new.any():
                check_features(self._cache, rows[new], features[new])
                self._checked[photos] = True
        if self._pinned is not None and self._copies is not None and done is not None:
            with torch.cuda.stream(self._copies):
                self._copies.wait_event(done)
                target.copy_(self._pinned[: len(target)], non_blocking=True)
            self._copies.synchronize()
        return window

    def _place(self, photos: NDArray[np.int64], half: int) -> None:
        """Let the slots be those of a window that has been read."""
        held = self.held
        held.host_slots[self._placed] = -1
        slots = np.arange(len(photos), dtype=np.int32) + np.int32(half * self.window_photos)
        held.host_slots[photos] = slots
        self._placed = photos
        if self.device.type == "cuda":
            chosen, there = torch.from_numpy(photos), torch.from_numpy(slots)
            held.slots.index_copy_(0, chosen.to(self.device), there.to(self.device))
