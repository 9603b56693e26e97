"""Where a backbone comes from, by its name. Imports nothing heavy: the command line reads names."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

from pipeline.encoder.errors import EncoderError

TIMM = "timm:"  # before timm's own names
PRETRAINED = "pretrained"  # the weights that belong to one of timm's names
RANDOM = "random"
_OF_TORCHVISION = "IMAGENET1K_V1"
_CODE = re.compile(r"(.+\.py):([^:/@]+)", re.DOTALL)
_RECORDED_CODE = re.compile(r"([^/]+\.py):([^:/@]+)@([0-9a-f]{64})", re.DOTALL)


class CodeFile(NamedTuple):
    """A function of a Python file that makes a network."""

    path: Path
    function: str

    def read(self) -> bytes:
        """Its file's bytes. Raises EncoderError."""
        try:
            return self.path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a null byte
            reason = error.strerror if isinstance(error, OSError) else error
            raise EncoderError(f"{self.path}: cannot read ({reason})") from None

    def recorded(self, content: bytes) -> str:
        """The name of such a backbone in a record: file, function, and the SHA-256 of the file.

        The folder is no part of it, so that a file that was moved is the same backbone.
        """
        return f"{self.path.name}:{self.function}@{hashlib.sha256(content).hexdigest()}"


def code_file(name: str) -> CodeFile | None:
    """What `path/file.py:function` names, with the whole path; None if it is no such name."""
    found = _CODE.fullmatch(name)
    if found is None:
        return None
    return CodeFile(Path(os.path.abspath(os.path.expanduser(found[1]))), found[2])


class RecordedCode(NamedTuple):
    """The backbone of a record that is code. It is run only if the user names its file."""

    file: str
    function: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.file}:{self.function} (SHA-256 {self.sha256[:12]}…)"


def recorded_code(name: str) -> RecordedCode | None:
    """What a record's backbone says of a file with code; None if it is no such backbone."""
    found = _RECORDED_CODE.fullmatch(name)
    return None if found is None else RecordedCode(*found.groups())


def recorded_name(name: str) -> str:
    """What a record will call a backbone that the user calls `name`. Raises EncoderError if it is
    code that cannot be read.
    """
    code = code_file(name)
    return name if code is None else code.recorded(code.read())


def default_weights(name: str) -> str:
    """The weights of a backbone for which the user names none."""
    if code_file(name) is not None:
        return ""  # they come with it
    return PRETRAINED if name.startswith(TIMM) else _OF_TORCHVISION
