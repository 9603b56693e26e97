"""The photos to work on and their captions, from one or several sources.

Photos come in a fixed order. A photo is identified by its own id (COCO's number, otherwise its name
as the captions file writes it, or its path), never by its position in a list.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from cache.record import Strings
from pipeline.captions.formats.beside import SIDECAR, read_sidecars
from pipeline.captions.formats.encoding import open_text
from pipeline.captions.formats.inside import METADATA, read_metadata
from pipeline.captions.formats.json_files import read_json
from pipeline.captions.formats.parquet_tables import is_parquet, read_parquet
from pipeline.captions.formats.tables import read_table
from pipeline.captions.formats.with_photos import MemberTexts, read_with_photos
from pipeline.captions.image_ids import NumberId
from pipeline.captions.photo_index import Matches, PhotoIndex
from pipeline.captions.photos import Photos
from pipeline.captions.records import Choice, DatasetError, Photo, Reading, check_text
from pipeline.captions.understood import Understood, joined_notes, understood, what_is_there
from pipeline.photos.folder import FolderPhotos, list_photos
from pipeline.photos.sources.source import Collection, Report, Source, open_source
from train.option import SettingError

# Files beside the photos, and texts inside them, are read only if these words ask for them.
WITHOUT_FILE = frozenset((SIDECAR, METADATA))

Captions = Path | Sequence[Path]


@dataclass(frozen=True)
class Dataset:
    """Photos with captions, and what was understood of each source of captions."""

    photos: Photos
    sources: list[Understood]
    notes: list[str]  # of all sources together, one line each

    def lines(self) -> list[str]:
        return [line for source in self.sources for line in source.lines()] + self.notes


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Python's collector would walk through a growing million of objects again and again, and they
    hold no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_collector()
def read_photos(
    images: Path | str | Source,
    captions: Captions | None = None,
    *,
    split: str | None = None,
    only: Path | None = None,
    limit: int | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Photos:
    """The photos to work on, in the order of the captions file, or else sorted by path. Photos of
    tars and Parquet files come in the order in which they lie, whatever the captions file has,
    because they are read one after the other.

    images: a folder, or what `open_photos` takes or has opened. captions: a captions file of any
    layout, or several, whose captions are joined by photo; `sidecar` for text files beside the
    photos, `metadata` for captions inside them; None for every photo of `images`, with the
    captions that lie with the photos of tars and Parquet files. Photos that are not in `images` are
    left out. split: comma-separated splits of the captions file. only: a file with one photo name
    per line; other photos are left out. limit: how many photos to return at most. image_column,
    caption_column: where the columns or fields cannot be found out. say: is told, line by line,
    what was understood.

    Raises DatasetError if a file cannot be read, no photo is left, or the arguments contradict each
    other; SourceError as `open_photos` does.
    """
    choice = Choice(split, image_column, caption_column)
    source = open_photos(images, captions, choice)
    told: list[str] = []
    reading = None
    if isinstance(source, Collection) and not _sources(captions):
        reading = read_with_photos(source, choice)
    if not _sources(captions) and reading is None:
        if split is not None:
            raise DatasetError("--split needs a captions file with splits as --captions")
        found = source.photos()
        photos = Photos.pack(Photo(path, path) for path in found.paths)
        if isinstance(source, Collection):
            told += source.notices()
        elif line := found.notice():
            told.append(line)
        if only is not None:
            photos = photos.take(listed_rows(photos, only))
        if not photos:
            raise DatasetError(f"{source.label}: no photos found{_containers_in(found)}")
    else:
        if reading is not None:
            dataset = _dataset([reading], PhotoIndex(source), only)
        else:
            dataset = read_dataset(captions, choice, images=source, only=only)
        photos = dataset.photos
        told += dataset.lines()
        if isinstance(source, Collection):
            told += source.notices()
    if isinstance(source, Collection):
        source.forget_captions()
        places = np.array([source.order(path) or 0 for path in photos.paths], np.int64)
        photos = photos.take(np.argsort(places, kind="stable"))
    for line in told if say is not None else ():
        say(line)  # type: ignore[misc]
    photos = photos[:limit]
    if not photos:
        raise DatasetError(f"{source.label}: no photos found")
    return photos


def open_photos(
    images: Path | str | Source,
    captions: Captions | None,
    choice: Choice,
    report: Report | None = None,
) -> Source:
    """The source of photos that `--images` names; what tars and Parquet files hold is then known.

    captions, choice: as for `read_photos`; texts in tars are read if they are to be the captions.
    report: as for `open_source`.
    Raises SourceError, or DatasetError if it is not clear which field of a text is the caption.
    """
    if not isinstance(images, (Path, str)):
        return images
    wanted = not _sources(captions) or Path(SIDECAR) in _sources(captions)
    # For a captions file, the column is one of that file.
    column = choice.image_column if wanted else None
    make_texts = partial(MemberTexts, choice) if wanted else None
    return open_source(images, make_texts=make_texts, image_column=column, report=report)


def _containers_in(found: FolderPhotos) -> str:
    """What to say of a folder without photos if it holds tars or Parquet files."""
    for suffix in (".tar", ".parquet"):
        if found.left_out[suffix]:
            return f"; for the photos in its {suffix} files, --images '{found.folder}/*{suffix}'"
    return ""


@_without_collector()
def read_captions(
    captions: Captions,
    *,
    split: str | None = None,
    images: Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Photos:
    """The photos of captions files of any layout.

    images: the image folder; without it, the paths of the photos are their names in the file. The
    other arguments are those of `read_photos`. Raises DatasetError if a layout is unknown or a file
    names no photo.
    """
    choice = Choice(split, image_column, caption_column)
    dataset = read_dataset(captions, choice, images=images)
    for line in dataset.lines() if say is not None else ():
        say(line)  # type: ignore[misc]
    return dataset.photos


def read_dataset(
    captions: Captions | None,
    choice: Choice,
    *,
    images: Path | str | Source | None = None,
    only: Path | None = None,
) -> Dataset:
    """Read captions, join them by photo, and say what was understood.

    images, only: as for `read_photos`. Raises DatasetError.
    """
    sources = _sources(captions)
    opened = None if images is None else open_photos(images, captions, choice)
    without_file = {str(source) for source in sources} <= WITHOUT_FILE
    if choice.names_columns and without_file and not isinstance(opened, Collection):
        raise SettingError("--image-column and --caption-column have no effect without a file")
    index = PhotoIndex(opened) if opened is not None else None
    return _dataset([_read(source, index, choice) for source in sources], index, only)


def _dataset(readings: list[Reading], index: PhotoIndex | None, only: Path | None) -> Dataset:
    """What sources of captions say, joined by photo."""
    matches = [index.match(reading.names) if index is not None else None for reading in readings]
    photos, missing, ids_differ = _join(readings, matches)
    if only is not None:
        rows = listed_rows(chain(photos, missing), only)
        photos = photos.take(rows[rows < len(photos)])
    if index is not None and not photos:
        raise _none_found(index, readings, matches, bool(only))
    described = [
        understood(reading, match, index) for reading, match in zip(readings, matches, strict=True)
    ]
    return Dataset(photos, described, joined_notes(photos, ids_differ, len(readings)))


def _sources(captions: Captions | None) -> list[Path]:
    return [captions] if isinstance(captions, Path) else list(captions or ())


def _read(source: Path, index: PhotoIndex | None, choice: Choice) -> Reading:
    if str(source) in WITHOUT_FILE:
        if index is None:
            raise DatasetError(f"--captions {source} needs a folder of photos (--images)")
        if isinstance(index.source, Collection):
            return _read_with_photos(source, index.source, choice)
        if choice.split is not None:
            raise DatasetError(f"--captions {source} has no splits")
        read = read_sidecars if str(source) == SIDECAR else read_metadata
        return read(list_photos(index.images).paths, index)
    if is_parquet(source):
        return read_parquet(source, index, choice)
    file, encoding = open_text(source)
    try:
        with file:
            start = file.read(4096).lstrip("\ufeff \t\r\n")
            file.seek(0)
            read_it = read_json if start[:1] in ("{", "[") else read_table
            return read_it(source, file, encoding, index, choice)
    except UnicodeDecodeError as error:
        raise DatasetError(f"{source}: not the text it seemed to be ({error.reason})") from None


def _read_with_photos(asked: Path, source: Collection, choice: Choice) -> Reading:
    if str(asked) == METADATA:
        raise DatasetError(
            f"{source.label}: captions inside photos are read in folders only; unpack them, or "
            "leave out --captions for the texts that lie with them"
        )
    reading = read_with_photos(source, choice)
    if reading is None:
        raise DatasetError(
            f"{source.label}: no captions lie with the photos; 000.txt or 000.json beside 000.jpg "
            "is looked for in tars, and a column of texts in Parquet files"
        )
    return reading


def _join(
    readings: Sequence[Reading], matches: Sequence[Matches | None]
) -> tuple[Photos, list[Photo], bool]:
    """(photos with the captions of all sources, photos without a file, whether names have taken the
    place of ids because some ids stand for several photos).

    Raises DatasetError for half of a character.
    """
    numbers: dict[str, int] = {}  # of photos, by path
    names: list[str] = []
    ids: list[str] = []
    missing: dict[str, Photo] = {}
    parts: list[tuple[Strings, NDArray[np.int32]]] = []
    for reading, match in zip(readings, matches, strict=True):
        photo_of = np.full(len(reading.names), -1, np.int32)
        for name, number in reading.names.items():
            path = name if match is None else match.paths[number]
            image_id = reading.ids.get(name, name)
            if path is None:
                missing.setdefault(name, Photo(image_id, name))
                continue
            photo = numbers.setdefault(path, len(numbers))
            if photo == len(names):
                names.append(name)
                ids.append(image_id)
            photo_of[number] = photo
            half = reading.half_of_a_character(number)
            if half is not None or not path.isascii():
                check_text(path, half, reading.source)
        parts.append(reading.captions(photo_of))
    unique = len(readings) == 1 and not readings[0].ids  # the names are the ids
    differ = not unique and len(set(ids)) < len(ids)
    differ |= any(reading.ids_differ for reading in readings)
    if differ:
        ids = names if len(set(names)) == len(names) else list(numbers)
    sources = ", ".join(reading.source for reading in readings)
    for image_id in ids:
        if not image_id.isascii():
            check_text(image_id, None, sources)
    texts, rows = parts[0] if len(parts) == 1 else _without_repetitions(parts)
    photos = Photos(
        Strings.pack(ids),
        Strings.pack(numbers),
        np.array([isinstance(image_id, NumberId) for image_id in ids], bool),
        texts,
        np.searchsorted(rows, np.arange(len(ids) + 1, dtype=np.int32)),
    )
    return photos, list(missing.values()), differ


def _without_repetitions(
    parts: Sequence[tuple[Strings, NDArray[np.int32]]],
) -> tuple[Strings, NDArray[np.int32]]:
    """The captions of several sources, photo after photo, and the photo of each.

    Two files that overlap do not make a caption count twice. Within one, it counts as it is there.
    """
    texts = Strings.join([part for part, _ in parts])
    rows = np.concatenate([photos for _, photos in parts])
    source = np.repeat(np.arange(len(parts)), [len(photos) for _, photos in parts])
    order = np.argsort(rows, kind="stable")
    rows, source = rows[order], source[order]
    kept = np.ones(len(order), bool)
    for photo in np.unique(rows[1:][(rows[1:] == rows[:-1]) & (source[1:] != source[:-1])]):
        first, stop = np.searchsorted(rows, [photo, photo + 1])
        before, found = set[bytes](), set[bytes]()
        for place in range(first, stop):
            if source[place] != source[place - 1]:
                before |= found
            text = texts.raw(int(order[place]))
            kept[place] = text not in before
            found.add(text)
    return texts.take(order[kept]), rows[kept]


def _none_found(
    index: PhotoIndex,
    readings: Sequence[Reading],
    matches: Sequence[Matches | None],
    listed: bool,
) -> DatasetError:
    found = [match for match in matches if match is not None]
    sources = ", ".join(reading.source for reading in readings)
    if listed and any(match.found for match in found):
        return DatasetError(f"{index.label}: none of the photos of --only is here")
    first = next((match for match in found if match.missing or match.ambiguous), None)
    if first is None:
        return DatasetError(f"{sources}: names no photo")
    return DatasetError(
        f"{index.label}: none of the photos of {sources} is here ({what_is_there(first, index)})"
    )


def listed_rows(photos: Iterable[Photo], only: Path) -> NDArray[np.int64]:
    """(K,) which photos the file `only` names, one per line, with or without folders.

    Raises DatasetError if it names a photo that is not among `photos`.
    """
    file, _ = open_text(only)
    with file:
        wanted = {line.strip() for line in file if line.strip()}
    kept, known = [], set[str]()
    for row, photo in enumerate(photos):
        names = {photo.path, PurePosixPath(photo.path).name, photo.image_id}
        if not names.isdisjoint(wanted):
            kept.append(row)
            known |= names
    unknown = sorted(wanted - known)
    if unknown:
        raise DatasetError(
            f"{only}: {len(unknown):,} of {len(wanted):,} names are not among the photos "
            f"(first: {unknown[0]})"
        )
    return np.array(kept, np.int64)
