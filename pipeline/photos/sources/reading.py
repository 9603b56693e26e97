"""The bytes of a photo that lies in a container or in a store, and whether it is there."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.photos.drive.shortages import is_shortage
from pipeline.photos.sources.ahead import Ahead, Fetched
from pipeline.photos.sources.errors import GO_ON, SourceError
from pipeline.photos.sources.parquets import RowGroups
from pipeline.photos.sources.places import (
    Cell,
    Part,
    Place,
    StoredObject,
    address_of,
    is_address,
    without_secrets,
)
from pipeline.photos.sources.ranges import LocalFiles
from pipeline.photos.sources.remote import exists, fetch

# Of this process: open files and row groups are shared by its threads, and never sent to others.
_files, _groups, _ahead = LocalFiles(), RowGroups(), Ahead()


def forget(container: str) -> None:
    """Keep nothing of a container, which may be another one by now."""
    _files.forget(container)
    _groups.forget(container)


def begin_reading(places: list[Place]) -> Fetched | None:
    """Ask for remote photos that will be read soon; None if there is nothing to wait for."""
    return _ahead.begin(places)


def bytes_of(place: Part | StoredObject | Cell, fetched: Fetched | None = None) -> bytes | None:
    """The bytes of a photo; None if its row holds none.

    fetched: what was asked for before. Raises FileNotFoundError for an object that is missing,
    OSError, or SourceError where the photo's container or store is at fault.
    """
    try:
        data = fetched.take(place) if fetched is not None else None
        if data is not None:
            return data
        if isinstance(place, Cell):
            return _groups.value(place)
        if isinstance(place, StoredObject):
            return fetch(place.address, None, place.size)
        if is_address(place.container):
            return fetch(place.container, place.start, place.size)
        return _files.read(place.container, place.start, place.size)
    except OSError as error:
        if isinstance(place, StoredObject) or is_shortage(error):
            raise
        # All photos in it are as lost as this one, and none of them is at fault.
        reason = error.strerror or error
        raise SourceError(
            f"{without_secrets(place.container)}: cannot be read any more ({reason}); {GO_ON}"
        ) from None


def is_there(place: Place) -> bool:
    """Whether the file, the container or the object of a photo is there. Raises SourceError."""
    if isinstance(place, (str, Path)):
        return os.path.exists(place)
    address = address_of(place)
    if address is not None:
        return exists(address)
    assert isinstance(place, (Part, Cell))
    return os.path.exists(place.container)


def changed_ns(place: Place) -> int:
    """When the file of a photo, its name or its rights were last changed, since 1970; 0 if it is
    gone or lies in a store, which are not asked.
    """
    if address_of(place) is not None:
        return 0
    path = place.container if isinstance(place, (Part, Cell)) else place
    assert isinstance(path, (str, Path))
    try:
        return os.stat(path).st_ctime_ns  # unlike st_mtime, `cp -p` and archives cannot set it
    except OSError:
        return 0
