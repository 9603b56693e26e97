"""The folder of a gallery. Only what a gallery wrote there is ever replaced or removed.

    .cap-gallery      says whose folder it is; locked while a gallery is written
    index.html        the page, replaced when the new one is complete
    thumbnails-N/     the photos of the page, or of one that is being written; N counts up

So a gallery that is killed leaves the page before it as it was, with that page's thumbnails.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from pathlib import Path

from cache.atomic import WriteError, remove_leftovers, write_text
from cache.errors import CapError

PAGE, MARKER = "index.html", ".cap-gallery"
_MARKER_TEXT = "Here cap writes a gallery. It replaces only files that it made.\n"
_THUMBNAILS = re.compile(r"thumbnails-([0-9]+)")
_THUMBNAIL = re.compile(r"[0-9]+\.jpg")


class GalleryError(CapError):
    """Raised when a folder cannot become that of a gallery. The message is one line."""


class GalleryFolder:
    """A folder in which one gallery at a time is written. Close it at the end."""

    def __init__(self, path: Path) -> None:
        """Make the folder, or take that of an earlier gallery, and lock it.

        Raises GalleryError if it holds anything else or another process writes there, and
        WriteError if it cannot be written. It is then as it was.
        """
        self.path = path
        try:
            self._check()
            self._is_new = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / MARKER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._take_lock()
                self.thumbnails = self._new_thumbnails()
            except BaseException:
                os.close(self._lock)
                raise
        except OSError as error:
            raise WriteError(f"{path}: cannot write there ({error.strerror or error})") from None

    def write_page(self, text: str) -> Path:
        """Write the page, and remove the thumbnails of pages before it. Returns its path.

        Raises WriteError.
        """
        page = self.path / PAGE
        write_text(page, text)
        with contextlib.suppress(OSError):  # the page does not need their absence
            for folder in self._thumbnail_folders():
                if folder != self.thumbnails:
                    shutil.rmtree(folder)
        return page

    def remove_thumbnails(self) -> None:
        """Remove the thumbnails of the gallery that is being written; quietly. Without any page,
        the folder is again as it was.
        """
        shutil.rmtree(self.thumbnails, ignore_errors=True)
        if not (self.path / PAGE).exists():
            with contextlib.suppress(OSError):
                (self.path / MARKER).unlink()
                if self._is_new:
                    self.path.rmdir()

    def close(self) -> None:
        os.close(self._lock)

    def _check(self) -> None:
        """Raise GalleryError unless the folder is missing, empty or that of a gallery."""
        if not self.path.is_dir():
            if os.path.lexists(self.path):
                raise GalleryError(f"{self.path}: is no folder; name another --gallery")
            return
        with contextlib.suppress(OSError):
            remove_leftovers(self.path / PAGE)
        names = sorted(os.listdir(self.path))
        if names and MARKER not in names:
            raise GalleryError(
                f"{self.path}: holds something else than a gallery ({names[0]}); name a folder of "
                "its own with --gallery"
            )
        for name in names:
            foreign = self._foreign(name)
            if foreign is not None:
                raise GalleryError(
                    f"{self.path}: holds {foreign}, which no gallery wrote; move it away, or name "
                    "another --gallery"
                )

    def _foreign(self, name: str) -> str | None:
        """What of an entry is not a gallery's, or None."""
        path = self.path / name
        if name in (MARKER, PAGE):
            return name if path.is_symlink() or not path.is_file() else None
        if name.startswith(f".{PAGE}.cap-"):  # a page that another process is writing
            return None
        if not _THUMBNAILS.fullmatch(name) or path.is_symlink() or not path.is_dir():
            return name
        inside = (each for each in os.listdir(path) if not _THUMBNAIL.fullmatch(each))
        found = next(inside, None)
        return None if found is None else f"{name}/{found}"

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GalleryError(
                f"{self.path}: another cap process writes a gallery there; wait for it, or name "
                "another --gallery"
            ) from None
        except OSError:  # a file system without locks
            pass
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, _MARKER_TEXT.encode(), 0)

    def _new_thumbnails(self) -> Path:
        numbers = [int(folder.name.partition("-")[2]) for folder in self._thumbnail_folders()]
        folder = self.path / f"thumbnails-{max(numbers, default=0) + 1}"
        folder.mkdir()
        return folder

    def _thumbnail_folders(self) -> list[Path]:
        return [self.path / name for name in os.listdir(self.path) if _THUMBNAILS.fullmatch(name)]
