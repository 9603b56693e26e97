"""Which files below a folder are photos."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".pgm", ".ppm", ".avif")
)


@dataclass(frozen=True)
class FolderPhotos:
    """The photos below a folder, sorted, as paths below it with `/` between the parts."""

    paths: list[str]


def list_photos(folder: Path) -> FolderPhotos:
    """The photos below a folder, in its subfolders too. Hidden files are none."""
    found: list[str] = []
    for inside, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found.extend(
            (Path(inside) / name).relative_to(folder).as_posix()
            for name in names
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")
        )
    return FolderPhotos(sorted(found))
