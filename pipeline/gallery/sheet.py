"""A contact sheet: photos with captions below them in one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from cache.atomic import write_atomically
from pipeline.photos.decoding import decode
from pipeline.photos.photo_file import read_file

_TILE_WIDTH, _PHOTO_HEIGHT, _MARGIN = 320, 240, 10
_FONT_SIZE, _LINE_HEIGHT = 15, 19
_INK, _FAINT, _PAPER = (24, 24, 28), (110, 110, 118), (255, 255, 255)


@dataclass(frozen=True)
class Tile:
    """One photo, its caption, and a note in grey, such as a true caption."""

    path: Path
    caption: str
    note: str = ""


def write_contact_sheet(
    tiles: Sequence[Tile], path: Path, *, legend: tuple[str, str], columns: int = 4
) -> None:
    """Draw the tiles row by row into a PNG, below a legend.

    legend: what the captions are, what the notes are. Raises OSError or ImageError if a photo
    cannot be read, and WriteError.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    texts = [(_wrap(tile.caption, font), _wrap(tile.note, font)) for tile in tiles]
    lines = max((len(caption) + len(note) for caption, note in texts), default=0)
    width, height = _TILE_WIDTH + _MARGIN, _PHOTO_HEIGHT + lines * _LINE_HEIGHT + 3 * _MARGIN
    rows = -(-len(tiles) // columns)
    top = _LINE_HEIGHT + 2 * _MARGIN
    sheet = Image.new("RGB", (columns * width + _MARGIN, top + rows * height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    x = _MARGIN
    for text, ink in zip(legend, (_INK, _FAINT), strict=True):
        draw.rectangle((x, _MARGIN + 3, x + 11, _MARGIN + 14), fill=ink)
        draw.text((x + 17, _MARGIN), text, fill=ink, font=font)
        x += 17 + round(font.getlength(text)) + 3 * _MARGIN
    for i, (tile, (caption, note)) in enumerate(zip(tiles, texts, strict=True)):
        x, y = _MARGIN + i % columns * width, top + i // columns * height
        photo = Image.fromarray(decode(read_file(tile.path)))
        photo.thumbnail((_TILE_WIDTH, _PHOTO_HEIGHT), Image.Resampling.LANCZOS)
        sheet.paste(photo, (x + (_TILE_WIDTH - photo.width) // 2, y))
        y += _PHOTO_HEIGHT + _MARGIN // 2
        for line, ink in [(line, _INK) for line in caption] + [(line, _FAINT) for line in note]:
            draw.text((x, y), line, fill=ink, font=font)
            y += _LINE_HEIGHT
    write_atomically(path, lambda temporary: sheet.save(temporary, "PNG"))


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Break a text into lines as wide as a tile."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= _TILE_WIDTH:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
