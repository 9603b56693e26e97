"""Where the bytes of one photo lie. A place is small, and can be sent to another process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple, TypeAlias

_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_USER = re.compile(r"(?<=://)[^/@\s'\"]*@")
_QUERY = re.compile(r"(://[^\s'\"?]*)\?[^\s'\"]*")


class Part(NamedTuple):
    """Bytes of a file or of an object of a store, as a member of a tar."""

    container: str  # path or address
    name: str  # of the photo in it
    start: int  # in bytes, like `size`
    size: int


class StoredObject(NamedTuple):
    """An object of a remote store."""

    address: str
    size: int  # in bytes; -1 if the store does not tell


class Cell(NamedTuple):
    """A value of a Parquet file."""

    container: str  # path or address
    name: str  # of the photo in it
    column: str  # `image`, or `image.bytes` within a struct
    group: int  # row group
    row: int  # of the row group


# A path is a file on a drive.
Place: TypeAlias = str | Path | Part | StoredObject | Cell


def is_address(text: str) -> bool:
    """Whether a text is an address such as `s3://bucket/photos`, and not a path."""
    return _ADDRESS.match(text) is not None


def address_of(place: Place) -> str | None:
    """The remote address that a place is read from; None for a local one."""
    if isinstance(place, StoredObject):
        return place.address
    if isinstance(place, (Part, Cell)) and is_address(place.container):
        return place.container
    return None


def without_secrets(text: str) -> str:
    """Addresses in a text without users, passwords and queries, in which signatures are."""
    return _QUERY.sub(r"\1", _USER.sub("", text))


def shown(place: Place) -> str:
    """A place for a message."""
    if isinstance(place, StoredObject):
        return without_secrets(place.address)
    if isinstance(place, (Part, Cell)):
        return f"{without_secrets(place.container)}/{place.name}"
    return str(place)
