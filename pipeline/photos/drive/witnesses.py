"""Telling a drive that is gone from photos that are missing.

Photos that a captions file names and that were never there are set aside. When a drive is unmounted
during a run, its folder is there and empty, and every further photo looks just like them. So a few
photos that were there when the run began are remembered.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import chain, islice

from cache.errors import CapError
from pipeline.photos.sources.places import Place, shown
from pipeline.photos.sources.reading import is_there

_WITNESSES = 256
_NEIGHBOURS = 2  # on each side of a photo
_ENOUGH = 3  # one photo may have been removed on purpose


class VanishedError(CapError):
    """Raised when photos have vanished since the run began. The message is one line."""


class Witnesses:
    """Photos, evenly spread over a run, that were there when it began."""

    def __init__(self, rows: Sequence[Sequence[int]], path_of: Callable[[int], Place]) -> None:
        """rows: of the run, ascending, in parts. path_of: the photo of a row."""
        every = max(1, sum(map(len, rows)) // _WITNESSES)
        self._rows = list(islice(chain.from_iterable(rows), 0, None, every))
        self._path_of = path_of
        self._there: list[int] = []

    def look(self) -> None:
        """Note which of them are there now. Those in containers and stores were just found there;
        asking a store about hundreds of photos would take seconds.
        """
        for row in self._rows:
            place = self._path_of(row)
            if not isinstance(place, str) or is_there(place):
                self._there.append(row)

    def check(self, row: int) -> None:
        """Raise VanishedError if the witnesses beside a row without its photo are gone too."""
        place = bisect_left(self._there, row)
        near = self._there[max(0, place - _NEIGHBOURS) : place + _NEIGHBOURS]
        if len(near) < _ENOUGH or any(is_there(self._path_of(other)) for other in near):
            return
        raise VanishedError(
            f"{shown(self._path_of(row))}: is gone, like the photos around it that were there when "
            "the run began; what is done is kept, connect the drive and run the same command again "
            "to continue"
        )
