"""The memory that reader processes share with the process that they read for.

It holds the pixels of a few batches and the files that a GPU will decode. It has no name in any
file system, so nothing is left behind, however the processes end. Pages that are never written take
no memory, so there may be room for much larger files than come.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.share import memory_bytes

BUFFERS = 10  # batches that may be on their way at once
_PAGE = 4096
_MEAN_FILE_BYTES = 384 << 10  # of a JPEG that a GPU decodes; COCO's have 163 kB
_MOST_FILE_BYTES = 4 << 20  # readers decode what is larger
_SHARE_OF_MEMORY = 1 / 16  # for the files of all buffers, at the most


@dataclass(frozen=True)
class Layout:
    """Where the photos of each buffer are. All sizes are in bytes.

    A buffer is the pixels of its batch, (R, V, S, S, 3) uint8, then room for their files, one after
    the other, and then a slot for each file that the room was too small for. A GPU copies faster
    from memory that is pinned; this is done to the pixels and the room, because it takes as much
    memory as if everything had been written to.
    """

    batch_rows: int
    views: tuple[str, ...]
    image_size: int
    room_bytes: int  # for files, of one photo
    slot_bytes: int
    filter: str  # see `preprocess`

    @classmethod
    def of(
        cls,
        batch_rows: int,
        views: tuple[str, ...],
        image_size: int,
        *,
        files: bool,
        filter: str,
    ) -> Layout:
        """files: whether there is memory for files at all."""
        share = int(memory_bytes() * _SHARE_OF_MEMORY) // (BUFFERS * batch_rows)
        slot, room = (
            min(most, share // _PAGE * _PAGE) if files else 0
            for most in (_MOST_FILE_BYTES, _MEAN_FILE_BYTES)
        )
        return cls(batch_rows, views, image_size, room, slot, filter)

    @property
    def photo_bytes(self) -> int:
        return len(self.views) * self.image_size**2 * 3

    @property
    def pixel_bytes(self) -> int:
        return -(-self.batch_rows * self.photo_bytes // _PAGE) * _PAGE

    @property
    def pinned_bytes(self) -> int:
        return self.pixel_bytes + self.batch_rows * self.room_bytes

    @property
    def buffer_bytes(self) -> int:
        return self.pinned_bytes + self.batch_rows * self.slot_bytes

    def pixels_at(self, buffer: int) -> int:
        return buffer * self.buffer_bytes

    def photo_at(self, buffer: int, place: int) -> int:
        return self.pixels_at(buffer) + place * self.photo_bytes

    def room_at(self, buffer: int, place: int) -> int:
        """Where the room begins that photos from this place on may use."""
        return self.pixels_at(buffer) + self.pixel_bytes + place * self.room_bytes

    def slot_at(self, buffer: int, place: int) -> int:
        return self.pixels_at(buffer) + self.pinned_bytes + place * self.slot_bytes


def map_memory(descriptor: int, layout: Layout) -> NDArray[np.uint8]:
    """All of the memory, (BUFFERS × buffer_bytes,) uint8, mapped into this process."""
    size = BUFFERS * layout.buffer_bytes
    if os.fstat(descriptor).st_size < size:
        os.truncate(descriptor, size)
    return np.frombuffer(mmap.mmap(descriptor, size), np.uint8)
