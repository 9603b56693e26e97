"""The JSON layouts that most data sets have, COCO's and Karpathy's, with their ids and splits."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.captions.image_ids import image_id_of
from pipeline.captions.mark import MARK
from pipeline.captions.records import (
    Choice,
    DatasetError,
    Reading,
    no_splits,
    unknown_splits,
)

_HELP = "is it a captions file as COCO or Karpathy publish them?"
# VizWiz's marks of captions that are not to be trained on.
_FLAGS = {"is_rejected": "rejected", "is_precanned": "written in advance"}


def read_coco(path: Path, record: Mapping[str, Any], choice: Choice) -> Reading:
    """Read COCO's captions JSON: `images` with ids and file names, `annotations` with captions.

    Numbers and strings may be mixed among the ids. Raises DatasetError.
    """
    if choice.split is not None:
        raise no_splits(path)
    notes, images = record.get("annotations"), record["images"]
    if not isinstance(notes, list):
        raise DatasetError(f"{path}: has images but no annotations; is it a captions file?")
    if notes and not any(isinstance(note, dict) and "caption" in note for note in notes):
        raise DatasetError(f"{path}: its annotations have no caption; is it a captions file?")
    if MARK in record or any(isinstance(note, dict) and MARK in note for note in notes):
        raise DatasetError(
            f"{path}: written by this program (field {MARK}); a model would learn from its own "
            "captions"
        )
    reading = Reading(str(path), "COCO JSON")
    coco = _indexed(_images(images, reading), _notes(notes, reading))
    for image_id, image in coco.imgs.items():
        captions = coco.imgToAnns.get(image_id, [])
        reading.add(image["name"], (note["caption"] for note in captions), image_id)
    strays = sum(note["image_id"] not in coco.imgs for note in coco.anns.values())
    if strays:
        reading.left_out["of photos that the file does not name"] += strays
    reading.check(_HELP)
    return reading


def _indexed(images: list[dict[str, Any]], notes: list[dict[str, Any]]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports to stdout
        from pycocotools.coco import COCO

        coco = COCO()
        coco.dataset = {"images": images, "annotations": notes}
        coco.createIndex()
    return coco


def _images(images: list[Any], reading: Reading) -> list[dict[str, Any]]:
    good, names, ids = [], set[str](), dict[str, str]()
    for number, image in enumerate(images, 1):
        reading.rows += 1
        name = image.get("file_name") if isinstance(image, dict) else None
        image_id = _id(image.get("id")) if isinstance(image, dict) else None
        if not isinstance(name, str) or not name or image_id is None:
            reading.fault(f"image {number}", _shown(image), "no file_name and id")
        elif ids.get(image_id, name) != name:
            reason = f"the id of {ids[image_id]} too"
            reading.fault(f"image {number}", _shown(image), reason)
        elif name in names and image_id not in ids:
            reading.fault(f"image {number}", _shown(image), "a photo that has another id")
        else:
            names.add(name)
            ids[image_id] = name
            good.append({"id": image_id, "name": name})
    return good


def _notes(notes: list[Any], reading: Reading) -> list[dict[str, Any]]:
    good, known = [], dict[int, str]()
    for number, note in enumerate(notes, 1):
        reading.rows += 1
        value = note.get("image_id") if isinstance(note, dict) else None
        if type(value) is int:  # nearly all; five captions have the id of one photo
            image_id = known.get(value)
            if image_id is None:
                image_id = known[value] = image_id_of(value)
        else:
            image_id = _id(value)
        if image_id is None or "caption" not in note:
            reading.fault(f"annotation {number}", _shown(note), "no image_id and caption")
            continue
        flags = [] if _FLAGS.keys().isdisjoint(note) else [f for f in _FLAGS if note.get(f) is True]
        if flags:
            reading.left_out[_FLAGS[flags[0]]] += 1
        else:
            good.append({"id": number, "image_id": image_id, "caption": note["caption"]})
    return good


def _id(value: object) -> str | None:
    known = isinstance(value, int | str) and not isinstance(value, bool)
    return image_id_of(value) if known else None


def read_karpathy(path: Path, images: list[Any], choice: Choice) -> Reading:
    """Read Karpathy's JSON: each image with its file name, its split and its sentences.

    Raises DatasetError.
    """
    reading = Reading(str(path), "Karpathy JSON")
    wanted, known = choice.wanted_splits, set[str]()
    for number, image in enumerate(images, 1):
        reading.rows += 1
        name = image.get("filename") if isinstance(image, dict) else None
        sentences = image.get("sentences") if isinstance(image, dict) else None
        if not isinstance(name, str) or not name or not isinstance(sentences, list):
            reading.fault(f"image {number}", _shown(image), "no filename and sentences")
            continue
        if MARK in image:
            raise DatasetError(
                f"{path}: written by this program (field {MARK}); a model would learn from its own "
                "captions"
            )
        split = str(image.get("split", ""))
        known.add(split)
        if wanted is not None and split not in wanted:
            continue
        folder = image.get("filepath")
        image_id = _id(image.get("cocoid"))
        if isinstance(folder, str) and folder:
            # The id of a photo without a number has never had the folder in it.
            image_id = name if image_id is None else image_id
            name = f"{folder}/{name}"
        reading.add(name, map(_sentence, sentences), image_id)
    if wanted is not None and not wanted <= known:
        raise unknown_splits(path, wanted, known)
    reading.check(_HELP)
    return reading


def _sentence(sentence: Any) -> object:
    if not isinstance(sentence, dict):
        return sentence
    raw, tokens = sentence.get("raw"), sentence.get("tokens")
    if raw is None and isinstance(tokens, list):
        return " ".join(str(token) for token in tokens)
    return raw


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:200]
