"""What files beside photos are called: `p1.txt` for `p1.jpg`, or `p1.jpg.txt`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

from pipeline.captioner.outputs.output import OutputFileError
from pipeline.photos.folder import IMAGE_SUFFIXES

# Other programs read an XMP file as that of a raw photo or film of the same name.
_NO_PHOTOS = frozenset((".txt", ".caption", ".xmp", ".json", ".pp3", ".dop", ".aae", ".thm"))


def targets_of(
    photos: Sequence[str], suffix: str, folder: Path | None, roots: Iterable[str]
) -> dict[str, Path]:
    """The file of each photo, by its path.

    It has the photo's name with another suffix, or behind its own suffix if another photo of the
    folder has the same name without suffix. folder: where the files go instead of beside the
    photos; then photos below one of the `roots` keep their folders below that. Raises
    OutputFileError if two photos would share a file.
    """
    folders = _Folders(suffix)
    tops = sorted({_top(root) for root in roots}, key=len, reverse=True)
    targets: dict[str, Path] = {}
    taken: dict[Path, str] = {}
    for photo in photos:
        name = os.path.basename(photo)
        stem, own = os.path.splitext(name)
        single = own and not folders.has_twin(photo)
        beside = (stem if single else name) + suffix
        if beside == name:  # a photo that is called p1.txt
            beside = name + suffix
        if folder is None:
            target = Path(photo).with_name(beside)
        else:
            top = next((top for top in tops if photo.startswith(top)), None)
            below = os.path.dirname(photo[len(top) :]) if top is not None else ""
            target = folder / below / beside
            first = taken.setdefault(target, photo)
            if first != photo:
                raise OutputFileError(
                    f"{target}: {first} and {photo} would share it; name the folder above both, "
                    "whose folders are kept"
                )
        targets[photo] = target
    return targets


def _top(root: str) -> str:
    """What the paths of photos below a folder begin with."""
    folder = str(Path(root))
    return "" if folder == "." else os.path.join(folder, "")


class _Folders:
    """Which photos of a folder have the same name without suffix."""

    def __init__(self, suffix: str) -> None:
        self._counts = cache(self._count)
        self._all = suffix == ".xmp"

    def has_twin(self, photo: str) -> bool:
        counts = self._counts(os.path.dirname(photo))
        return counts[os.path.splitext(os.path.basename(photo))[0].casefold()] > 1

    def _count(self, folder: str) -> Mapping[str, int]:
        counts: Counter[str] = Counter()
        try:
            names = os.listdir(folder or ".")
        except OSError:  # captioning it will tell
            return counts
        for name in names:
            stem, suffix = os.path.splitext(name)
            suffix = suffix.lower()
            if suffix in IMAGE_SUFFIXES or (self._all and suffix and suffix not in _NO_PHOTOS):
                counts[stem.casefold()] += 1
        return counts
