"""The work of a reader process: files into shared memory, as pixels or as they are."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from cache.errors import CapError
from pipeline.photos.gpu.resize import can_resize
from pipeline.photos.jpeg_header import gpu_size, read_header
from pipeline.photos.photo_file import (
    file_digest,
    fill_from_file,
    open_file,
    photo_of,
    read_file,
    read_photo,
    reading_fails,
)
from pipeline.photos.readers.memory import Layout, map_memory
from pipeline.photos.readers.task import FileInMemory, Loaded, Wanted, note
from pipeline.photos.sources.ahead import Fetched
from pipeline.photos.sources.reading import begin_reading
from train.allocator import keep_small_blocks

_ALIGNMENT = 256  # bytes; of files in the memory
_NICENESS = 5


def serve(connection: Connection, memory: int) -> None:
    """Do the tasks that come from the connection, until it is closed. memory: its descriptor."""
    torch.set_num_threads(1)
    keep_small_blocks()
    reader: Reader | None = None
    while True:
        try:
            message = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        if isinstance(message, Layout):
            reader = Reader(message, memory)
            continue
        assert reader is not None
        try:
            answer: object = reader.do(*message)
        except CapError as error:
            answer = error
        except BaseException as error:  # a defect: the parent shows where
            answer = RuntimeError("".join(traceback.format_exception(error)))
        try:
            connection.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            return


class Reader:
    """Loads photos into the buffers of a memory."""

    def __init__(self, layout: Layout, memory: int) -> None:
        self._layout = layout
        self._memory = map_memory(memory, layout)
        if layout.slot_bytes:
            os.nice(_NICENESS)  # the threads that feed the GPU come first

    def do(self, buffer: int, wanted: Sequence[Iterable[Any]]) -> tuple[Any, ...]:
        """Load photos: the fields of `Loaded`, with a file's place in the memory as its address.

        They are built-in types, which are sent several times as fast as others. Raises
        ShortageError or SourceError.
        """
        loaded = Loaded(b"", {}, [], [], {})
        photos = [Wanted(*photo) for photo in wanted]
        room = _Room(
            self._layout.room_at(buffer, photos[0].place),
            self._layout.room_at(buffer, photos[-1].place + 1),
        )
        fetched = begin_reading([photo.path for photo in photos])
        try:
            digests = [self._load(buffer, photo, room, loaded, fetched) for photo in photos]
        finally:
            if fetched is not None:
                fetched.close()
        files = {row: tuple(file) for row, file in loaded.files.items()}
        return b"".join(digests), *loaded[1:4], files

    def _load(
        self,
        buffer: int,
        wanted: Wanted,
        room: _Room,
        loaded: Loaded,
        fetched: Fetched | None,
    ) -> bytes:
        """Load a photo and note it in `loaded`; the digest of its file."""
        path, out = wanted.path, self._pixels(buffer, wanted)
        read = None
        if wanted.file and self._layout.slot_bytes:
            slot = self._layout.slot_at(buffer, wanted.place)
            try:
                if isinstance(path, str):
                    with open_file(path) as opened:
                        # One byte more, because only then the end of a file is seen.
                        size = os.fstat(opened.fileno()).st_size + 1
                        start, memory = self._space(room, slot, size)
                        length = fill_from_file(opened, memory)
                else:
                    file = read_file(path, fetched=fetched)
                    start, memory = self._space(room, slot, len(file))
                    length = len(file) if len(file) <= len(memory) else None
                    if length is not None:
                        memory[:length] = file
            except Exception as error:
                read = reading_fails(path, error)
            else:
                if length is not None:  # else it is too large, or growing
                    data = memory[:length]
                    shape = gpu_size(read_header(data))
                    if shape is not None and can_resize(*shape, self._layout.views):
                        loaded.files[wanted.row] = FileInMemory(start, length, *shape)
                        if not wanted.pixels:
                            return file_digest(data).tobytes()
                    read = photo_of(path, bytes(data), *self._kind, out, self._layout.filter)
        if read is None:
            read = read_photo(path, *self._kind, out, self._layout.filter, fetched)
        note(loaded, wanted.row, read)
        if read.pixels is None:
            out.zero_()
            loaded.files.pop(wanted.row, None)
        return read.digest.tobytes()

    def _space(self, room: _Room, slot: int, size: int) -> tuple[int, memoryview]:
        """(where a file of this size goes, the memory there, which may be too small)."""
        start = room.take(size) or slot
        size = size if start != slot else self._layout.slot_bytes
        return start, self._memory[start : start + size].data

    @property
    def _kind(self) -> tuple[int, tuple[str, ...]]:
        return self._layout.image_size, self._layout.views

    def _pixels(self, buffer: int, wanted: Wanted) -> torch.Tensor:
        """(V, 3, S, S) uint8, channels last in memory, of one place."""
        size, views = self._kind
        start = self._layout.photo_at(buffer, wanted.place)
        photo = self._memory[start : start + self._layout.photo_bytes]
        pixels = torch.from_numpy(photo).view(len(views), size, size, 3)
        return pixels.permute(0, 3, 1, 2)


@dataclass
class _Room:
    """The room for the files of a task."""

    next: int
    end: int

    def take(self, size: int) -> int:
        """Where `size` bytes are free; 0 if they are not."""
        start = self.next
        if start + size > self.end:
            return 0
        self.next = -(-(start + size) // _ALIGNMENT) * _ALIGNMENT
        return start
