"""A sheet: photos in rows, each with its captions below it, for a README or a slide.

Nothing is written before all captions are there. `sheet.png` has the first 60 photos, `sheet-2.png`
the next ones.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from cache.atomic import WriteError, write_atomically
from cache.errors import CapError
from pipeline.captions.mark import MARK
from pipeline.gallery.sheet.fonts import Fonts
from pipeline.gallery.sheet.lines import Line, draw_line, set_lines
from pipeline.gallery.thumbnails import small_copy
from pipeline.photos.drive.answers import prompt_answer_of
from pipeline.photos.photo_file import reading_fails

PHOTOS_ON_A_PAGE = 60
MOST_PHOTOS = 20 * PHOTOS_ON_A_PAGE
COLUMNS = 4
_TILE_WIDTH, _PHOTO_HEIGHT, _MARGIN = 320, 240, 12  # pixels
_CAPTION_SIZE, _NOTE_SIZE = 16, 14
_INK, _FAINT, _PAPER, _EMPTY = (24, 24, 28), (110, 110, 118), (255, 255, 255), (236, 236, 240)
_HEAD_BYTES = 1024  # of a PNG; what says that it is ours is at its beginning


class SheetError(CapError):
    """Raised when there can be no sheet. The message is one line that begins with the file."""


@dataclass(frozen=True)
class Tile:
    """One photo with its captions, and notes in grey, such as what people wrote.

    path: None for a photo that is not shown. digest: (16,) of the file that was captioned, or None
    where that is not known; another file is not shown.
    """

    path: Path | None
    captions: tuple[str, ...]
    notes: tuple[str, ...] = ()
    digest: NDArray[np.uint8] | None = None


def check_sheet(path: Path, photos: int) -> None:
    """Raise SheetError unless a sheet of so many photos can be written there, in the place of no
    file but a sheet.
    """
    if path.suffix.lower() != ".png":
        raise SheetError(f"{path}: sheets are PNG; name a file that ends in .png")
    if photos > MOST_PHOTOS:
        raise SheetError(
            f"{path}: a sheet has at most {MOST_PHOTOS:,} photos, not {photos:,}; --gallery shows "
            "any number"
        )
    for number, page in enumerate(_pages(path, max(1, -(-photos // PHOTOS_ON_A_PAGE))), 1):
        mark = MARK if number == 1 else _mark(path, number)
        if os.path.lexists(page) and not _is_marked(page, mark):
            raise SheetError(f"{page}: is no sheet that cap has written; name another file")
    above = path.parent
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise SheetError(f"{path}: this user may not write there; name another file")


def write_sheet(
    tiles: Sequence[Tile],
    path: Path,
    *,
    legend: str,
    notes_legend: str = "",
    columns: int = COLUMNS,
    report: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Draw the tiles. Returns lines for the user: the files, and what could not be shown.

    legend, notes_legend: what the captions and the notes are. report: is told how many photos of
    how many are drawn. Raises SheetError, WriteError, StalledError or ShortageError.
    """
    check_sheet(path, len(tiles))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"{path.parent}: cannot make the folder ({error.strerror})") from None
    drawing = _Drawing(len(tiles), report)
    parts = [
        tiles[first : first + PHOTOS_ON_A_PAGE]
        for first in range(0, max(1, len(tiles)), PHOTOS_ON_A_PAGE)
    ]
    pages = _pages(path, len(parts))
    for number, (part, page) in enumerate(zip(parts, pages, strict=True), 1):
        sheet = drawing.page(part, [(_INK, legend), (_FAINT, notes_legend)], columns)
        write_atomically(page, partial(_save, sheet, _mark(path, number)))
    _remove_later_pages(path, len(pages))
    count = f"{len(tiles):,} photo{'s' * (len(tiles) != 1)}"
    more = "" if len(pages) == 1 else f" on {len(pages)} pages, to {pages[-1].name}"
    lines = [f"{path}: a sheet of {count}{more}"]
    if drawing.not_shown:
        name, reason = drawing.not_shown[0]
        lines.append(
            f"{path}: {len(drawing.not_shown):,} of them cannot be shown (first: {name}: {reason})"
        )
    return lines + [f"{path}: {notice}" for notice in drawing.notices()]


class _Drawing:
    def __init__(self, total: int, report: Callable[[int, int], None] | None) -> None:
        self._fonts, self._small_fonts = Fonts(_CAPTION_SIZE), Fonts(_NOTE_SIZE)
        self._total, self._report, self._done = total, report, 0
        self.not_shown: list[tuple[str, str]] = []  # names and reasons

    def notices(self) -> list[str]:
        return list(dict.fromkeys([*self._fonts.notices(), *self._small_fonts.notices()]))

    def page(
        self, tiles: Sequence[Tile], legend: list[tuple[tuple[int, int, int], str]], columns: int
    ) -> Image.Image:
        """One page as (H, W) RGB."""
        columns = max(1, min(columns, len(tiles)))
        width = columns * (_TILE_WIDTH + _MARGIN) + _MARGIN
        heads = [
            (ink, line)
            for ink, text in legend
            if text
            for line in set_lines(text, self._small_fonts, width - 2 * _MARGIN - 18)
        ]
        texts = [self._texts(tile) for tile in tiles]
        rows = [range(i, min(i + columns, len(tiles))) for i in range(0, len(tiles), columns)]
        heights = [
            _PHOTO_HEIGHT
            + max(sum(line.height for line, _ in texts[i]) for i in row)
            + _MARGIN // 2
            for row in rows
        ]
        top = _MARGIN + sum(line.height for _, line in heads) + _MARGIN // 2
        height = top + sum(heights) + _MARGIN * len(rows)
        sheet = Image.new("RGB", (width, height), _PAPER)
        draw = ImageDraw.Draw(sheet)
        y = _MARGIN
        for ink, line in heads:
            middle = y + line.height // 2
            draw.rectangle((_MARGIN, middle - 6, _MARGIN + 11, middle + 5), fill=ink)
            draw_line(draw, line, _MARGIN + 18, y, width - 2 * _MARGIN - 18, ink)
            y += line.height
        y = top
        for row, row_height in zip(rows, heights, strict=True):
            for column, i in enumerate(row):
                x = _MARGIN + column * (_TILE_WIDTH + _MARGIN)
                self._draw_photo(sheet, draw, tiles[i], x, y)
                below = y + _PHOTO_HEIGHT + _MARGIN // 2
                for line, ink in texts[i]:
                    draw_line(draw, line, x, below, _TILE_WIDTH, ink)
                    below += line.height
            y += row_height + _MARGIN
        return sheet

    def _texts(self, tile: Tile) -> list[tuple[Line, tuple[int, int, int]]]:
        """The lines below a photo, with their colours."""
        parts = [(text, self._fonts, _INK) for text in tile.captions]
        parts += [(text, self._small_fonts, _FAINT) for text in tile.notes]
        return [
            (line, ink)
            for text, fonts, ink in parts
            for line in set_lines(text, fonts, _TILE_WIDTH)
        ]

    def _draw_photo(
        self, sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, x: int, y: int
    ) -> None:
        photo = self._photo(tile)
        if photo is None:
            corner = (x + _TILE_WIDTH - 1, y + _PHOTO_HEIGHT - 1)
            draw.rectangle(((x, y), corner), fill=_EMPTY)
        else:
            place = (x + (_TILE_WIDTH - photo.width) // 2, y + _PHOTO_HEIGHT - photo.height)
            sheet.paste(photo, place)
        self._done += 1
        if self._report is not None:
            self._report(self._done, self._total)

    def _photo(self, tile: Tile) -> Image.Image | None:
        """The photo, as large as its place; None if it cannot be shown. Raises StalledError."""
        if tile.path is None:
            return None
        path = tile.path
        try:
            photo = prompt_answer_of(lambda: small_copy(path, tile.digest), str(path))
        except CapError:  # of the machine
            raise
        except Exception as error:
            self.not_shown.append((path.name, reading_fails(path, error).error))
            return None
        if photo is None:
            self.not_shown.append((path.name, "the file is not the one that was captioned"))
            return None
        photo.thumbnail((_TILE_WIDTH, _PHOTO_HEIGHT), Image.Resampling.LANCZOS)
        return photo


def _pages(path: Path, count: int) -> list[Path]:
    return [path, *(_page(path, number) for number in range(2, count + 1))]


def _page(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def _remove_later_pages(path: Path, count: int) -> None:
    """Remove the pages that an earlier, longer sheet has behind those of this one."""
    name = re.compile(re.escape(path.stem) + r"-([0-9]{1,3})" + re.escape(path.suffix))
    with contextlib.suppress(OSError):
        for entry in os.listdir(path.parent):
            found = name.fullmatch(entry)
            if found and int(found[1]) > count:
                page = path.with_name(entry)
                if _is_marked(page, _mark(path, int(found[1]))):
                    page.unlink()


def _mark(path: Path, number: int) -> str:
    """What a page says of itself, in ASCII."""
    name = path.name.encode("unicode_escape").decode("ascii")
    return f"{MARK}: page {number} of the sheet {name}"


def _is_marked(path: Path, mark: str) -> bool:
    try:
        with path.open("rb") as file:
            return mark.encode() in file.read(_HEAD_BYTES)
    except OSError:
        return False


def _save(sheet: Image.Image, mark: str, path: Path) -> None:
    about = PngInfo()
    about.add_text("Comment", mark)
    sheet.save(path, "PNG", pnginfo=about)
