"""Which files or objects a pattern such as `photos-{000..999}.tar` or `s3://bucket/*.tar` means."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.photos.sources.errors import SourceError
from pipeline.photos.sources.places import is_address, without_secrets
from pipeline.photos.sources.remote import matches

_MOST = 1_000_000  # names of one pattern
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MAGIC = "*?["


def photos_at(text: str) -> Path | str:
    """What the user wrote after `--images`: an address as it is, anything else as a path.

    Raises ValueError for nothing.
    """
    if not text:
        raise ValueError("name a folder, tars, Parquet files or an address")
    if text.lower().startswith("file://"):
        return Path(unquote(urlsplit(text).path))
    return text if is_address(text) else Path(text)


def is_pattern(text: str) -> bool:
    # In an address, a question mark begins a query.
    magic = _MAGIC.replace("?", "") if is_address(text) else _MAGIC
    return _BRACES.search(text) is not None or any(letter in _path_of(text) for letter in magic)


def items_of(images: str) -> list[str]:
    """The files or objects of a pattern, in the order of its braces, those of a glob sorted.

    A path that is there is meant literally. Raises SourceError if there is none, or one of those
    that braces name is missing.
    """
    if not is_address(images) and os.path.lexists(images):
        return [images]
    found: dict[str, None] = {}
    for name in expanded(images):
        if is_address(name):
            magic = any(letter in _path_of(name) for letter in "*[")
            these = matches(name) if magic else [name]
        else:
            these = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name]
            if these == [name] and not os.path.lexists(name):
                of = f", of {images}" if name != images else ""
                raise SourceError(f"{name}: no such file or folder{of}")
        found.update(dict.fromkeys(these))
    if not found:
        raise SourceError(f"{without_secrets(images)}: matches nothing")
    return list(found)


def root_of(images: str) -> str:
    """The folder above everything that a pattern can mean, as it is written.

    It depends on the pattern alone, and not on what it matches today, because the names of photos
    begin below it.
    """
    magic = r"[*\[{]" if is_address(images) else r"[*?\[{]"
    fixed = re.split(magic, _path_of(images), maxsplit=1)[0]
    return fixed[: fixed.rfind("/") + 1]


def expanded(pattern: str) -> Iterator[str]:
    """`a-{00..02}.tar` → `a-00.tar`, `a-01.tar`, `a-02.tar`; `{train,val}` likewise.

    Raises SourceError if there are too many.
    """
    names = [""]
    at = 0
    for braces in _BRACES.finditer(pattern):
        choices = _choices(braces[1])
        if len(names) * len(choices) > _MOST:
            raise SourceError(f"{without_secrets(pattern)}: means more than {_MOST:,} files")
        before, at = pattern[at : braces.start()], braces.end()
        names = [name + before + choice for name in names for choice in choices]
    return (name + pattern[at:] for name in names)


def _choices(inside: str) -> list[str]:
    if found := _RANGE.fullmatch(inside):
        first, last = found.groups()
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        step = 1 if int(first) <= int(last) else -1
        if abs(int(last) - int(first)) > _MOST:
            raise SourceError(f"{{{inside}}}: means more than {_MOST:,} files")
        return [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
    if "," in inside:
        return inside.split(",")
    return [f"{{{inside}}}"]


def _path_of(text: str) -> str:
    """An address without its query."""
    return text.partition("?")[0] if is_address(text) else text
