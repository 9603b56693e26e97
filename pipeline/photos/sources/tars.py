"""What a tar holds, by one pass over its headers: where its photos begin, and texts of captions.

The names are those of WebDataset: what stands before the first point of a member's name is its key,
and members of one key belong together.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.photos.folder import IMAGE_SUFFIXES
from pipeline.photos.sources.errors import SourceError
from pipeline.photos.sources.places import Part, without_secrets
from pipeline.photos.sources.ranges import open_container

# Members that may hold captions.
TEXT_SUFFIXES = (".txt", ".caption", ".json")
_LARGEST_TEXT_BYTES = 1 << 20
_BLOCK = 512
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}


class Texts(Protocol):
    """Makes captions of the members of one tar that may hold some."""

    def add(self, name: str, data: bytes) -> None:
        """Read a member."""
        ...

    def finish(self) -> Mapping[str, Sequence[Any]]:
        """The captions by member."""
        ...


MakeTexts = Callable[[str], Texts]  # of a tar


@dataclass
class TarIndex:
    """The photos of one tar, in the order in which they lie."""

    container: str
    names: list[str]
    starts: NDArray[np.int64]  # of their bytes, like `sizes`
    sizes: NDArray[np.int64]
    left_out: Counter[str] = field(default_factory=Counter)
    captions: Texts | None = None
    texts: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # captions by member

    def __len__(self) -> int:
        return len(self.names)

    def place(self, number: int) -> Part:
        start, size = int(self.starts[number]), int(self.sizes[number])
        return Part(self.container, self.names[number], start, size)


def index_tar(container: str, make_texts: MakeTexts | None = None) -> TarIndex:
    """Find the photos of a tar. make_texts: for captions of members; None if none are wanted.

    Raises SourceError if it is no tar, is compressed, damaged or cut off, or holds tars.
    """
    shown = without_secrets(container)
    with open_container(container) as file:
        _check_start(shown, file)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                return _index(shown, container, file, tar, make_texts)
        except tarfile.TarError as error:
            if "unexpected end of data" in str(error):
                raise SourceError(
                    f"{shown}: is cut off, its last member is not whole; copy it again"
                ) from None
            raise SourceError(f"{shown}: not a tar, or damaged ({error})") from None
        except OSError as error:
            raise SourceError(f"{shown}: cannot read ({error.strerror or error})") from None


def _check_start(shown: str, file: IO[bytes]) -> None:
    start = file.read(_BLOCK)
    file.seek(0)
    if not start:
        raise SourceError(f"{shown}: is empty, and no tar")
    for magic, (name, command) in _COMPRESSED.items():
        if start.startswith(magic):
            raise SourceError(
                f"{shown}: is compressed ({name}), so that photos in it cannot be reached one by "
                f"one; unpack it once with `{command}`, photos do not get smaller anyhow"
            )


def _index(
    shown: str,
    container: str,
    file: IO[bytes],
    tar: tarfile.TarFile,
    make_texts: MakeTexts | None,
) -> TarIndex:
    found: dict[str, tuple[int, int]] = {}  # name → (start, size); the last of a name counts
    texts = None if make_texts is None else make_texts(container)
    left_out: Counter[str] = Counter()
    tars = 0
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            left_out["links and special members"] += 1
            continue
        parts = [part for part in member.name.split("/") if part not in ("", ".")]
        name = "/".join(parts)
        if not parts or parts[-1].startswith(".") or parts[0] == "__MACOSX":
            left_out["hidden"] += 1
            continue
        if ".." in parts or "\0" in name:
            left_out["with .. in the name"] += 1
            continue
        suffix = suffix_of(name)
        if suffix in IMAGE_SUFFIXES:
            if found.pop(name, None) is not None:
                left_out["replaced by a later member of the same name"] += 1
            found[name] = member.offset_data, member.size
        elif suffix in TEXT_SUFFIXES and texts is not None:
            if member.size > _LARGEST_TEXT_BYTES:
                left_out[f"{suffix} too large for captions"] += 1
                continue
            file.seek(member.offset_data)
            texts.add(name, file.read(member.size))
        else:
            tars += suffix in (".tar", ".tgz")
            left_out[suffix or "without suffix"] += 1
    _check_end(shown, file, tar)
    if not found and tars:
        raise SourceError(
            f"{shown}: holds {tars:,} tars and no photos; unpack it once and name these"
        )
    places = np.array(list(found.values()), np.int64).reshape(-1, 2)
    index = TarIndex(container, list(found), places[:, 0].copy(), places[:, 1].copy(), left_out)
    if texts is not None:
        index.captions, index.texts = texts, texts.finish()
    return index


def _check_end(shown: str, file: IO[bytes], tar: tarfile.TarFile) -> None:
    """Raise SourceError unless a tar ends as tars do.

    tarfile takes a damaged header in the middle for the end. So do two tars in one file, of which
    the second would be left out without a word.
    """
    end = tar.offset
    size = file.seek(0, 2)
    file.seek(min(end, size))
    rest = file.read(20 * _BLOCK)  # tars are filled up with zeros to such a length
    if any(rest):
        what = "another tar behind its end" if not any(rest[:_BLOCK]) else "a damaged header"
        raise SourceError(
            f"{shown}: has {what}, at byte {end:,}; what comes after it cannot be found"
        )


def suffix_of(name: str) -> str:
    _, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return dot + suffix.lower() if dot else ""
