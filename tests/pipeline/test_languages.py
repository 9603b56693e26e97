"""The whole job with captions in Chinese, whose characters are the words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cache.record import CacheError
from cache.store import open_cache
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.extract import extract
from pipeline.extraction.fill import Notice
from pipeline.inspection.vocabulary_report import vocabulary_report
from tests.conftest import write_photo
from tests.pipeline.test_cli import SMALL, cap
from train.captions.script import CHARACTERS, TREEBANK

CAPTION = "两个人骑着BMX自行车。"


@pytest.fixture(scope="module")
def chinese(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, their captions.csv, a cache and a trained run."""
    folder = tmp_path_factory.mktemp("chinese")
    lines = ["image,caption"]
    for seed in range(8):
        write_photo(folder / "photos" / f"{seed}.jpg", seed)
        lines += [f"{seed}.jpg,{CAPTION}"] * 2
    (folder / "captions.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _, err = cap(
        "extract-features", "--images", folder / "photos", "--captions", folder / "captions.csv",
        "--out", folder / "x.h5", "--tokenizer", "characters", *SMALL,
    )  # fmt: skip
    assert "--tokenizer" not in err
    cap(
        "train", "--from-cache", folder / "x.h5", "--out", folder / "run", "--recipe", "classic",
        "--epochs", 16, "--batch-size", 4, "--min-count", 1, "--hidden-size", 32,
        "--embedding-size", 16, "--learning-rate", 0.02, "--device", "cpu", "--select-by", "loss",
    )  # fmt: skip
    return folder


def test_captions_are_printed_without_spaces(chinese: Path) -> None:
    photos = chinese / "photos"
    out, _ = cap("predict", photos / "0.jpg", photos / "1.jpg", "--model", chinese / "run")
    assert [line.split("\t")[1] for line in out.splitlines()] == [CAPTION] * 2
    found = json.loads(cap("predict", photos / "1.jpg", "--model", chinese / "run", "--json")[0])
    assert found["caption"] == CAPTION
    assert found["words"] == [*"两个人骑着", "bmx", *"自行车。"]


def test_scores_obey_the_models_tokenizer(chinese: Path) -> None:
    model = ("--model", chinese / "run", "--cache", chinese / "x.h5")
    out, err = cap("evaluate", *model, "--json")
    scores = json.loads(out)
    assert scores["tokenizer"] == "characters"
    assert scores["bleu_4"] == pytest.approx(1)
    assert scores["diversity"]["words_used"] == scores["diversity"]["vocabulary"]
    assert "leaving out METEOR: both know English alone" in err
    predictions = chinese / "run" / "best.x.beam3.predictions.json"
    assert json.loads(predictions.read_text())[0]["caption"] == "两 个 人 骑 着 bmx 自 行 车 。"
    by_file = ("--predictions", predictions, "--captions", chinese / "captions.csv", "--json")
    again, _ = cap("evaluate", *by_file, "--tokenizer", "characters")
    assert json.loads(again)["intervals"] == scores["intervals"]
    again, _ = cap("evaluate", *by_file[:2], "--cache", chinese / "x.h5", "--json")
    assert json.loads(again)["intervals"] == scores["intervals"]
    people, _ = cap("evaluate", "--human", "--cache", chinese / "x.h5", "--json")
    assert json.loads(people)["tokenizer"] == "characters"
    _, err = cap("evaluate", *model, "--tokenizer", "characters", code=2)
    assert "--tokenizer is for --captions" in err


def test_a_cache_knows_its_tokenizer(chinese: Path, tmp_path: Path) -> None:
    settings = {
        "images": chinese / "photos",
        "captions": chinese / "captions.csv",
        "backbone": "resnet18",
        "weights": "random",
        "image_size": 64,
    }
    assert open_cache(chinese / "x.h5").captions.tokenizer == CHARACTERS
    with pytest.raises(CacheError, match=r"x\.h5: written with tokenizer characters, not treebank"):
        list(extract(ExtractConfig(out=chinese / "x.h5", **settings)))  # type: ignore[arg-type]
    # Features do not depend on the tokenizer, so they can be used again.
    config = ExtractConfig(out=tmp_path / "x.h5", reuse=chinese / "x.h5", **settings)  # type: ignore[arg-type]
    told = [report.text for report in extract(config) if isinstance(report, Notice)]
    # Before come two lines about what was understood of the captions file.
    assert told[2:] == [
        "the captions are in Chinese, without spaces between words, and --tokenizer treebank makes "
        "one word of a sentence; use --tokenizer characters",
        "8 photos are known; encoding the others",
    ]
    assert open_cache(tmp_path / "x.h5").captions.tokenizer == TREEBANK
    assert json.loads(cap("info", chinese / "x.h5", "--json")[0])["tokenizer"] == "characters"


def test_a_vocabulary_is_one_of_characters(chinese: Path) -> None:
    from_cache, from_file = (
        vocabulary_report(chinese / name, 1, tokenizer)
        for name, tokenizer in (("x.h5", None), ("captions.csv", CHARACTERS))
    )
    assert from_cache == from_file
    assert from_cache.vocabulary.cases == {"bmx": "BMX"}
    assert from_cache.unfit is None
    out, err = cap("build-vocab", "--from", chinese / "captions.csv", "--json")
    assert json.loads(out)["tokenizer"] == "treebank"
    assert "the captions are in Chinese" in err
    _, err = cap("build-vocab", "--from", chinese / "x.h5", "--tokenizer", "whitespace", code=1)
    assert "x.h5: made with tokenizer characters, not whitespace; leave out --tokenizer" in err
