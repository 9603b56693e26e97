"""Files beside photos with the photos' captions. The photos themselves are never changed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from enum import Enum, auto
from pathlib import Path
from typing import Protocol

from cache.atomic import WriteError, follow_link
from pipeline.captioner.outputs.output import Maker, counted, printable, texts_of
from pipeline.captioner.predictions import Prediction
from pipeline.captions.mark import MARK

_LARGEST_BYTES = 1 << 20  # of a file that may be one of these
_NEW = ".cap-new"


class _Holds(Enum):
    NOTHING = auto()  # to be lost
    THESE = auto()  # captions of this model and these settings
    OURS = auto()  # captions that this program wrote
    FOREIGN = auto()


class SidecarForm(Protocol):
    """What is in a file beside a photo."""

    suffix: str
    replaces_foreign: bool  # if told to

    def text(self, captions: list[str], mark: str) -> str: ...

    def mark_in(self, text: str) -> str | None:
        """The mark of a file that this program wrote and nobody changed; else None."""
        ...


class Lines:
    """A caption a line, and the mark as the last line."""

    suffix = ".txt"
    replaces_foreign = True

    def text(self, captions: list[str], mark: str) -> str:
        lines = (" ".join(caption.split()) for caption in captions)
        return "".join(f"{line}\n" for line in lines) + f"{MARK}: {mark}\n"

    def mark_in(self, text: str) -> str | None:
        last = text.removesuffix("\n").rpartition("\n")[2]
        return last.removeprefix(f"{MARK}: ") if last.startswith(f"{MARK}: ") else None


class Sidecars:
    """One file for each photo, written when its caption is there.

    A file of this program is replaced if it is of another model, other settings or an older
    photo. Any other is left as it is, unless told otherwise.
    """

    def __init__(
        self,
        targets: Mapping[str, Path],
        form: SidecarForm,
        maker: Maker,
        *,
        words: bool = False,
        overwrite: bool = False,
    ) -> None:
        """targets: the files by the paths of their photos. Raises WriteError if a folder cannot be
        written, before anything is.
        """
        self._targets, self._form, self._maker, self._words = targets, form, maker, words
        _check_folders(targets.values())
        self._overwrite = overwrite
        holds = {photo: self._holds(photo) for photo in targets}
        self._wanted = {
            photo
            for photo, held in holds.items()
            if held in (_Holds.NOTHING, _Holds.OURS) or (overwrite and held is _Holds.THESE)
        }
        self._foreign = [photo for photo, held in holds.items() if held is _Holds.FOREIGN]
        self._written = 0

    def wants(self, path: str) -> bool:
        return path in self._wanted

    def write(self, prediction: Prediction) -> None:
        if prediction.error:
            return
        texts = texts_of(prediction, self._words)
        text = self._form.text(texts, f"{self._of(prediction.path)}{self._maker}")
        target = self._targets[prediction.path]
        self._wanted.discard(prediction.path)
        if self._holds(prediction.path) is _Holds.FOREIGN:  # since this command began
            self._foreign.append(prediction.path)
            return
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(target, text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise WriteError(
                f"{target}: cannot write ({error.strerror or error})"
                f"{f'; {kept}' if (kept := self.kept()) else ''}; the same command goes on"
            ) from None
        self._written += 1

    def finish(self) -> list[str]:
        what = f"{self._form.suffix} file"
        lines = [f"wrote {counted(self._written, what)} with captions"]
        if self._foreign:
            first = self._targets[self._foreign[0]]
            line = (
                f"{counted(len(self._foreign), what)} not replaced, because cap did not write what "
                f"is there (first: {first})"
            )
            if self._form.replaces_foreign and not self._overwrite:
                line += "; --overwrite replaces texts"
            lines.append(line)
        return lines

    def kept(self) -> str:
        if not self._written:
            return ""
        return f"{counted(self._written, f'{self._form.suffix} file')} written"

    def close(self) -> None:
        pass

    def _of(self, photo: str) -> str:
        """The photo's part of the mark: p1.txt may be read as that of p1.png, too."""
        return f"{printable(os.path.basename(photo))} by "

    def _holds(self, photo: str) -> _Holds:
        target = self._targets[photo]
        try:
            if not os.path.lexists(target):
                return _Holds.NOTHING
            if not os.path.isfile(target):
                return _Holds.FOREIGN
            size = os.path.getsize(target)
            if size == 0:
                return _Holds.NOTHING
            if size > _LARGEST_BYTES:
                return _Holds.FOREIGN
            data = target.read_bytes()
        except OSError:
            return _Holds.FOREIGN
        with contextlib.suppress(UnicodeDecodeError):
            mark = self._form.mark_in(data.decode("utf-8"))
            if mark is not None:
                own = mark.startswith(self._of(photo)) and self._maker.made(mark)
                return _Holds.THESE if own and not _is_older(target, photo) else _Holds.OURS
            if self._overwrite and self._form.replaces_foreign and b"\0" not in data:
                return _Holds.OURS
        return _Holds.FOREIGN


def _is_older(target: Path, photo: str) -> bool:
    """Whether a file is older than its photo, which then was changed since."""
    try:
        return os.stat(target).st_mtime_ns < os.stat(photo).st_mtime_ns
    except OSError:
        return False


def _check_folders(targets: Iterable[Path]) -> None:
    """Raise WriteError if a folder of the files cannot be written."""
    for folder in {target.parent for target in targets}:
        above = folder
        while not os.path.lexists(above) and above != above.parent:
            above = above.parent
        if os.path.isdir(above) and not os.access(above, os.W_OK):
            raise WriteError(
                f"{folder}: this user may not write there; name another folder with "
                "--sidecar-folder"
            )


def _write(path: Path, data: bytes) -> None:
    """Write a small file; a killed process leaves none or the whole. Raises OSError."""
    target = follow_link(path)
    new = target.with_name(f".{target.name}{_NEW}")
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        with open(fd, "wb") as file:
            file.write(data)
        os.replace(new, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise
