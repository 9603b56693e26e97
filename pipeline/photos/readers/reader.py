"""The work of a reader process: files into shared memory, as pixels or as they are."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
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
    read_photo,
    reading_fails,
)
from pipeline.photos.readers.memory import Layout, map_memory
from pipeline.photos.readers.task import FileInMemory, Loaded, Wanted, note
from train.allocator import keep_small_blocks


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

    def do(self, buffer: int, wanted: Sequence[Iterable[Any]]) -> tuple[Any, ...]:
        """Load photos: the fields of `Loaded`, with a file's place in the memory as its address.

        They are built-in types, which are sent several times as fast as others. Raises
        ShortageError.
        """
        loaded = Loaded(b"", {}, [], [], {})
        digests = [self._load(buffer, Wanted(*photo), loaded) for photo in wanted]
        files = {row: tuple(file) for row, file in loaded.files.items()}
        return b"".join(digests), *loaded[1:4], files

    def _load(self, buffer: int, wanted: Wanted, loaded: Loaded) -> bytes:
        """Load a photo and note it in `loaded`; the digest of its file."""
        path, out = Path(wanted.path), self._pixels(buffer, wanted)
        read = None
        if wanted.file and self._layout.file_bytes:
            start = self._layout.file_at(buffer, wanted.place)
            slot = self._memory[start : start + self._layout.file_bytes].data
            try:
                with open_file(path) as opened:
                    length = fill_from_file(opened, slot)
            except Exception as error:
                read = reading_fails(path, error)
            else:
                if length is not None:  # else it is too large for its slot
                    data = slot[:length]
                    size = gpu_size(read_header(data))
                    if size is not None and can_resize(*size, self._layout.views):
                        loaded.files[wanted.row] = FileInMemory(start, length, *size)
                        if not wanted.pixels:
                            return file_digest(data).tobytes()
                    read = photo_of(path, bytes(data), *self._kind, out)
        if read is None:
            read = read_photo(path, *self._kind, out)
        note(loaded, wanted.row, read)
        if read.pixels is None:
            out.zero_()
            loaded.files.pop(wanted.row, None)
        return read.digest.tobytes()

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
