"""Finding the photos that captions name: the files of a folder by path, by its end, or by name.

People write names with folders of another machine in front, without a suffix, in other letter case,
with backslashes, percent-encoded, or as addresses. A name matches a file only if no other file fits
as well.
"""

from __future__ import annotations

import os
import re
import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.captions.records import DatasetError
from pipeline.photos.sources.source import Collection, Folder, Source

# How a name led to a file, best first. The words are for the user.
BY_PATH, BY_END, BY_NAME = "by path", "by the end of the path", "by file name alone"

_PHOTO_NAME = re.compile(
    r"\.(?:jpe?g|jpe|jfif|mpo|a?png|webp|gif|bmp|tiff?|hei[cf]|hif|avif|jp2|j2k|jpx|jxl|qoi"
    r"|p[bgpn]m|dng|cr[23w]|nef|nrw|arw|orf|raf|rw2|raw)$",
    re.IGNORECASE,
)
_ADDRESS = re.compile(r"(?:https?|file|s3|gs)://", re.IGNORECASE)
# Flickr's files number the captions of a photo: `x.jpg#0`, in Chinese ones `x.jpg#zhc#0`.
_NUMBERED = re.compile(r"#(?:[a-z]{2,4}#)?[0-9]{1,3}$")
_PERCENT = re.compile(r"%[0-9a-fA-F]{2}")
_COMPARED_NAMES = 20_000  # with a name that was not found, for those that look alike


def without_number(name: str) -> str:
    """`x.jpg#0` → `x.jpg`. The name of a file may contain `#`: `x#1.jpg` stays."""
    return _NUMBERED.sub("", name) if "#" in name else name


@lru_cache(maxsize=1024)  # captions of one photo mostly follow one another
def looks_like_photo(text: str) -> bool:
    """Whether a text looks like the name or the address of a photo."""
    text = text.strip()
    if len(text) > 1000 or "\n" in text:
        return False
    return bool(_PHOTO_NAME.search(without_number(text)) or _ADDRESS.match(text))


@dataclass(frozen=True, slots=True)
class Match:
    """The file that a name stands for. `agreeing`: parts of the paths, from the end, that agree."""

    path: str
    how: str
    agreeing: int


@dataclass
class Matches:
    """The files of the N names of one source, and the names without one."""

    paths: list[str | None]  # N paths below the folder; None for a name without a file
    how: Counter[str] = field(default_factory=Counter)
    missing: list[str] = field(default_factory=list)
    ambiguous: list[str] = field(default_factory=list)  # names that fit several files, or share one

    @property
    def found(self) -> int:
        """How many names have a file."""
        return len(self.paths) - self.paths.count(None)


class PhotoIndex:
    """The files below a folder, by name, or the photos of another source. Links to folders are
    followed, each folder once.
    """

    def __init__(self, images: Path | Source) -> None:
        self.source: Source = Folder(images) if isinstance(images, Path) else images
        self.label = self.source.label
        # The folder of the photos, or above their tars.
        if isinstance(self.source, Folder):
            self.images, paths = self.source.path, _files(self.source.path)
        else:
            root = self.source.root if isinstance(self.source, Collection) else ""
            self.images = Path(root.rpartition("://")[2])
            paths = iter(self.source.photos().paths)
        self._parents = tuple(_key(part) for part in self.images.resolve().parts[1:])
        self._roots = {str(self.images), os.path.abspath(self.images)}
        self._roots.add(os.path.realpath(self.images))
        # Nearly all names are those of one file, and a list of one takes more than the rest.
        self._by_name: dict[str, str | list[str]] = {}
        self._keys: list[str] | None = None  # the same names, sorted, when they are first needed
        self.files = 0
        for path in paths:
            first = self._by_name.setdefault(_key(path.rpartition("/")[2]), path)
            if isinstance(first, list):
                first.append(path)
            elif first is not path:
                self._by_name[_key(path.rpartition("/")[2])] = [first, path]
            self.files += 1

    def __contains__(self, path: str) -> bool:
        return path in self._named(_key(path.rpartition("/")[2]))

    def _named(self, key: str) -> Sequence[str]:
        """The paths of all files of this name."""
        return _listed(self._by_name.get(key, ()))

    def some_files(self) -> Iterator[str]:
        return (path for paths in self._by_name.values() for path in _listed(paths))

    def match(self, names: Sequence[str] | Mapping[str, int]) -> Matches:
        """Match all names of one source. Several names may stand for one file only if they differ
        in case, in how letters are composed, and the like.
        """
        found = Matches([])
        once, often = set[str](), set[str]()  # paths that one name, or several, stand for
        for name in names:
            match = self.find(name)
            if match is None:
                found.missing.append(name)
            elif match == _AMBIGUOUS:
                found.ambiguous.append(name)
            else:
                found.paths.append(match.path)
                found.how[match.how] += 1
                (often if match.path in once else once).add(match.path)
                continue
            found.paths.append(None)
        claims = dict[str, list[tuple[int, str]]]()
        for number, name in enumerate(names) if often else ():
            path = found.paths[number]
            if path in often:
                claims.setdefault(path, []).append((number, name))
        for each in claims.values():
            self._settle(each, found)
        return found

    def _settle(self, claims: Sequence[tuple[int, str]], found: Matches) -> None:
        """Take a file from those of several names, with their numbers, that fit it less."""
        matches = [(number, name, self.find(name)) for number, name in claims]
        most = max(match.agreeing for _, _, match in matches if match is not None)
        best = [(name, match) for _, name, match in matches if match and match.agreeing == most]
        # `train/1.jpg` and `val/1.jpg` cannot both be the `1.jpg` that is there.
        rivals = {_key(name.replace("\\", "/")) for name, _ in best}
        if best[0][1].how != BY_PATH and len(rivals) > 1:
            most += 1  # none of them
        for number, name, match in matches:
            if match is not None and match.agreeing < most:
                found.ambiguous.append(name)
                found.paths[number] = None
                found.how[match.how] -= 1

    def has(self, name: str) -> bool:
        """Whether a name stands for a file of the folder."""
        match = self.find(name)
        return match is not None and match != _AMBIGUOUS

    def find(self, name: str) -> Match | None:
        """The file that a name stands for; None if there is none."""
        for spelling in _spellings(name):
            match = self._find(spelling)
            if match is not None:
                return match
        return None

    def _find(self, name: str) -> Match | None:
        if name.startswith("/"):
            for root in self._roots:
                if name.startswith(root + "/"):
                    name = name[len(root) + 1 :]
                    break
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if not parts or len(name) > 4096 or "\0" in name:
            return None
        keys = [_key(part) for part in parts]
        paths = self._named(keys[-1]) or self._of_stem(keys[-1])
        if not paths:
            return None
        plain = "/".join(parts)
        for path in paths:
            if path == plain:  # and no second copy of it
                return Match(path, BY_PATH, len(parts) + len(self._parents))
        return self._best(parts, [self._compare(keys, path) for path in paths])

    def _compare(self, keys: list[str], path: str) -> Match:
        """How well a file's path agrees with the parts of a name, whose last parts agree."""
        below = [_key(part) for part in path.split("/")]
        whole = [*self._parents, *below]
        agreeing = 1
        for mine, its in zip(reversed(keys[:-1]), reversed(whole[:-1]), strict=False):
            if mine != its:
                break
            agreeing += 1
        if agreeing == len(keys) == len(below):
            return Match(path, BY_PATH, agreeing + len(self._parents))
        if agreeing > 1 or len(below) == 1 < len(keys):
            return Match(path, BY_END, agreeing)
        return Match(path, BY_NAME, agreeing)

    @staticmethod
    def _best(parts: list[str], matches: list[Match]) -> Match:
        """The one that agrees best; letters' case decides only between equals."""
        ranks = [
            (match.how == BY_PATH, match.agreeing, match.how == BY_END, _equal(parts, match.path))
            for match in matches
        ]
        top = max(ranks)
        best = [match for match, rank in zip(matches, ranks, strict=True) if rank == top]
        return best[0] if len(best) == 1 else _AMBIGUOUS

    def _of_stem(self, stem: str) -> Sequence[str]:
        """The paths of the files of this name without suffix. Other files than photos count where
        no photo has the stem, because a photo's text lies beside it under the same name.
        """
        if self._keys is None:
            self._keys = sorted(self._by_name)
        photos, others = list[str](), list[str]()
        begin = f"{stem}."
        for place in range(bisect_left(self._keys, begin), len(self._keys)):
            name = self._keys[place]
            if not name.startswith(begin):
                break
            if "." not in name[len(begin) :]:
                kind = photos if _PHOTO_NAME.search(name) else others
                kind.extend(_listed(self._by_name[name]))
        return photos or others

    def alike(self, name: str) -> str | None:
        """A file whose name looks like a name that was not found."""
        last = _key(name.replace("\\", "/").rpartition("/")[2])
        names = list(self._by_name)[:_COMPARED_NAMES]
        close = get_close_matches(last, names, n=1, cutoff=0.75)
        return self._named(close[0])[0] if close else None


_AMBIGUOUS = Match("", "", 0)


def _listed(paths: str | Sequence[str]) -> Sequence[str]:
    return (paths,) if isinstance(paths, str) else paths


def _key(name: str) -> str:
    """What names that differ in case or in how letters are composed (NFC, NFD) have in common."""
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()


def _equal(parts: list[str], path: str) -> int:
    """How many parts of a name and of a path are equal to the letter, from the end."""
    pairs = zip(reversed(parts), reversed(path.split("/")), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _spellings(name: str) -> Iterator[str]:
    """The name as written, then as it may be meant."""
    name = name.strip()
    yield name
    plain = without_number(name)
    if plain != name:
        yield plain
    if "\\" in plain:
        plain = plain.replace("\\", "/")
        yield plain
    if _ADDRESS.match(plain):
        try:
            plain = urlsplit(plain).path
        except ValueError:  # `http://[`
            return
        yield plain
    if _PERCENT.search(plain):
        yield unquote(plain)


def _files(images: Path) -> Iterator[str]:
    """The paths below a folder. Raises DatasetError if a folder cannot be read."""

    def stop(error: OSError) -> None:
        raise DatasetError(
            f"{error.filename}: cannot read this folder ({error.strerror}); "
            "give yourself permission to read it, or move it elsewhere"
        )

    listed = set()
    root = str(images)
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=stop):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in listed:  # a circle of links
            subfolders.clear()
            continue
        listed.add((status.st_dev, status.st_ino))
        subfolders.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        subfolders[:] = [n for n in subfolders if n != "lost+found" and not n.startswith(".")]
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        before = "" if below == "." else f"{below}/"
        yield from (before + name for name in names)
