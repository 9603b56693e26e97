"""Small copies of photos, made by threads while their captions are computed.

A thumbnail is the photo as the network's readers decode it: upright, in RGB, without the metadata
of its file. The budgets of memory are those of the readers.
"""

from __future__ import annotations

import contextlib
import io
import queue
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cache.atomic import WriteError
from pipeline.photos.decoding import decode
from pipeline.photos.drive.silence import GLANCE_S, STALL_S, Silence, StalledError
from pipeline.photos.memory_budget import file_budget, pixel_budget
from pipeline.photos.photo_file import file_digest, read_file, reading_fails

LONG_SIDE = 512  # pixels; of smaller photos, their own
_QUALITY = 80
_WAITING = 64  # photos that are known and not begun


@dataclass(frozen=True)
class Thumbnail:
    """A thumbnail that was written, or the reason why there is none."""

    width: int = 0
    height: int = 0
    size_bytes: int = 0
    error: str = ""


@dataclass(frozen=True)
class _Wanted:
    number: int
    path: Path
    digest: NDArray[np.uint8] | None


class Thumbnails:
    """Writes `000000.jpg`, `000001.jpg`, … into a folder."""

    def __init__(self, folder: Path, threads: int, stall_s: float = STALL_S) -> None:
        self.folder = folder
        self._stall_s = stall_s
        self._wanted: queue.Queue[_Wanted | None] = queue.Queue(_WAITING)
        self._made: dict[int, Thumbnail] = {}
        self._failure: BaseException | None = None
        # Daemons, because a drive that is gone may keep them for ever.
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def add(self, number: int, path: Path, digest: NDArray[np.uint8] | None = None) -> None:
        """Have the thumbnail of a photo made; wait if many are due.

        digest: (16,) of the file that was captioned; another file has no thumbnail. Raises
        StalledError if the drive gives nothing for a minute.
        """
        self._put(_Wanted(number, path, digest))

    def finish(self) -> dict[int, Thumbnail]:
        """What became of each photo, by number, when all are done.

        Raises WriteError if one could not be written, StalledError, or ShortageError.
        """
        for _ in self._threads:
            self._put(None)
        silence = Silence(self._stall_s)
        for thread in self._threads:
            while thread.is_alive():
                thread.join(GLANCE_S)
                self._check(silence)
        if self._failure is not None:
            raise self._failure
        return self._made

    def abandon(self) -> None:
        """Make no more of them, and wait a moment for those that are begun."""
        self._failure = self._failure or WriteError(f"{self.folder}: abandoned")
        with contextlib.suppress(queue.Empty):
            while True:
                self._wanted.get_nowait()
        for _ in self._threads:
            self._wanted.put(None)
        for thread in self._threads:
            thread.join(GLANCE_S)

    def _put(self, wanted: _Wanted | None) -> None:
        silence = Silence(self._stall_s)
        while True:
            try:
                self._wanted.put(wanted, timeout=GLANCE_S)
            except queue.Full:
                self._check(silence)
            else:
                return

    def _check(self, silence: Silence) -> None:
        if silence.is_stall(len(self._made)):
            raise StalledError(
                f"{self.folder}: no photo came from the disk for {silence.seconds:.0f} s; see "
                "whether the drive is connected, then run the same command again"
            )

    def _work(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            try:
                # After a failure the rest is left alone, and their captions go on.
                made = Thumbnail() if self._failure else self._make(wanted)
            except BaseException as error:  # for `finish`
                self._failure, made = error, Thumbnail()
            self._made[wanted.number] = made

    def _make(self, wanted: _Wanted) -> Thumbnail:
        target = file_of(self.folder, wanted.number)
        try:
            small = small_copy(wanted.path, wanted.digest)
        except Exception as error:
            return Thumbnail(error=reading_fails(wanted.path, error).error)
        if small is None:
            return Thumbnail(error="the file is not the one that was captioned")
        file = io.BytesIO()
        small.save(file, "JPEG", quality=_QUALITY)
        try:
            target.write_bytes(file.getbuffer())
        except OSError as error:
            raise WriteError(f"{target}: cannot write ({error.strerror or error})") from None
        return Thumbnail(small.width, small.height, file.getbuffer().nbytes)


def file_of(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.jpg"


def small_copy(path: Path, digest: NDArray[np.uint8] | None) -> Image.Image | None:
    """A photo of at most LONG_SIDE pixels; None if the file has another digest.

    Raises what reading and decoding raise.
    """
    with file_budget().reservation() as of_file, pixel_budget().reservation() as of_pixels:
        data = read_file(path, of_file)
        if digest is not None and not np.array_equal(file_digest(data), digest):
            return None
        photo = Image.fromarray(decode(data, of_pixels))
        del data
        photo.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
        return photo
