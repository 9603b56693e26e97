"""What each option and argument takes, and the line about a file of another kind."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shlex
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.inspection.kinds import Kind, kind_of

_FILES = frozenset(Kind) - {Kind.RUN, Kind.SWEEP, Kind.FOLDER, Kind.OTHER, Kind.ABSENT}
_FOLDERS = frozenset((Kind.RUN, Kind.SWEEP, Kind.FOLDER))


@dataclass(frozen=True)
class Wanted:
    """What an option takes. Kinds of which nothing is said here are left to the command."""

    text: str  # completes «not …»
    takes: frozenset[Kind]
    refuses: frozenset[Kind]


def _wanted(text: str, *takes: Kind, leaves: Iterable[Kind] = ()) -> Wanted:
    return Wanted(text, frozenset(takes), (_FILES | _FOLDERS) - set(takes) - set(leaves))


CACHE = _wanted("a feature cache", Kind.CACHE)
MODEL = _wanted("a model", Kind.MODEL, Kind.RUN, leaves=[Kind.FOLDER])
PHOTOS = _wanted("a folder of photos", Kind.FOLDER)
TEXT = _wanted("a text file", Kind.TEXT)
CAPTIONS = _wanted("a captions file", Kind.TEXT)
CACHE_OR_CAPTIONS = _wanted("a feature cache or a captions file", Kind.CACHE, Kind.TEXT)
WEIGHTS = _wanted("a file of a network's weights", Kind.WEIGHTS)
PICTURES = _wanted("photos", Kind.PICTURE, Kind.FOLDER, leaves=[Kind.TEXT])
PHOTO = _wanted("a photo", Kind.PICTURE, leaves=[Kind.TEXT])
RUNS = _wanted("a folder of runs", *_FOLDERS)
PICKLE = _wanted("a pickled vocabulary", leaves=[Kind.TEXT])  # of protocol 0
NEW_FOLDER = _wanted("a folder to write into", *_FOLDERS)
GALLERY = Wanted("a folder to write into", frozenset(), _FILES)  # no file belongs there
NEW_PICTURE = _wanted("a picture to write", Kind.PICTURE, leaves=[Kind.TEXT])
NEW_TEXT = _wanted("a text file to write", Kind.TEXT)

# By the names of the parameters, in all commands.
_BY_NAME = {
    **dict.fromkeys(("cache", "caches", "from_cache", "val_cache", "reuse"), CACHE),
    **dict.fromkeys(("model", "from_model"), MODEL),
    **dict.fromkeys(("only", "val_list", "predictions", "ids"), TEXT),
    "images": PHOTOS,
    "captions": CAPTIONS,
    "source": CACHE_OR_CAPTIONS,
    **dict.fromkeys(("weights", "encoder_file", "decoder_file"), WEIGHTS),
    "vocab_file": PICKLE,
    **dict.fromkeys(("paths", "like"), PICTURES),
    "photo": PHOTO,
    "folder": RUNS,
    "gallery": GALLERY,
    "sidecar_folder": GALLERY,
    **dict.fromkeys(("plot", "sheet"), NEW_PICTURE),
}
# `--out` is another thing for each command. Those that write a cache look at it themselves.
_OUT = {
    "train": NEW_FOLDER,
    "sweep": NEW_FOLDER,
    "demo": NEW_FOLDER,
    "evaluate": NEW_FOLDER,
    "import-classic": NEW_FOLDER,
    "compare-encoders": NEW_FOLDER,
    "build-vocab": NEW_TEXT,
}
# Else found missing only after the weights are read, which may be downloaded.
_MUST_BE_THERE = ("reuse", "only", "ids")
_WEIGHTS_NAME = re.compile(r"random|pretrained|[A-Z][A-Z0-9_]+")
_SOON_S = 2.0
_OWN_FOLDER = ("train", "sweep", "import-classic")
# A log or notes may be in a run's folder before it begins.
_FEW_ENTRIES, _MANY_ENTRIES = 10, 1000
_WITHOUT_FILE = ("sidecar", "metadata")  # values of --captions that name no file


def wrong_file(command: str, flags: Mapping[str, str], values: Mapping[str, Any]) -> str | None:
    """One line about the first value that is a file or folder of another kind than its option
    takes, or is missing; None if there is none.

    flags: how the user writes each parameter of the command, such as `--model`. values: of the
    parameters, in the order in which they are checked.
    """
    for name, value in values.items():
        if name == "out" and value is not None and (problem := _nothing_below(Path(value))):
            return problem
        wanted = wanted_by(command, name)
        if wanted is None:
            continue
        for path in _paths(name, value):
            kind = _kind_of(path)
            if kind is Kind.ABSENT and name in _MUST_BE_THERE:
                return f"{path}: no such file"
            own = wanted is NEW_FOLDER and command in _OWN_FOLDER and not values.get("overwrite")
            if own and (others := foreign_entries(path, kind)):
                return f"{path}: holds {others} other files; name a folder of its own with --out"
            if kind is Kind.RUN and wanted in (PHOTOS, PICTURES) and _has_folders(path):
                continue  # photos may be below
            if kind in wanted.refuses:
                return f"{path}: is {kind.value}, not {wanted.text}; " + _advice(
                    path, kind, command, flags, name
                )
    return None


def wanted_by(command: str, parameter: str) -> Wanted | None:
    """What a command's option or argument takes; None if it is no file that is looked at here."""
    return _OUT.get(command) if parameter == "out" else _BY_NAME.get(parameter)


def _paths(name: str, value: Any) -> list[str]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    texts = [str(each) for each in values if isinstance(each, (str, Path))]
    if name == "weights":  # there may be a folder of that name
        texts = [text for text in texts if not _WEIGHTS_NAME.fullmatch(text)]
    if name == "captions":
        texts = [text for text in texts if text not in _WITHOUT_FILE]
    if name == "paths" and len(texts) > 1:  # the others get their captions
        texts = []
    return texts


def _kind_of(path: str) -> Kind:
    """The kind of a path; OTHER if its drive does not answer soon, about which the command has
    more to say.
    """
    answers: queue.SimpleQueue[Kind] = queue.SimpleQueue()
    # A daemon, because a drive that is gone may keep it for ever.
    threading.Thread(target=lambda: answers.put(kind_of(path)), daemon=True).start()
    try:
        return answers.get(timeout=_SOON_S)
    except queue.Empty:
        return Kind.OTHER


def _has_folders(path: str) -> bool:
    with os.scandir(path) as entries:
        return any(entry.is_dir() for entry in entries)


def _nothing_below(out: Path) -> str | None:
    """One line if something above a path is no folder: which part of it, and what that is."""
    for above in out.parents:
        if os.path.isdir(above):
            return None
        if os.path.lexists(above):
            return f"{above}: is {_kind_of(str(above)).value}, so nothing can be written below it"
    return None


def foreign_entries(folder: str, kind: Kind) -> str:
    """How many entries, as text, a folder has that is no run's; empty if they are few."""
    if kind is not Kind.FOLDER:
        return ""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        count = sum(1 for _ in islice(entries, _MANY_ENTRIES + 1))
        if count > _FEW_ENTRIES:
            return f"{count:,}" if count <= _MANY_ENTRIES else f"more than {_MANY_ENTRIES:,}"
    return ""


def _advice(path: str, kind: Kind, command: str, flags: Mapping[str, str], given: str) -> str:
    """What to do with a file of this kind: the command's options for it, or what shows it."""
    fitting = [
        flag
        for name, flag in flags.items()
        if name != given and (wanted := wanted_by(command, name)) and kind in wanted.takes
    ]
    if wanted_by(command, given) == CACHE and kind in (Kind.TEXT, Kind.FOLDER, Kind.PICTURE):
        making = "`cap extract-features` makes one of photos and captions"
        return f"{making}; or did you mean {' or '.join(fitting)}?" if fitting else making
    if fitting:
        return f"did you mean {' or '.join(fitting)}?"
    if kind is Kind.CHECKPOINT:
        return f"the run's folder, {os.path.dirname(path) or '.'}, is a model"
    if kind is Kind.SWEEP:
        return f"`cap runs {shlex.quote(path)}` lists its runs, which are models"
    if kind in (Kind.PICTURE, Kind.FOLDER):
        return f"name {wanted.text}" if (wanted := wanted_by(command, given)) else "name another"
    return f"`cap info {shlex.quote(path)}` shows what is in it"
