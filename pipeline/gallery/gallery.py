"""Writing a gallery while captions are computed: thumbnails at once, the page at the end."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.gallery.folder import GalleryFolder
from pipeline.gallery.page import page_of
from pipeline.gallery.thumbnails import Thumbnail, Thumbnails, file_of
from pipeline.photos.readers.start import MOST_THREADS, reader_count

# Up to this size the thumbnails are inside the page, which then is one file to send.
_INSIDE_BYTES = 8 << 20


@dataclass(frozen=True)
class Piece:
    """A part of a sentence, with the space before it."""

    text: str
    probability: float | None = None  # of its word, 0 to 1


@dataclass(frozen=True)
class ShownCaption:
    """A caption as the page shows it."""

    pieces: tuple[Piece, ...]
    confidence: float | None = None  # 0 to 1

    def as_dict(self) -> dict[str, Any]:
        pieces = [
            [piece.text] if piece.probability is None else [piece.text, _rounded(piece.probability)]
            for piece in self.pieces
        ]
        if self.confidence is None:
            return {"pieces": pieces}
        return {"pieces": pieces, "confidence": _rounded(self.confidence)}


@dataclass(frozen=True)
class ShownPhoto:
    """A photo of a gallery, or a file that was set aside."""

    path: str
    captions: tuple[ShownCaption, ...] = ()  # the best first, then the others
    error: str = ""  # why it was set aside
    references: tuple[str, ...] = ()
    cider: float | None = None  # times 100


class Gallery:
    """A gallery that is being written into a folder. A context manager: without `finish`, its end
    leaves the gallery that was there before.
    """

    def __init__(self, folder: Path) -> None:
        """Raises GalleryError or WriteError, as `GalleryFolder` does."""
        self._folder = GalleryFolder(folder)
        threads = min(MOST_THREADS, reader_count(None))
        self._thumbnails = Thumbnails(self._folder.thumbnails, threads)
        self._photos: list[ShownPhoto] = []
        self._keeps_thumbnails = False

    def add(
        self, photo: ShownPhoto, file: str | Path | None, digest: NDArray[np.uint8] | None = None
    ) -> None:
        """Show a photo behind those before it. Its thumbnail is made in the background.

        file: of the photo; None if there is nothing to show. digest: (16,) of the file that was
        captioned, or None where that is not known. Raises StalledError.
        """
        if file is not None:
            self._thumbnails.add(len(self._photos), Path(file), digest)
        self._photos.append(photo)

    def finish(self, title: str, facts: Sequence[str] = ()) -> str:
        """Write the page. Returns a line that says what was written.

        facts: short texts that stand below the title. Raises WriteError, StalledError or
        ShortageError.
        """
        made = self._thumbnails.finish()
        size = sum(thumbnail.size_bytes for thumbnail in made.values())
        inside = size <= _INSIDE_BYTES
        shown = _short_names([photo.path for photo in self._photos])
        data = {
            "title": title,
            "facts": list(facts),
            "thumbnails": self._folder.thumbnails.name,
            "photos": [
                self._as_dict(number, photo, shown[number], made.get(number), inside)
                for number, photo in enumerate(self._photos)
            ],
        }
        page = self._folder.write_page(page_of(data))
        self._keeps_thumbnails = not inside
        count = f"{len(self._photos):,} photo{'s' * (len(self._photos) != 1)}"
        if inside:
            return f"{page}: a gallery of {count} in one file ({page.stat().st_size / 1e6:.1f} MB)"
        return (
            f"{page}: a gallery of {count}; it needs the folder {self._folder.thumbnails.name} "
            f"beside it ({size / 1e6:,.0f} MB)"
        )

    def _as_dict(
        self, number: int, photo: ShownPhoto, name: str, made: Thumbnail | None, inside: bool
    ) -> dict[str, Any]:
        found: dict[str, Any] = {
            "name": name,
            "captions": [caption.as_dict() for caption in photo.captions],
        }
        if photo.error:
            found["error"] = photo.error
        if photo.references:
            found["references"] = list(photo.references)
        if photo.cider is not None and math.isfinite(photo.cider):
            found["cider"] = round(photo.cider, 1)
        if made is not None and made.error and not photo.error:
            found["missing"] = made.error
        if made is not None and made.size_bytes:
            found["size"] = [made.width, made.height]
            if inside:
                data = file_of(self._folder.thumbnails, number).read_bytes()
                found["uri"] = f"data:image/jpeg;base64,{base64.b64encode(data).decode('ascii')}"
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._thumbnails.abandon()
        if not self._keeps_thumbnails:
            self._folder.remove_thumbnails()
        self._folder.close()


def _rounded(share: float) -> float:
    return round(share, 4) if math.isfinite(share) else 0.0


def _short_names(paths: Sequence[str]) -> list[str]:
    """The paths without the folder that all of them are in: the page may be shared."""
    try:
        folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    except ValueError:  # none, or relative and absolute ones
        return list(paths)
    return [os.path.relpath(path, folder) if folder else path for path in paths]
