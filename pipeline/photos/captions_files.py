"""Reading photos and their captions: COCO, Karpathy and Flickr files, CSV files, plain folders.

Every reader returns `Photo` records in a fixed order. A photo is identified by its own id (COCO's
number, otherwise its path), never by its position in a list.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from cache.errors import CapError
from pipeline.photos.folder import IMAGE_SUFFIXES, list_photos


class DatasetError(CapError):
    """Raised when a photo folder or a captions file cannot be used.

    The message is one line that starts with the file.
    """


@dataclass(frozen=True, slots=True)
class Photo:
    """One photo and its captions. `path` is relative to the image folder, with `/` as separator."""

    image_id: str
    path: str
    captions: tuple[str, ...] = ()


def read_photos(
    images: Path,
    captions: Path | None = None,
    *,
    split: str | None = None,
    only: Path | None = None,
    limit: int | None = None,
    notices: list[str] | None = None,
) -> list[Photo]:
    """The photos to work on, in the order of the captions file, or else sorted by path.

    captions: COCO captions JSON, Karpathy JSON, Flickr8k `captions.txt` (CSV), Flickr `token.txt`
    or Flickr30k `results.csv`; None for every photo below `images`. split: comma-separated splits
    of a Karpathy file. only: a file with one photo name per line; other photos are left out.
    limit: how many photos to return at most. notices: gets a line about what else the folder holds.

    Raises FolderError if a folder cannot be read, and DatasetError if a file cannot be read, no
    photo is left, or the arguments contradict each other.
    """
    if not images.is_dir():
        wrong = "is a file; name a folder" if images.is_file() else "no such folder"
        raise DatasetError(f"{images}: {wrong}")
    if captions is None:
        if split is not None:
            raise DatasetError("--split needs a Karpathy JSON as --captions")
        found = list_photos(images)
        photos = [Photo(path, path) for path in found.paths]
        if notices is not None and (line := found.notice()):
            notices.append(line)
    else:
        photos = read_captions(captions, split=split, images=images)
    if only is not None:
        photos = keep_listed(photos, only)
    if limit is not None:
        photos = photos[:limit]
    if not photos:
        raise DatasetError(f"{images}: no photos found")
    if captions is not None and not any((images / photo.path).exists() for photo in photos[:1000]):
        raise DatasetError(
            f"{images}: none of the photos of {captions} is here (looked for {photos[0].path})"
        )
    return photos


def read_captions(
    captions: Path, *, split: str | None = None, images: Path | None = None
) -> list[Photo]:
    """The photos of a captions file in any of the formats.

    images: the image folder; it decides whether the subfolders that a Karpathy file names are part
    of the paths. Raises DatasetError if the format is unknown or the file names no photo.
    """
    try:
        with captions.open("rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise DatasetError(f"{captions}: cannot read ({error.strerror})") from None
    if start.lstrip()[:1] in (b"{", b"["):
        photos = _json_photos(captions, split, images)
    else:
        if split is not None:
            raise DatasetError(f"{captions}: has no splits; use --only with a list of photo names")
        photos = _flickr_photos(captions)
    if not photos:
        raise DatasetError(f"{captions}: names no photo")
    for photo in photos:
        _check_text(captions, photo)
        parts = PurePosixPath(photo.path)
        if parts.is_absolute() or ".." in parts.parts or "\0" in photo.path:
            raise DatasetError(f"{captions}: names a photo outside the folder ({photo.path!r})")
    return photos


def _check_text(captions: Path, photo: Photo) -> None:
    r"""Raise DatasetError if half of a surrogate pair, as JSON can hold (`"\ud83d"`), is among the
    strings. It is no text, and no file in UTF-8 can hold it.
    """
    # Python gives such halves to the bytes of a file's name that are not UTF-8.
    names = [(text, "surrogateescape") for text in (photo.image_id, photo.path)]
    for text, errors in names + [(text, "strict") for text in photo.captions]:
        try:
            text.encode(errors=errors)
        except UnicodeEncodeError as error:
            raise DatasetError(
                f"{captions}: half of a character ({text[error.start]!r}) in {text!r} of photo "
                f"{photo.path!r}, instead of text; correct it in the file"
            ) from None


def keep_listed(photos: Sequence[Photo], only: Path) -> list[Photo]:
    """The photos that the file `only` names, one per line, with or without folders.

    Raises DatasetError if it names a photo that is not among `photos`.
    """
    try:
        lines = only.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{only}: cannot read ({error})") from None
    wanted = {line.strip() for line in lines if line.strip()}
    kept = [p for p in photos if p.path in wanted or PurePosixPath(p.path).name in wanted]
    known = {p.path for p in kept} | {PurePosixPath(p.path).name for p in kept}
    unknown = sorted(wanted - known)
    if unknown:
        raise DatasetError(
            f"{only}: {len(unknown):,} of {len(wanted):,} names are not among the photos "
            f"(first: {unknown[0]})"
        )
    return kept


def _json_photos(captions: Path, split: str | None, images: Path | None) -> list[Photo]:
    try:
        with captions.open(encoding="utf-8") as file:
            record = json.load(file)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{captions}: not valid JSON ({error})") from None
    entries = record.get("images") if isinstance(record, dict) else None
    if not isinstance(entries, list):
        raise DatasetError(f"{captions}: no list of images; is it a captions file?")
    try:
        if any("sentences" in entry for entry in entries[:1]):
            return _karpathy_photos(captions, entries, split, images)
        if split is not None:
            raise DatasetError(f"{captions}: has no splits; use --only with a list of photo names")
        return _coco_photos(captions, record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(
            f"{captions}: not a captions file as COCO or Karpathy publish them "
            f"({type(error).__name__}: {error})"
        ) from None


def _karpathy_photos(
    captions: Path, entries: Iterable[Mapping[str, Any]], split: str | None, images: Path | None
) -> list[Photo]:
    wanted = {name.strip() for name in split.split(",")} if split else None
    photos, splits = [], set()
    # Listing the image folder once tells which of the file's subfolders (val2014/…) exist in it.
    subfolders = {entry.name for entry in images.iterdir() if entry.is_dir()} if images else set()
    for entry in entries:
        splits.add(str(entry["split"]))
        if wanted is not None and entry["split"] not in wanted:
            continue
        path = str(entry["filename"])
        if entry.get("filepath") in subfolders:
            path = f"{entry['filepath']}/{path}"
        texts = tuple(_clean(sentence["raw"]) for sentence in entry["sentences"])
        photos.append(Photo(str(entry.get("cocoid", path)), path, tuple(filter(None, texts))))
    if wanted is not None and not wanted <= splits:
        unknown = ", ".join(sorted(wanted - splits))
        raise DatasetError(f"{captions}: no split {unknown}; it has {', '.join(sorted(splits))}")
    return photos


def _coco_photos(captions: Path, record: Mapping[str, Any]) -> list[Photo]:
    if "annotations" not in record:
        raise DatasetError(f"{captions}: has images but no annotations; is it a captions file?")
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports to stdout
        from pycocotools.coco import COCO

        coco = COCO()
        coco.dataset = dict(record)
        coco.createIndex()
    return [
        Photo(
            str(image_id),
            str(image["file_name"]),
            tuple(filter(None, (_clean(note["caption"]) for note in coco.imgToAnns[image_id]))),
        )
        for image_id, image in coco.imgs.items()
    ]


def _flickr_photos(captions: Path) -> list[Photo]:
    grouped: dict[str, list[str]] = {}
    try:
        # Line by line, because a list of all lines would double the memory.
        with captions.open(encoding="utf-8-sig") as file:
            for name, caption in _named_captions(captions, file):
                grouped.setdefault(name, []).extend([caption] if caption else [])
    except UnicodeDecodeError:
        raise DatasetError(
            f"{captions}: neither JSON nor UTF-8 text; is it a captions file?"
        ) from None
    except csv.Error as error:
        raise DatasetError(f"{captions}: not a CSV ({error})") from None
    return [Photo(name, name, tuple(texts)) for name, texts in grouped.items()]


def _named_captions(captions: Path, lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(photo name, one caption) for each entry of a file in one of Flickr's formats."""
    lines = iter(lines)
    line = next(lines, "")
    first = line.lower()
    if "\t" in first:  # token.txt: name.jpg#0<TAB>caption
        return _pairs(captions, chain([line], lines), lambda line: line.split("\t", 1))
    if "|" in first:  # Flickr30k's results.csv: image_name| comment_number| comment
        return _pairs(captions, lines, lambda line: line.split("|", 2)[::2])
    if "," in first:  # captions.txt: image,caption
        rows = csv.reader(chain([line], lines) if _names_image(first.split(",")[0]) else lines)
        return _pairs(captions, rows, lambda row: [row[0], ",".join(row[1:])])
    raise DatasetError(
        f"{captions}: not COCO JSON, Karpathy JSON, `image,caption` CSV or Flickr token.txt"
    )


_Line = TypeVar("_Line", str, list[str])


def _pairs(
    captions: Path, lines: Iterable[_Line], split: Callable[[_Line], Sequence[str]]
) -> Iterator[tuple[str, str]]:
    """(photo name, one caption) for each line that is not empty. split: line → the two parts."""
    for number, line in enumerate(lines, 1):
        if not line or not any(part.strip() for part in line):
            continue
        parts = split(line)
        name = parts[0].strip().split("#")[0]
        if len(parts) != 2 or not _names_image(name):
            raise DatasetError(f"{captions}: entry {number} is not a photo name and a caption")
        yield name, _clean(parts[1])


@lru_cache(maxsize=8)  # a photo's captions follow one another, so names repeat
def _names_image(name: str) -> bool:
    return PurePosixPath(name.strip().split("#")[0]).suffix.lower() in IMAGE_SUFFIXES


def _clean(caption: str) -> str:
    return " ".join(str(caption).split())
