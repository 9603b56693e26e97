"""Which files below a folder are photos: one rule for extraction and prediction.

A file with one of the usual suffixes of photos is one; whether it can be decoded shows later. Any
other file is a photo if its first bytes are those of a picture, whatever it is called. Hidden files
are none: macOS keeps its notes on `x.jpg` in `._x.jpg`. What is left out is counted and named.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from cache.errors import CapError
from pipeline.photos.drive.shortages import check_shortage

IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp"),
        *(".tif", ".tiff", ".heic", ".heif", ".hif", ".avif", ".jp2", ".j2k", ".jpx", ".qoi"),
        *(".pbm", ".pgm", ".ppm", ".pnm"),
    )
)
# Cameras' raw files, which hold a small JPEG or TIFF beside the photo, and JPEG XL.
_TO_CONVERT = frozenset(
    (
        *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".jxl", ".kdc"),
        *(".mef", ".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl"),
        *(".sr2", ".srf", ".srw", ".x3f"),
    )
)
# Not looked into: texts, of which a folder may hold one for each photo, the thumbnails of videos,
# and photos that are still being copied.
_NO_PHOTOS = frozenset(
    (
        *(".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".xmp", ".aae", ".html", ".md"),
        *(".npy", ".npz", ".h5", ".zip", ".tar", ".gz", ".pdf", ".mp4", ".mov", ".avi", ".thm"),
        *(".part", ".crdownload", ".download", ".tmp", ".bak"),
    )
)
_NAMED_KINDS = 8  # in one notice

_HIDDEN = "hidden"
_LISTED = "linked folder that is listed already"
_AROUND = "link to a folder around this one"
_NOWHERE = "link that leads nowhere"
_LOST = "lost+found"


class FolderError(CapError):
    """Raised when a folder of photos cannot be read. The message is one line."""


@dataclass(frozen=True)
class FolderPhotos:
    """The photos below a folder, and what else it holds."""

    folder: Path
    paths: list[str] = field(default_factory=list)  # below `folder`, with `/` between parts; sorted
    left_out: Counter[str] = field(default_factory=Counter)  # how many of each kind, by suffix

    def notice(self) -> str | None:
        """One line on what is left out, the most frequent kinds first; None if nothing is."""
        return notice_of(str(self.folder), len(self.paths), self.left_out)


def notice_of(label: str, count: int, left_out: Counter[str]) -> str | None:
    """The notice of `count` photos. label: the folder."""
    if not left_out:
        return None
    kinds = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{number:,} {kind}" for kind, number in kinds[:_NAMED_KINDS]]
    others = sum(number for _, number in kinds[_NAMED_KINDS:])
    if others:
        named.append(f"{others:,} of other kinds")
    line = f"{label}: {count:,} photo{'s' if count != 1 else ''}; left out {', '.join(named)}"
    convertible = sorted(_TO_CONVERT & left_out.keys())
    if convertible:
        line += f"; convert {', '.join(convertible)} to JPEG to use them"
    return line


def list_photos(folder: Path) -> FolderPhotos:
    """The photos below a folder, in its subfolders too.

    Links to folders are followed. Each folder is listed once, under its own name if it lies below
    `folder`, so that no photo counts twice and no circle of links goes on for ever. Raises
    FolderError if a folder cannot be read.
    """
    found = FolderPhotos(folder)
    root = os.path.realpath(folder)
    listed: set[str] = set()  # real paths
    pending, links = [("", root)], list[str]()
    while pending or links:
        if not pending:
            links.sort(reverse=True)
            below = links.pop()
            real = os.path.realpath(folder / below)
            if real in listed:
                found.left_out[_LISTED] += 1
                continue
            if os.path.commonpath([root, real]) == real:
                found.left_out[_AROUND] += 1
                continue
            pending.append((below, real))
        below, real = pending.pop()
        listed.add(real)
        for name, is_link in _subfolders(found, below):
            path = f"{below}/{name}" if below else name
            if is_link:
                links.append(path)
            else:
                pending.append((path, f"{real}/{name}"))
    found.paths.sort()
    return found


def _subfolders(found: FolderPhotos, below: str) -> list[tuple[str, bool]]:
    """Put the photos of one folder into `found`; (name, whether it is a link) of its folders."""
    folders = []
    path = found.folder / below
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    found.left_out[_HIDDEN] += 1
                elif _is_folder(entry):
                    folders.append((entry.name, entry.is_symlink()))
                elif (kind := _kind_if_no_photo(entry)) is None:
                    found.paths.append(f"{below}/{entry.name}" if below else entry.name)
                else:
                    found.left_out[kind] += 1
    except OSError as error:
        if path.name == "lost+found" and isinstance(error, PermissionError):
            found.left_out[_LOST] += 1  # every ext4 drive has one, which only root may read
            return []
        check_shortage(path, error)
        raise FolderError(
            f"{path}: cannot read this folder ({error.strerror or error}); "
            "give yourself permission to read it, or move it elsewhere"
        ) from None
    return folders


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or to where this user may not look
        return False


def _kind_if_no_photo(entry: os.DirEntry[str]) -> str | None:
    """None if the file is a photo; otherwise what to call it when files left out are counted."""
    suffix = PurePosixPath(entry.name).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return None
    if suffix not in _NO_PHOTOS and suffix not in _TO_CONVERT:
        # Pillow takes a while to import, and most folders do without.
        from pipeline.photos.decoding import shows_picture

        try:
            if entry.is_file() and shows_picture(entry.path):
                return None
        except OSError as error:
            check_shortage(Path(entry.path), error)
    if entry.is_symlink() and not os.path.exists(entry.path):
        return _NOWHERE
    return suffix or "without suffix"
