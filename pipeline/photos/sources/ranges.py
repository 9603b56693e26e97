"""Files that are read from any place: local ones, and objects of a store by parts of them."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from typing import IO

from pipeline.photos.sources.errors import GO_ON, SourceError
from pipeline.photos.sources.places import is_address, without_secrets
from pipeline.photos.sources.remote import fetch, size_of

_MOST_OPEN = 64  # local containers; a process may open some hundred files
_BLOCK_BYTES = 1 << 20
_KEPT_BLOCKS = 4


class LocalFiles:
    """Local containers, opened when they are first read, for all threads of this process.

    Nothing of it is sent to other processes: each opens its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _Opened] = OrderedDict()

    def read(self, container: str, start: int, size: int) -> bytes:
        """Bytes of a container. Raises OSError, or SourceError if it is gone or shorter now."""
        opened = self._opened(container)
        try:
            parts = []
            while size:
                part = os.pread(opened.number, size, start)
                if not part:
                    raise SourceError(
                        f"{container}: is shorter than when the run began; {GO_ON} once it is whole"
                    )
                parts.append(part)
                start, size = start + len(part), size - len(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)
        finally:
            self._give_back(opened)

    def _opened(self, container: str) -> _Opened:
        with self._lock:
            opened = self._open.get(container)
            if opened is None:
                number = os.open(container, os.O_RDONLY | os.O_CLOEXEC)
                opened = self._open[container] = _Opened(number)
            self._open.move_to_end(container)
            opened.users += 1
            while len(self._open) > _MOST_OPEN:
                oldest, left = self._open.popitem(last=False)
                if left.users:  # all are in use, which takes more threads than there are
                    self._open[oldest] = left
                    break
                os.close(left.number)
            return opened

    def _give_back(self, opened: _Opened) -> None:
        with self._lock:
            opened.users -= 1
            if opened.forgotten and not opened.users:
                os.close(opened.number)

    def forget(self, container: str) -> None:
        """Open a container anew when it is read next: it may be another file by now."""
        with self._lock:
            opened = self._open.pop(container, None)
            if opened is not None and opened.users:
                opened.forgotten = True
            elif opened is not None:
                os.close(opened.number)


class _Opened:
    """An open file, and how many threads read it."""

    def __init__(self, number: int) -> None:
        self.number, self.users, self.forgotten = number, 0, False


class RemoteFile(io.RawIOBase):
    """An object of a store as a file to read and seek in. Only parts of it are held in memory.

    What is read in order is fetched in blocks; a jump fetches nothing of what lies between. Raises
    FileNotFoundError and SourceError.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._size = size_of(address)
        self._at = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def size(self) -> int:
        return self._size

    def read(self, size: int = -1) -> bytes:
        left = self._size - self._at
        size = max(0, left if size is None or size < 0 else min(size, left))
        if size >= _BLOCK_BYTES:  # as a column of a Parquet file
            data = fetch(self._address, self._at, size)
        else:
            first, last = self._at // _BLOCK_BYTES, (self._at + size) // _BLOCK_BYTES
            joined = b"".join(self._block(number) for number in range(first, last + 1))
            begin = self._at - first * _BLOCK_BYTES
            data = joined[begin : begin + size]
        self._at += len(data)
        return data

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        data = self.read(view.nbytes)
        view.cast("B")[: len(data)] = data
        return len(data)

    def _block(self, number: int) -> bytes:
        block = self._blocks.get(number)
        if block is None:
            start = number * _BLOCK_BYTES
            block = fetch(self._address, start, max(0, min(_BLOCK_BYTES, self._size - start)))
            self._blocks[number] = block
            if len(self._blocks) > _KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        return block


def open_container(container: str) -> IO[bytes]:
    """A container to read and seek in. Raises SourceError if it cannot be opened."""
    try:
        if is_address(container):
            return RemoteFile(container)  # type: ignore[return-value]
        return open(container, "rb")
    except OSError as error:
        reason = error.strerror or error
        raise SourceError(f"{without_secrets(container)}: cannot open ({reason})") from None
