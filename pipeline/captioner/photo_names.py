"""The photos that a user names, by files, folders and globs."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from pipeline.photos.drive.answers import answer_of, prompt_answer_of
from pipeline.photos.folder import list_photos
from pipeline.photos.sources.places import Place, shown
from pipeline.photos.sources.source import Collection, names_container, open_source


def find_photos(
    paths: Iterable[str],
    notices: list[str] | None = None,
    places: dict[str, Place] | None = None,
) -> list[str]:
    """The given files, the photos below the given folders, and the matches of globs.

    Photos of one folder or glob are sorted, and no file is named twice. A name that matches nothing
    stays in the list, so that captioning it tells what is wrong. notices: gets a line about what
    else a folder holds. places: gets where photos lie that are in tars, in Parquet files or at
    addresses, by name; without it, these are files like others. Raises FolderError if a folder
    cannot be read, SourceError if a tar or the like cannot be, and StalledError if the drive of one
    of them does not answer.
    """
    paths = list(paths)
    for path in paths:
        prompt_answer_of(partial(os.path.exists, path), path)
    return answer_of(lambda: _find_photos(paths, notices, places))


def _find_photos(
    paths: Iterable[str], notices: list[str] | None, places: dict[str, Place] | None
) -> list[str]:
    found: list[str] = []
    for path in paths:
        if places is not None and names_container(path):
            found.extend(_find_lying(path, notices, places))
        elif os.path.isdir(path):
            below = list_photos(Path(path))
            found.extend(str(below.folder / name) for name in below.paths)
            if notices is not None and (line := below.notice()):
                notices.append(line)
        elif os.path.exists(path):
            found.append(path)
        else:
            found.extend(sorted(glob.glob(path, recursive=True)) or [path])
    return list(dict.fromkeys(found))


def _find_lying(path: str, notices: list[str] | None, places: dict[str, Place]) -> list[str]:
    """The photos of tars, Parquet files or addresses, by names under which `places` gets them."""
    source = open_source(path)
    names = []
    for name in source.photos().paths:
        place = source.place(name)
        places[shown(place)] = place
        names.append(shown(place))
    if notices is not None and isinstance(source, Collection):
        notices += source.notices()
    return names
