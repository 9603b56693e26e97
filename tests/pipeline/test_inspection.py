"""`cap info` shows whatever it is given."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, write_photo
from tests.pipeline.test_cli import cap

FORMATS = ROOT / "tests" / "formats" / "v0.2.0"


def info(path: object) -> dict[str, Any]:
    facts = json.loads(cap("info", path, "--json")[0])
    shown = dict(line.split(None, 1) for line in cap("info", path)[0].splitlines())
    assert shown.keys() == {name for name, value in facts.items() if value is not None}
    assert isinstance(facts, dict)
    return facts


def test_a_model_shows_its_encoder_words_training_and_scores() -> None:
    facts = info(FORMATS / "run" / "best.cap")
    assert facts["kind"] == "model"
    assert (facts["backbone"], facts["weights"], facts["views"]) == (
        "resnet18",
        "random",
        ["full", "flip"],
    )
    assert facts["weights_sha256"] == "ab" * 32
    assert (facts["feature_dim"], facts["vocab_size"], facts["hidden_size"]) == (8, 19, 32)
    assert (facts["captions"], facts["min_count"], facts["tokenizer"]) == (22, 1, "treebank")
    assert facts["epoch"] == 47  # 46 in the file, which counts from 0
    assert facts["val_cider"] == pytest.approx(7.526965647861114)
    assert facts["training"]["epochs"] == 64
    assert "val_cider        752.70 (times 100)\n" in cap("info", FORMATS / "run" / "best.cap")[0]


def test_a_run_shows_its_model_and_whether_it_can_go_on(tmp_path: Path) -> None:
    run = shutil.copytree(FORMATS / "run", tmp_path / "run")
    facts = info(run)
    assert facts["kind"] == "run"
    assert (facts["model"], facts["epochs_done"], facts["resumable"]) == ("best.cap", 60, True)
    assert facts["vocab_size"] == 19
    (run / "checkpoint.pt").unlink()
    (run / "best.cap").unlink()
    facts = info(run)
    assert (facts["model"], facts["resumable"]) == ("last.cap", False)
    assert facts["files"] == "last.cap, metrics.jsonl"


def test_a_checkpoint_shows_where_training_goes_on(tmp_path: Path) -> None:
    shutil.copy(FORMATS / "run" / "checkpoint.pt", tmp_path / "other name")
    facts = info(tmp_path / "other name")
    assert (facts["kind"], facts["epochs_done"], facts["format_version"]) == ("checkpoint", 60, 3)
    assert facts["data"]["backbone"] == "resnet18"


def test_weights_show_their_size(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(2, 3), "b": torch.ones(4)}, tmp_path / "w.pth")
    facts = info(tmp_path / "w.pth")
    assert (facts["kind"], facts["tensors"], facts["parameters"]) == ("weights", 2, 10)
    assert facts["first"] == "a.weight [2, 3]"


def test_folders_pictures_and_sweeps_say_what_they_hold(tmp_path: Path) -> None:
    write_photo(tmp_path / "photos" / "a.jpg", 0)
    (tmp_path / "photos" / "b.raw").write_bytes(b"raw")
    facts = info(tmp_path / "photos")
    assert facts["kind"] == "folder"
    assert (facts["photos"], facts["first"], facts["left_out"]) == (1, "a.jpg", {".raw": 1})
    assert (
        info(tmp_path / "photos" / "a.jpg").items()
        >= {
            "kind": "picture",
            "format": "JPEG",
            "width": 80,
            "height": 60,
        }.items()
    )
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.journal").touch()
    shutil.copytree(FORMATS / "run", tmp_path / "sweep" / "trial-000")
    facts = info(tmp_path / "sweep")
    assert (facts["kind"], facts["trials"]) == ("sweep", 1)
    assert facts["best"] == str(tmp_path / "sweep" / "trial-000")


def test_files_that_commands_wrote_are_known(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"bleu_4": 0.2, "cider": 0.5, "count": 11}')
    assert info(tmp_path / "s.json") == {"kind": "scores", "bleu_4": 0.2, "cider": 0.5, "count": 11}
    vocabulary = tmp_path / "v.json"
    cap("build-vocab", "--from", FORMATS / "cache.h5", "--min-count", 1, "--out", vocabulary)
    assert info(vocabulary) == {"kind": "vocabulary", "words": 15, "min_count": 1}


def test_a_captions_file_is_read_as_before(photos: Path) -> None:
    out, _ = cap("info", photos / "captions.txt", "--images", photos)
    assert "photos in column 'image', captions in column 'caption'; 12 of 12 photos found" in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\0\1\2", "is of an unknown kind"),
        (b"\xff\xd8\xff\xe0", "a picture that cannot be read"),
        (b'\x40\0\0\0\0\0\0\0{"__metadata__":{"cap_bundle"', "not a model file"),
    ],
)
def test_what_cannot_be_shown_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    out, err = cap("info", tmp_path / "x", code=1)
    assert out == ""
    assert err.startswith(f"error: {tmp_path}/x: {message}")
    assert err.count("\n") == 1


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    _, err = cap("info", tmp_path / "pipe", code=1)
    assert err.startswith(f"error: {tmp_path}/pipe: is ")


def test_options_of_other_kinds_are_refused(photos: Path) -> None:
    _, err = cap("info", FORMATS / "run", "--unreadable", code=2)
    assert "--unreadable is for caches" in err
    _, err = cap("info", FORMATS / "cache.h5", "--images", photos, code=2)
    assert "for captions files" in err
