"""COCO's results format: a list of image ids with one caption each, as its test server takes it."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from cache.atomic import write_text
from cache.errors import CapError
from pipeline.captioner.outputs.forms import JsonLines
from pipeline.captioner.outputs.growing_file import GrowingFile
from pipeline.captioner.outputs.output import Maker, counted, foreign, texts_of
from pipeline.captioner.predictions import Caption, Prediction
from pipeline.captions.mark import MARK

_PART = ".part"  # beside the file, until all photos have captions
_NUMBERED = re.compile(r"(?:COCO_[a-z]+[0-9]+_)?([0-9]{1,18})", re.IGNORECASE)


class IdsError(CapError):
    """Raised when a photo has no id. The message is one line."""


def read_ids(path: Path) -> dict[str, int]:
    """The ids of photos by `file_name`, from a file with `images` as COCO has them.

    It may have captions or none, as `image_info_test2014.json`. Raises IdsError.
    """
    try:
        images = json.loads(path.read_text(encoding="utf-8-sig"))["images"]
        pairs = [(image["file_name"], image["id"]) for image in images]
    except OSError as error:
        raise IdsError(f"{path}: cannot read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise IdsError(f"{path}: not valid JSON ({error})") from None
    except (KeyError, TypeError):
        raise IdsError(
            f"{path}: has no images with file_name and id, as COCO's image_info_test2014.json has"
        ) from None
    ids: dict[str, int] = {}
    for name, image_id in pairs:
        if not isinstance(name, str) or not isinstance(image_id, int) or isinstance(image_id, bool):
            raise IdsError(f"{path}: {name!r} has the id {image_id!r}, which is no whole number")
        if ids.setdefault(name, image_id) != image_id:
            raise IdsError(f"{path}: {name} has two ids, {ids[name]} and {image_id}")
    return ids


def ids_of(
    photos: Sequence[str], listed: Mapping[str, int] | None, source: Path | None
) -> dict[str, int]:
    """The id of each photo by its path: the one in a list, or without one the number in its name.

    Raises IdsError if a photo has none, or if two have the same.
    """
    found: dict[str, int] = {}
    for photo in photos:
        image_id = _number_of(photo) if listed is None else _listed_id(photo, listed)
        if image_id is not None:
            found[photo] = image_id
    without = [photo for photo in photos if photo not in found]
    if without:
        more = f" (nor have {len(without) - 1:,} others)" if len(without) > 1 else ""
        if listed is not None:
            raise IdsError(f"{without[0]}: has no id in {source}{more}")
        raise IdsError(
            f"{without[0]}: has no number in its name, as COCO's photos have{more}; name a file "
            "with the ids of the photos with --ids"
        )
    owners: dict[int, str] = {}
    for photo, image_id in found.items():
        if owners.setdefault(image_id, photo) != photo:
            raise IdsError(f"{photo}: has the id {image_id}, and so has {owners[image_id]}")
    return found


def _listed_id(photo: str, listed: Mapping[str, int]) -> int | None:
    parts = PurePath(photo).parts
    for start in range(len(parts)):  # the longest end of the path first
        image_id = listed.get("/".join(parts[start:]))
        if image_id is not None:
            return image_id
    return None


def _number_of(photo: str) -> int | None:
    found = _NUMBERED.fullmatch(PurePath(photo).stem)
    return int(found[1]) if found else None


class CocoResults:
    """The results file, written when all photos have captions.

    Until then they are in a file beside it, `x.coco.json.part`, which a later command continues.
    """

    def __init__(
        self,
        path: Path,
        ids: Mapping[str, int],
        maker: Maker,
        *,
        words: bool = False,
        overwrite: bool = False,
    ) -> None:
        """ids: of all photos of this command. Raises as GrowingFile does."""
        self._path, self._ids, self._maker, self._words = path, ids, maker, words
        self._results = {} if overwrite else _read_results(path, maker)  # caption by id
        self._part = GrowingFile(
            path.with_name(path.name + _PART),
            JsonLines(maker, log_probs=False),
            maker,
            ids,
            overwrite=overwrite,
        )
        for photo, caption in self._part.captions.items():
            if photo in ids:
                self._results[ids[photo]] = caption
        self._before = len(self._results)

    def wants(self, path: str) -> bool:
        return self._ids[path] not in self._results

    def write(self, prediction: Prediction) -> None:
        if prediction.error:
            return
        (text,) = texts_of(prediction, self._words)[:1]
        said = Caption(text, prediction.score, words=prediction.words)  # as the results have it
        self._part.write(Prediction(prediction.path, text, prediction.score, captions=(said,)))
        self._results[self._ids[prediction.path]] = text

    def finish(self) -> list[str]:
        entries = [
            {"image_id": image_id, "caption": caption, MARK: str(self._maker)}
            for image_id, caption in self._results.items()
        ]
        text = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")
        write_text(self._path, f"[\n{text}\n]\n")
        self._part.remove()
        return [f"{self._path}: has the captions of {counted(len(entries), 'photo')}"]

    def kept(self) -> str:
        return self._part.kept()

    def close(self) -> None:
        self._part.close()


def _read_results(path: Path, maker: Maker) -> dict[int, str]:
    """The captions of an earlier command of the same model and settings, by id.

    Raises OutputFileError if the file holds something else.
    """
    if not os.path.lexists(path) or (os.path.isfile(path) and not os.path.getsize(path)):
        return {}
    entries: Any = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        entries = json.loads(path.read_bytes())
    if not isinstance(entries, list):
        raise foreign(path, None)
    return dict(_entries(path, entries, maker))


def _entries(path: Path, entries: Iterable[Any], maker: Maker) -> Iterable[tuple[int, str]]:
    for entry in entries:
        found = entry if isinstance(entry, dict) else {}
        image_id, caption, mark = found.get("image_id"), found.get("caption"), found.get(MARK)
        if not (isinstance(image_id, int) and isinstance(caption, str) and isinstance(mark, str)):
            raise foreign(path, None)
        if not maker.made(mark):
            raise foreign(path, mark)
        yield image_id, caption
