"""The photos that a user names, by files, folders and globs."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from pipeline.photos.drive.answers import answer_of, prompt_answer_of
from pipeline.photos.folder import list_photos


def find_photos(paths: Iterable[str], notices: list[str] | None = None) -> list[str]:
    """The given files, the photos below the given folders, and the matches of globs.

    Photos of one folder or glob are sorted, and no file is named twice. A name that matches nothing
    stays in the list, so that captioning it tells what is wrong. notices: gets a line about what
    else a folder holds. Raises FolderError if a folder cannot be read, and StalledError if the
    drive of one of them does not answer.
    """
    paths = list(paths)
    for path in paths:
        prompt_answer_of(partial(os.path.exists, path), path)
    return answer_of(lambda: _find_photos(paths, notices))


def _find_photos(paths: Iterable[str], notices: list[str] | None) -> list[str]:
    found: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            below = list_photos(Path(path))
            found.extend(str(below.folder / name) for name in below.paths)
            if notices is not None and (line := below.notice()):
                notices.append(line)
        elif os.path.exists(path):
            found.append(path)
        else:
            found.extend(sorted(glob.glob(path, recursive=True)) or [path])
    return list(dict.fromkeys(found))
