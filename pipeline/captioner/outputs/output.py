"""What every output can do, and which model and settings it is of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from cache.errors import CapError
from pipeline.captioner.predictions import Caption, Prediction
from train.config import SearchConfig

_DIGITS = 16
_READ_BYTES = 1 << 24


class OutputFileError(CapError):
    """Raised when a file cannot take captions: it holds something else, or is in use.

    The message is one line that begins with the file.
    """


@dataclass(frozen=True)
class Maker:
    """The model and the settings that captions are of. Two with the same digest say the same."""

    name: str  # of the model, for people: base/best.cap
    digest: str  # 16 hexadecimal digits

    @classmethod
    def of(cls, model: Path, search: SearchConfig, form: Mapping[str, Any]) -> Maker:
        """model: its file. form: whatever else changes what is written. Raises OSError."""
        digest = hashlib.sha256()
        with model.open("rb") as file:
            while part := file.read(_READ_BYTES):
                digest.update(part)
        settings = {**asdict(search), **form}
        digest.update("".join(f"\n{name}={settings[name]}" for name in sorted(settings)).encode())
        resolved = model.resolve()
        name = printable(f"{resolved.parent.name}/{resolved.name}")
        return cls(name, digest.hexdigest()[:_DIGITS])

    def __str__(self) -> str:
        return f"{self.name} {self.digest}"

    def made(self, mark: str) -> bool:
        """Whether a mark that was read is of this model and these settings, wherever it was."""
        return mark.rpartition(" ")[2] == self.digest


class Output(Protocol):
    """A file or files that captions are written to as they come."""

    def wants(self, path: str) -> bool:
        """Whether a photo has still to be written."""
        ...

    def write(self, prediction: Prediction) -> None:
        """Raises WriteError."""
        ...

    def finish(self) -> list[str]:
        """Complete what was written. Returns lines for the user. Raises WriteError."""
        ...

    def kept(self) -> str:
        """What is there if the work ends now, as a clause; empty if that is nothing."""
        ...

    def close(self) -> None: ...


def texts_of(prediction: Prediction, words: bool) -> list[str]:
    """The captions of a photo, the best first. words: the model's words, not sentences."""
    return [text_of(caption, words) for caption in prediction.captions]


def text_of(caption: Caption, words: bool) -> str:
    return " ".join(caption.words) if words else caption.caption


def printable(text: str) -> str:
    r"""Text without line breaks or halves of surrogate pairs, which become `\n`, `\udcff`, …"""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


def counted(count: int, what: str) -> str:
    """`1 photo`, `2 photos`."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def foreign(path: Path, mark: str | None) -> OutputFileError:
    """The error about a file that is there. mark: of another model or other settings, or None."""
    if mark is None:
        return OutputFileError(
            f"{path}: holds something that cap did not write; name another --out, or replace it "
            "with --overwrite"
        )
    name = printable(mark.rpartition(" ")[0]) or "another model"
    return OutputFileError(
        f"{path}: holds captions by {name}, of another training or with other settings; name "
        "another --out, or replace it with --overwrite"
    )
