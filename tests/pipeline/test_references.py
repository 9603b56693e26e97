from __future__ import annotations

import json
from pathlib import Path

import pytest
from pycocotools.coco import COCO as COCOFile

from cache.merge import merge
from cache.store import open_cache
from pipeline.captions.records import DatasetError
from pipeline.evaluation.evaluate import evaluate_predictions
from pipeline.evaluation.references import (
    PredictionsError,
    coco_results,
    match,
    numbered_ids,
    read_predictions,
    read_references,
)
from pipeline.evaluation.result_files import write_json
from tests.pipeline.test_extract import run

COCO = {
    "images": [{"id": i, "file_name": f"{i}.jpg"} for i in (42, 7, 8)],
    "annotations": [
        {"id": 1, "image_id": 42, "caption": "a dog"},
        {"id": 2, "image_id": 7, "caption": "a cat"},
    ],
}


def written(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    captions = {"42": "a dog", "7": "ein Hündchen"}
    entries = coco_results(captions)
    assert entries[0] == {"image_id": 42, "caption": "a dog"}
    assert read_predictions(written(tmp_path / "p.json", entries)) == captions


@pytest.mark.parametrize(
    ("ids", "kind"),
    [
        (["42", "7", "0", "-3", "9" * 18], int),
        (["00000", "00001", "12345"], str),  # numbers with a fixed width
        (["7", "b/c.jpg"], str),
        (["7", "-0"], str),
        (["1_000", "7"], str),
        (["٣", "7"], str),  # a decimal digit, which `int` reads as 3
        (["1.0", "7"], str),
        (["True", "None", "", " 7", "+7"], str),
        (["9" * 19], str),
        (["9" * 5000], str),
        (["\udc80.jpg", "ü.jpg"], str),  # a name that is not UTF-8
    ],
)
def test_ids_of_every_kind_are_read_back(tmp_path: Path, ids: list[str], kind: type) -> None:
    captions = {image_id: f"caption {n} é" for n, image_id in enumerate(ids)}
    write_json(tmp_path / "p.json", coco_results(captions))
    assert read_predictions(tmp_path / "p.json") == captions
    assert {type(entry["image_id"]) for entry in coco_results(captions)} == {kind}


@pytest.mark.parametrize("ids", [[0, 1, 12345], ["00000", "00001", "12345"], ["a.jpg", "b.jpg"]])
def test_coco_takes_the_predictions_for_its_own(tmp_path: Path, ids: list[int | str]) -> None:
    images = [{"id": image_id, "file_name": f"{image_id}"} for image_id in ids]
    notes = [{"id": n, "image_id": image_id, "caption": "a"} for n, image_id in enumerate(ids)]
    truth = written(tmp_path / "coco.json", {"images": images, "annotations": notes})
    results = coco_results(dict.fromkeys(read_references(truth), "a dog"))
    assert [entry["image_id"] for entry in results] == ids
    COCOFile(str(truth)).loadRes(str(written(tmp_path / "p.json", results)))


@pytest.mark.parametrize("form", ["coco", "karpathy"])
@pytest.mark.parametrize("ids", [[7, 42], ["7", "42"], ["007", "42"], [7, "42"]])
def test_ids_keep_the_kind_that_they_have_in_the_captions_file(
    tmp_path: Path, photos: Path, ids: list[int | str], form: str
) -> None:
    """From the captions file through the cache and a merge into the predictions."""
    names = ["a.jpg", "b.jpg"]
    pairs = list(zip(ids, names, strict=True))
    record: dict[str, object] = {
        "images": [{"id": i, "file_name": name} for i, name in pairs],
        "annotations": [{"id": n, "image_id": i, "caption": "a"} for n, i in enumerate(ids)],
    }
    if form == "karpathy":
        entries = [
            {"cocoid": i, "filename": name, "split": "train", "sentences": [{"raw": "a"}]}
            for i, name in pairs
        ]
        record = {"images": entries}
    truth = written(tmp_path / "captions.json", record)
    run(photos, tmp_path / "x.h5", captions=truth)
    merge([tmp_path / "x.h5"], tmp_path / "y.h5")
    for name in ("x.h5", "y.h5"):
        cache = open_cache(tmp_path / name)
        captions = dict.fromkeys(cache.image_ids, "a dog")
        results = coco_results(captions, numbered_ids(cache))
        assert [entry["image_id"] for entry in results] == ids


def test_only_photos_with_references_are_matched(tmp_path: Path) -> None:
    references = read_references(written(tmp_path / "coco.json", COCO))
    assert references == {"42": ["a dog"], "7": ["a cat"], "8": []}
    found = match({"7": "x", "8": "y", "42": "z"}, references, tmp_path, tmp_path, all_photos=True)
    assert found.hypotheses == {"42": "z", "7": "x"}
    assert found.references == {"42": ["a dog"], "7": ["a cat"]}
    assert found.notice is None


def test_predictions_for_a_part_of_the_photos_are_scored_and_counted() -> None:
    references = {"1": ["a"], "2": ["b"], "3": [], "4": ["d"]}
    found = match({"4": "x", "3": "y"}, references, Path("p.json"), Path("c.json"))
    assert found.hypotheses == {"4": "x"}
    assert found.references == {"4": ["d"]}
    assert found.notice is not None
    assert found.notice.startswith(
        "p.json: no caption for 2 of the 3 photos in c.json (first: 1); scored the other 1, so"
    )


def test_scores_of_a_part_say_so(tmp_path: Path) -> None:
    captions = written(tmp_path / "c.json", COCO)
    predictions = written(tmp_path / "p.json", [{"image_id": 7, "caption": "a cat"}])
    result = evaluate_predictions(predictions, captions=captions, meteor=False)
    assert result.scores.count == 1
    assert result.scores.notices[0].startswith(f"{predictions}: no caption for 1 of the 2 photos")
    with pytest.raises(PredictionsError, match=r"no caption for 1 of the 2 .* leave out --all"):
        evaluate_predictions(predictions, captions=captions, all_photos=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "not valid JSON"),
        ({"annotations": []}, "not a list of"),
        ([], "holds no captions"),
        ([{"image_id": 1}], "entry 1 has no image_id and caption"),
        ([{"image_id": 1, "caption": "a"}, {"image_id": None, "caption": "a"}], "entry 2 has no"),
        ([{"image_id": True, "caption": "a"}], "entry 1 has no image_id"),
        (["a dog"], "entry 1 has no image_id"),
        (
            [{"image_id": 1, "caption": "a"}, {"image_id": "1", "caption": "b"}],
            r"image 1 has two captions \(entry 2\)",
        ),
    ],
)
def test_what_are_no_results_is_one_line(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(PredictionsError, match=rf"p\.json: .*{message}") as caught:
        read_predictions(written(tmp_path / "p.json", value))
    assert "\n" not in str(caught.value)


def test_photos_that_do_not_match_are_named() -> None:
    references = {"1": ["a"], "2": ["b"], "3": []}
    results, captions = Path("p.json"), Path("c.json")
    with pytest.raises(PredictionsError, match=r"1 of 2 photos are not in c\.json \(first: 9\)"):
        match({"1": "a", "9": "b"}, references, results, captions)
    with pytest.raises(PredictionsError, match=r"no caption for 1 of the 2 photos .*\(first: 2\)"):
        match({"1": "a", "3": "b"}, references, results, captions, all_photos=True)
    with pytest.raises(PredictionsError, match=r"p\.json: none of its photos has captions in c"):
        match({"3": "b"}, references, results, captions)


def test_references_without_captions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no captions"):
        read_references(written(tmp_path / "coco.json", {**COCO, "annotations": []}))
