"""Reading the references that captions are scored against, and predictions as COCO writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import CapError
from cache.record import CacheError
from cache.store import DONE, FeatureCache, open_cache
from pipeline.captions.dataset import listed_rows, read_captions
from pipeline.captions.records import DatasetError, Photo
from train.captions.script import TREEBANK

# Up to 18 digits, which fit into 64 bits.
_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")


class PredictionsError(CapError):
    """Raised when a file of predictions cannot be used.

    The message is one line that starts with the file.
    """


@dataclass(frozen=True)
class Matched:
    """Predictions and references of the same photos."""

    hypotheses: dict[str, str]  # by image id
    references: dict[str, list[str]]  # by image id; none is empty
    notice: str | None  # one line, if other photos have references


def rows_of(cache: FeatureCache, only: Path | None = None) -> NDArray[np.int64]:
    """The rows of a cache's extracted photos, or of those among them that the file `only` names,
    one per line. Raises DatasetError if it names a photo that the cache does not hold.
    """
    rows = cache.rows_with(DONE)
    if only is None:
        return rows
    names = zip(cache.image_ids, cache.paths, strict=True)
    kept = np.intersect1d(rows, listed_rows((Photo(*each) for each in names), only))
    if not len(kept):
        raise DatasetError(f"{only}: names no photo that was extracted into {cache.path}")
    return kept


def cache_references(cache: FeatureCache, only: Path | None = None) -> dict[str, list[str]]:
    """The captions of the photos of `rows_of`, by image id. A photo may have no captions.

    Raises CacheError if no photo has captions, and DatasetError as `rows_of` does.
    """
    captions = cache.captions.by_row(len(cache))
    if not any(captions):
        raise CacheError(f"{cache.path}: holds no captions to score against")
    references = {cache.image_ids[row]: captions[row] for row in rows_of(cache, only).tolist()}
    if not any(references.values()):
        which = "that was extracted" if only is None else f"of {only}"
        raise CacheError(f"{cache.path}: no photo {which} has captions")
    return references


def read_references(
    source: Path | Sequence[Path],
    *,
    split: str | None = None,
    only: Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, list[str]]:
    """The captions of captions files, by image id. A photo may have none.

    The arguments are those of `read_photos`. Raises DatasetError.
    """
    photos = read_captions(
        source, split=split, image_column=image_column, caption_column=caption_column, say=say
    )
    if only is not None:
        photos = photos.take(listed_rows(photos, only))
    references = {photo.image_id: list(photo.captions) for photo in photos}
    if not any(references.values()):
        names = source if isinstance(source, Path) else ", ".join(map(str, source))
        raise DatasetError(f"{names}: holds no captions to score against")
    return references


def references_of(
    *,
    cache: Path | None = None,
    captions: Path | Sequence[Path] | None = None,
    split: str | None = None,
    only: Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, list[str]]:
    """`cache_references` of a cache, or `read_references` of captions files."""
    if captions is not None:
        return read_references(
            captions,
            split=split,
            only=only,
            image_column=image_column,
            caption_column=caption_column,
            say=say,
        )
    assert cache is not None
    return cache_references(open_cache(cache), only)


def tokenizer_of(cache: Path | None) -> str:
    """The tokenizer of a cache's captions, or `treebank` without a cache. Raises CacheError."""
    return TREEBANK if cache is None else open_cache(cache).captions.tokenizer


def read_predictions(path: Path) -> dict[str, str]:
    """Captions by image id from a file in COCO's results format.

    Raises PredictionsError.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PredictionsError(f"{path}: cannot read ({reason})") from None
    except (ValueError, RecursionError) as error:
        raise PredictionsError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(entries, list):
        raise PredictionsError(f'{path}: not a list of {{"image_id": …, "caption": …}}')
    found: dict[str, str] = {}
    for number, entry in enumerate(entries, 1):
        image_id, caption = _fields(entry)
        if not isinstance(image_id, (int, str)) or not isinstance(caption, str):
            raise PredictionsError(
                f"{path}: entry {number} has no image_id and caption, as COCO's results have"
            )
        if str(image_id) in found:
            raise PredictionsError(f"{path}: image {image_id} has two captions (entry {number})")
        found[str(image_id)] = caption
    if not found:
        raise PredictionsError(f"{path}: holds no captions")
    return found


def _fields(entry: object) -> tuple[object, object]:
    if not isinstance(entry, Mapping) or isinstance(entry.get("image_id"), bool):
        return None, None
    return entry.get("image_id"), entry.get("caption")


def match(
    predictions: Mapping[str, str],
    references: Mapping[str, list[str]],
    path: Path,
    source: object,
    *,
    all_photos: bool = False,
) -> Matched:
    """The predicted photos that have references, in the order of these.

    path, source: files of the predictions and of the references, for messages. all_photos: whether
    every photo with references has to have a prediction. Raises PredictionsError if one has none
    then, if a predicted photo is not in `source`, or if no predicted photo has references.
    """
    unknown = [image for image in predictions if image not in references]
    if unknown:
        raise PredictionsError(
            f"{path}: {len(unknown):,} of {len(predictions):,} photos are not in {source} "
            f"(first: {unknown[0]})"
        )
    wanted = {image: texts for image, texts in references.items() if texts}
    missing = [image for image in wanted if image not in predictions]
    lack = f"no caption for {len(missing):,} of the {len(wanted):,} photos in {source}"
    if missing and all_photos:
        raise PredictionsError(
            f"{path}: {lack} (first: {missing[0]}); choose photos with --split or --only, or leave "
            "out --all to score the others"
        )
    scored = {image: texts for image, texts in wanted.items() if image in predictions}
    if not scored:
        raise PredictionsError(f"{path}: none of its photos has captions in {source}")
    notice = None
    if missing:
        notice = (
            f"{path}: {lack} (first: {missing[0]}); scored the other {len(scored):,}, so do not "
            "compare these scores with those of all photos"
        )
    return Matched({image: predictions[image] for image in scored}, scored, notice)


def numbered_ids(cache: FeatureCache) -> set[str] | None:
    """The ids of a cache that were numbers in its captions file; None if the cache cannot tell."""
    if cache.numbered is None:
        return None
    return {cache.image_ids[row] for row in np.flatnonzero(cache.numbered).tolist()}


def coco_results(
    captions: Mapping[str, str], numbers: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """COCO's results format: `[{"image_id": 42, "caption": "a dog"}, …]`.

    numbers: the ids that were numbers in the captions file, and are numbers here too. Without it,
    all ids are numbers if all of them are written as JSON writes whole numbers, as COCO's are, and
    strings otherwise. So `00042` stays a string, and a captions file whose ids are all of one kind
    gets predictions with ids of one kind.
    """
    if numbers is None:
        numbers = captions if all(map(_WHOLE_NUMBER.fullmatch, captions)) else ()
    return [
        {"image_id": int(image_id) if image_id in numbers else image_id, "caption": caption}
        for image_id, caption in captions.items()
    ]
