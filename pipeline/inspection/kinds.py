"""Which kind of thing a path is: a feature cache, a model, a run's folder, a captions file, …

Only names and a file's first bytes are looked at, so a damaged file is still of its kind. Imports
nothing heavy.
"""

from __future__ import annotations

import os
import stat
import zipfile
from enum import Enum
from pathlib import Path

from pipeline.photos.folder import IMAGE_SUFFIXES

_START_BYTES = 4096
_CACHE_MAGIC = b"capcache"
_LONGEST_HEADER = 1 << 30  # of a safetensors file, in bytes
_MODEL_FILES = ("best.cap", "last.cap", "checkpoint.pt")
_PICKLE_BYTES = 1 << 24  # of a checkpoint's structure, without its tensors
_LOOKED_AT = 1000  # entries of a folder


class Kind(Enum):
    """What a path is, in words that complete «is …»."""

    CACHE = "a feature cache"
    MODEL = "a model"
    RUN = "a run's folder"
    SWEEP = "a sweep's folder"
    CHECKPOINT = "a run's checkpoint"
    WEIGHTS = "a file of a network's weights"
    PICTURE = "a picture"
    TEXT = "a text file"
    FOLDER = "a folder"
    OTHER = "of an unknown kind"
    ABSENT = "not there"


def kind_of(path: str | Path) -> Kind:
    """The kind of a file or folder; OTHER if it cannot be looked into. Raises nothing."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            return _kind_of_folder(Path(path))
        if not stat.S_ISREG(mode):  # reading from a pipe would wait, and take what is in it
            return Kind.OTHER
        with open(path, "rb") as file:
            start = file.read(_START_BYTES)
    except FileNotFoundError:
        return Kind.ABSENT
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return Kind.OTHER
    return _kind_of_file(Path(path), start)


def _kind_of_folder(folder: Path) -> Kind:
    if (folder / "sweep.journal").is_file():
        return Kind.SWEEP
    if any((folder / name).is_file() for name in _MODEL_FILES) and not holds_photos(folder):
        return Kind.RUN
    return Kind.FOLDER


def holds_photos(folder: Path) -> bool:
    """Whether photos are among a folder's first entries, by their suffixes."""
    with os.scandir(folder) as entries:
        names = (entry.name for entry, _ in zip(entries, range(_LOOKED_AT), strict=False))
        return any(os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES for name in names)


def _kind_of_file(path: Path, start: bytes) -> Kind:
    if start.startswith(_CACHE_MAGIC):
        return Kind.CACHE
    # A safetensors file: the length of its header, and the header, which is JSON.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < _LONGEST_HEADER:
        return Kind.MODEL if b'"cap_bundle"' in start else Kind.WEIGHTS
    if start.startswith(b"PK\x03\x04"):
        return _kind_of_archive(path)
    if start.startswith(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."):  # of torch before 1.6
        return Kind.WEIGHTS
    if _is_picture(start):
        return Kind.PICTURE
    return Kind.TEXT if start and _is_text(start) else Kind.OTHER


def _kind_of_archive(path: Path) -> Kind:
    """torch.save's file is an archive, in which a pickle has the structure and its keys' names."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if not pickles:
                return Kind.OTHER
            with archive.open(pickles[0]) as file:
                structure = file.read(_PICKLE_BYTES)
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError):
        return Kind.OTHER
    is_run = b"trainer" in structure and b"validated_on" in structure
    return Kind.CHECKPOINT if is_run else Kind.WEIGHTS


def _is_picture(start: bytes) -> bool:
    heads = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\x00", b"MM\x00*", b"\0\0\0\x0cjP")
    in_riff = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    in_mp4 = start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"mif1", b"avif", b"msf1")
    return start.startswith(heads) or in_riff or in_mp4


def _is_text(start: bytes) -> bool:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16
        return True
    controls = set(range(32)) - set(b"\t\n\r\f\x1b")
    return not controls.intersection(start)
