"""What `--images` names: a folder, or tars, Parquet files and photos on drives or in stores.

A photo has a name, which the cache keeps: its path below the folder, with the name of its tar or
Parquet file as a folder above it (`photos-000.tar/000123.jpg`). A source says where its bytes lie.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Protocol

from pipeline.photos.folder import IMAGE_SUFFIXES, FolderPhotos, list_photos, notice_of
from pipeline.photos.sources.ahead import DaemonThreads
from pipeline.photos.sources.errors import SourceError
from pipeline.photos.sources.parquets import ParquetIndex, index_parquet
from pipeline.photos.sources.patterns import is_pattern, items_of, root_of
from pipeline.photos.sources.places import Place, StoredObject, is_address, without_secrets
from pipeline.photos.sources.reading import forget
from pipeline.photos.sources.remote import listed, size_of
from pipeline.photos.sources.tars import MakeTexts, TarIndex, index_tar, suffix_of

_PARQUET = (".parquet", ".parq")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_AT_ONCE = 8  # containers that are looked into

Report = Callable[[int, int], None]


class Source(Protocol):
    """Photos by name. `label` says for messages what the user named, without secrets."""

    label: str

    @property
    def remote(self) -> bool:
        """Whether the photos come over a network."""
        ...

    def photos(self) -> FolderPhotos:
        """The names of all photos in their order, and what was left out."""
        ...

    def place(self, name: str) -> Place:
        """Where a photo lies, also one that is not there."""
        ...

    def order(self, name: str) -> int | None:
        """Where a photo comes among the others; None if that does not matter."""
        ...

    def is_gone(self) -> bool:
        """Whether nothing of it is there any more, as a folder when its drive is unplugged."""
        ...


class Folder:
    """A folder on a drive. Nothing is looked at before it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.label = str(path)
        self.remote = False

    def photos(self) -> FolderPhotos:
        return list_photos(self.path)

    def place(self, name: str) -> Place:
        return os.path.join(self.path, name)

    def order(self, name: str) -> int | None:
        return None

    def is_gone(self) -> bool:
        return not os.path.isdir(self.path)


class LooseIndex:
    """Photos that are files or objects by themselves."""

    def __init__(self, names: Sequence[str], places: Sequence[Place]) -> None:
        self.names, self._places = names, places
        self.left_out: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.names)

    def place(self, number: int) -> Place:
        return self._places[number]


Index = TarIndex | ParquetIndex | LooseIndex


class Collection:
    """Tars, Parquet files, and photos by themselves, in their order."""

    def __init__(self, label: str, root: str, indexes: Sequence[tuple[str, Index]]) -> None:
        """root: the folder or address above them. indexes: with the name of each, which is empty
        for photos by themselves. Raises SourceError if two have one name.
        """
        self.label, self.root = label, root
        self.remote = is_address(root)
        self.indexes = list(indexes)
        self._firsts = [0]
        for _, index in self.indexes:
            self._firsts.append(self._firsts[-1] + len(index))
        self._numbers = {name: number for number, name in enumerate(self.names())}
        if len(self._numbers) < self._firsts[-1]:
            raise SourceError(f"{label}: several photos have one name, as two tars of one name do")

    def names(self) -> Iterator[str]:
        for above, index in self.indexes:
            prefix = f"{above}/" if above else ""
            if isinstance(index, ParquetIndex):
                yield from (prefix + index.name(row) for row in range(len(index)))
            else:
                yield from (prefix + name for name in index.names)

    def photos(self) -> FolderPhotos:
        left_out: Counter[str] = Counter()
        for _, index in self.indexes:
            left_out += index.left_out
        return FolderPhotos(Path(self.label), list(self.names()), left_out)

    def place(self, name: str) -> Place:
        number = self._numbers.get(name)
        if number is None:  # as in a cache of more photos
            if is_address(self.root):
                return StoredObject(self.root + name, -1)
            return os.path.join(self.root, name)
        which = bisect_right(self._firsts, number) - 1
        return self.indexes[which][1].place(number - self._firsts[which])

    def order(self, name: str) -> int | None:
        return self._numbers.get(name)

    def is_gone(self) -> bool:
        return False  # reading says so itself

    def notices(self) -> list[str]:
        lines = []
        if (line := notice_of(self.label, self._firsts[-1], self.photos().left_out)) is not None:
            lines.append(line)
        for _, index in self.indexes:
            if isinstance(index, ParquetIndex):
                lines += index.notes
        return lines

    def forget_captions(self) -> None:
        """Free the memory of texts that were read."""
        for _, index in self.indexes:
            if isinstance(index, TarIndex):
                index.captions, index.texts = None, {}


def open_source(
    images: Path | str | Source,
    *,
    make_texts: MakeTexts | None = None,
    image_column: str | None = None,
    report: Report | None = None,
) -> Source:
    """What `--images` names, looked into as far as it is no folder.

    make_texts: for captions of texts in tars; None if none are wanted. image_column: of
    Parquet files. report: is told how many tars and Parquet files are looked into, of how many.
    Raises SourceError.
    """
    if not isinstance(images, (Path, str)):
        return images
    text = str(images)
    if not is_address(text) and os.path.isdir(text):
        return Folder(Path(text))
    if not is_address(text) and not is_pattern(text):
        _check_there(text)
    root, label = root_of(text), without_secrets(text)
    if is_address(text) and not is_pattern(text) and _is_remote_folder(text):
        items, root = [text], text.rstrip("/") + "/"
    else:
        items = items_of(text)
    kinds = [(item, _kind(item)) for item in items]
    indexes: list[tuple[str, Index]] = []
    loose: list[tuple[str, Place]] = []
    left_out: Counter[str] = Counter()
    threads = DaemonThreads(_AT_ONCE)
    asked: list[tuple[str, Future[Index]]] = []
    try:
        for item, kind in kinds:
            name = _below(root, item)
            forget(item)
            look: Callable[[], Index]
            if kind == "tar":
                look = partial(index_tar, item, make_texts)
            elif kind == "parquet":
                look = partial(index_parquet, item, image_column)
            else:
                _add_loose(item, name, kind, loose, left_out)
                continue
            asked.append((name, threads.submit(look)))
        for number, (name, future) in enumerate(asked):
            if report is not None:
                report(number, len(asked))
            indexes.append((name, future.result()))
    finally:
        for _, future in asked:
            future.cancel()
        threads.end()
    if loose or not indexes:
        index = LooseIndex([name for name, _ in loose], [place for _, place in loose])
        index.left_out = left_out
        indexes.append(("", index))
    return Collection(label, root, indexes)


def _check_there(path: str) -> None:
    """Raise SourceError if there is nothing of this name."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise SourceError(f"{path}: no such folder, tar, Parquet file or photo") from None
    except OSError as error:
        raise SourceError(f"{path}: cannot read ({error.strerror or error})") from None


def names_container(text: str) -> bool:
    """Whether a text names tars, Parquet files or an address, and not files and folders."""
    if is_address(text):
        return True
    return not os.path.isdir(text) and text.lower().endswith((".tar", *_COMPRESSED, *_PARQUET))


def _kind(item: str) -> str:
    """`tar`, `parquet`, `photo`, `folder` or `remote folder`. Raises SourceError."""
    name = without_secrets(item).lower()
    if name.endswith((".tar", *_COMPRESSED)):
        return "tar"
    if name.endswith(_PARQUET):
        return "parquet"
    if is_address(item):
        return "photo" if suffix_of(name) in IMAGE_SUFFIXES else "remote folder"
    if os.path.isdir(item):
        return "folder"
    if suffix_of(name) in IMAGE_SUFFIXES:
        return "photo"
    try:
        with open(item, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise SourceError(f"{item}: cannot read ({error.strerror or error})") from None
    if start[:4] == b"PAR1":
        return "parquet"
    if start[257:262] == b"ustar":
        return "tar"
    raise SourceError(f"{item}: is no folder, tar, Parquet file or photo")


def _is_remote_folder(address: str) -> bool:
    """Whether an address means what lies below it, and no tar, Parquet file or photo."""
    return _kind(address) == "remote folder"


def _add_loose(
    item: str,
    name: str,
    kind: str,
    loose: list[tuple[str, Place]],
    left_out: Counter[str],
) -> None:
    """Add a photo, or those of a folder."""
    shown = without_secrets(item)
    if kind == "photo":
        if not is_address(item):
            loose.append((name, item))
            return
        try:
            loose.append((name, StoredObject(item, size_of(item))))
        except FileNotFoundError:
            raise SourceError(f"{shown}: no such object") from None
    elif kind == "folder":
        found = list_photos(Path(item))
        loose += [(f"{name}/{below}", os.path.join(item, below)) for below in found.paths]
        left_out += found.left_out
    else:
        try:
            objects = listed(item)
        except FileNotFoundError:
            raise SourceError(f"{shown}: no such object, and nothing below it") from None
        above = f"{name}/" if name else ""
        base = item.rstrip("/") + "/"
        for below, size in objects.items():
            parts = below.split("/")
            if any(part.startswith(".") for part in parts):
                left_out["hidden"] += 1
            elif suffix_of(below) in IMAGE_SUFFIXES:
                loose.append((above + below, StoredObject(base + below, size)))
            else:
                left_out[suffix_of(below) or "without suffix"] += 1


def _below(root: str, item: str) -> str:
    """The name of an item below the root of its pattern, without a query."""
    # Without the scheme, of which some have two: `s3://` and `s3a://`.
    name, plain = (without_secrets(each).rpartition("://")[2] for each in (item, root))
    if name.startswith(plain):
        name = name[len(plain) :]
    elif name.rstrip("/") + "/" == plain:
        name = ""
    return name.strip("/")
