"""`cap predict`: lines for any names, drives that do not answer, models that say little, files."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.captioner import captioner
from pipeline.captioner.captioner import Captioner
from pipeline.captioner.predictions import Prediction
from pipeline.evaluation.references import read_predictions
from pipeline.photos.drive.answers import prompt_answer_of
from pipeline.photos.drive.silence import StalledError
from pipeline.photos.photo_file import ReadPhoto, read_photo
from pipeline.photos.photo_loader import PhotoLoader
from pipeline.photos.readers import threads
from tests.conftest import ROOT, write_photo
from tests.pipeline.test_captioner import trained
from tests.pipeline.test_cli import cap
from train.model.bundle import load_bundle

# A system call that waits for a dead drive cannot be interrupted. Ctrl-C comes while it waits.
HANGING = """
import os, signal, threading
from pipeline.photos.readers import threads
pressed = threading.Lock()
def hang(*arguments, **options):
    while True:
        try:
            if pressed.acquire(blocking=False):
                os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
{what} = hang
from pipeline.cli.main import main
main()
"""


# Two photos a batch; the process kills itself when four have captions.
KILLED = """
import os, signal
from pipeline.captioner import captioner
captioner._BATCH_PHOTOS = 2
stream = captioner.Captioner.stream
def stopping(self, photos, **settings):
    for number, prediction in enumerate(stream(self, photos, **settings)):
        if number == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        yield prediction
captioner.Captioner.stream = stopping
from pipeline.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def run_folder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(photos, tmp_path_factory.mktemp("predict"))[1]


def test_every_name_is_one_line(run_folder: Path, tmp_path: Path) -> None:
    names = [b"a\tb.jpg", b"a\nb.jpg", b"a\\b.jpg", b"\xff.jpg"]
    for seed, name in enumerate(names):
        write_photo(tmp_path / "x.jpg", seed)
        os.rename(tmp_path / "x.jpg", os.fsencode(tmp_path) + b"/" + name)
    paths = [os.fsencode(tmp_path) + b"/" + name for name in names]
    start, end = [sys.executable, "-m", "pipeline", "predict"], ["--model", str(run_folder)]
    result = subprocess.run(
        [*start, *map(os.fsdecode, paths), *end], capture_output=True, check=True, cwd=ROOT
    )
    lines = result.stdout.split(b"\n")
    shown = [rb"a\tb.jpg", rb"a\nb.jpg", rb"a\\b.jpg", b"\xff.jpg", b""]
    assert [os.path.basename(line.split(b"\t")[0]) for line in lines] == shown
    assert [line.count(b"\t") for line in lines] == [1, 1, 1, 1, 0]
    out, _ = cap("predict", *map(os.fsdecode, paths), "--model", run_folder, "--json")
    assert [os.fsencode(json.loads(line)["path"]) for line in out.splitlines()] == paths


@pytest.mark.parametrize(
    ("what", "letters"),
    [
        ("threads.read_photo", "a"),
        ("threads.read_photo", "abc"),
        ("os.path.isdir", "a"),
    ],
)
def test_the_first_ctrl_c_ends_the_waiting_for_a_dead_drive(
    what: str, letters: str, run_folder: Path, photos: Path
) -> None:
    names = [str(photos / f"{letter}.jpg") for letter in letters]
    code = HANGING.replace("{what}", what)
    command = [sys.executable, "-c", code, "predict", *names, "--model", str(run_folder)]
    result = subprocess.run(command, capture_output=True, cwd=ROOT, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (130, b"", b"interrupted\n")


def test_a_drive_that_gives_no_photo_ends_the_run_after_what_came_before(
    run_folder: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()

    def read(place: str, *arguments: Any, **options: Any) -> ReadPhoto:
        if place.endswith("/d.jpg"):
            never.wait()
        return read_photo(place, *arguments, **options)

    monkeypatch.setattr(threads, "read_photo", read)
    monkeypatch.setattr(captioner, "PhotoLoader", functools.partial(PhotoLoader, stall_s=0.1))
    monkeypatch.setattr(captioner, "_BATCH_PHOTOS", 2)
    found = Captioner.load(run_folder, device="cpu").stream(sorted(photos.glob("*.jpg")))
    assert [Path(next(found).path).name for _ in range(2)] == ["a.jpg", "b.jpg"]
    with pytest.raises(StalledError) as caught:
        next(found)
    assert re.fullmatch(
        rf"{photos}/[cd]\.jpg: nothing came from the disk for \d+ s; "
        "caption it and those behind it when the drive answers again",
        str(caught.value),
    )
    never.set()


def test_a_drive_that_does_not_answer_is_one_line() -> None:
    never = threading.Event()
    with pytest.raises(StalledError, match=r"^x/a\.jpg: no answer from the disk for 0 s; see "):
        prompt_answer_of(never.wait, "x/a.jpg", stall_s=0.1)
    never.set()
    assert prompt_answer_of(lambda: 7, "x") == 7
    with pytest.raises(ZeroDivisionError):
        prompt_answer_of(lambda: 1 // 0, "x")


@pytest.mark.parametrize("recorded", [None, "7 of 9 captions are empty"])
def test_a_model_that_says_little_is_named_once_with_what_helps(
    recorded: str | None, run_folder: Path, photos: Path, tmp_path: Path
) -> None:
    bundle = load_bundle(run_folder)
    model = tmp_path / "x.cap"
    if recorded is not None:
        replace(bundle, training={**bundle.training, "degenerate": recorded}).save(model)
    else:
        with torch.no_grad():  # one word for ever
            bundle.decoder.head.weight.zero_()
            bundle.decoder.head.bias.zero_()
            bundle.decoder.head.bias[5] = 50
        bundle.save(model)
    arguments = [photos / "a.jpg", photos / "b.jpg", "--model", model]
    out, err = cap("predict", *arguments)
    assert out.count("\n") == 2
    assert err == (
        f"{model}: its captions mean little ({recorded or 'words repeat within the captions'}); "
        "train it on more photos or more captions of each, for more --epochs, or with a stronger "
        "--backbone\n"
    )
    drawn = cap("predict", *arguments, "--sample", "--temperature", "2")[1]
    assert drawn == ("" if recorded is None else err)


@pytest.fixture
def no_more_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object, **settings: object) -> Captioner:
        raise AssertionError("loaded, although there is nothing to do")

    monkeypatch.setattr(Captioner, "load", load)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.jpg")
    }


def test_out_has_what_would_be_printed(run_folder: Path, photos: Path, tmp_path: Path) -> None:
    names = [photos / f"{letter}.jpg" for letter in "abe"]
    common = ["predict", *names, "--model", run_folder, "--captions", 2]
    printed, _ = cap(*common, code=1)
    out, err = cap(*common, "--out", tmp_path / "x.csv", code=1)
    assert out == ""
    assert f"error: {names[2]}: not an image" in err
    assert f"{tmp_path}/x.csv: has the captions of 2 photos\n" in err
    assert err.endswith("1 of 3 photos have no caption\n")
    table = rows(tmp_path / "x.csv")
    assert "".join(f"{row['path']}\t{row['caption']}\n" for row in table[:4]) == printed
    assert table[4]["error"] == "not an image, or of an unknown format"
    cap("predict", names[0], "--model", run_folder, "--out", tmp_path / "x.jsonl", "--log-probs")
    line = json.loads(cap("predict", names[0], "--model", run_folder, "--json", "--log-probs")[0])
    found = json.loads((tmp_path / "x.jsonl").read_text())
    assert found.pop("written_by_cap").startswith("run/best.cap ")
    assert found == line


def test_a_killed_command_goes_on_where_it_was(
    run_folder: Path, photos: Path, tmp_path: Path
) -> None:
    before = digests(photos)
    names = [str(photos / f"{letter}.jpg") for letter in "abcdfg"]
    outputs = ["--out", str(tmp_path / "x.csv"), "--sidecar", "--xmp"]
    outputs += ["--sidecar-folder", str(tmp_path / "beside")]
    end = [*names, "--model", str(run_folder), "--device", "cpu", *outputs]
    result = subprocess.run(
        [sys.executable, "-c", KILLED, "predict", *end], cwd=ROOT, capture_output=True, timeout=120
    )
    assert result.returncode == -signal.SIGKILL
    killed = (tmp_path / "x.csv").read_bytes()
    assert len(rows(tmp_path / "x.csv")) == 4
    assert len(list((tmp_path / "beside").iterdir())) == 8
    out, err = cap("predict", *end)
    assert "4 of 6 photos need no caption any more\n" in err
    assert [line.split("\t")[0] for line in out.splitlines()] == []
    assert (tmp_path / "x.csv").read_bytes().startswith(killed)
    assert [row["path"] for row in rows(tmp_path / "x.csv")] == names
    assert len(list((tmp_path / "beside").iterdir())) == 12
    whole, _ = cap("predict", *names, "--model", run_folder, "--device", "cpu")
    assert "".join(f"{r['path']}\t{r['caption']}\n" for r in rows(tmp_path / "x.csv")) == whole
    assert digests(photos) == before


def test_ctrl_c_says_what_is_kept(
    run_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Captioner.stream

    def stopping(self: Captioner, photos: list[str]) -> Iterator[Prediction]:
        yield from list(real(self, photos))[:2]
        raise KeyboardInterrupt

    monkeypatch.setattr(captioner.Captioner, "stream", stopping)
    out = tmp_path / "x.coco.json"
    for number, letter in enumerate("abc", 1):
        os.link(photos / f"{letter}.jpg", tmp_path / f"{number}.jpg")
    sheet = tmp_path / "sheet.png"
    _, err = cap(
        *("predict", tmp_path, "--model", run_folder, "--out", out, "--sheet", sheet), code=130
    )
    assert err.endswith(
        f"interrupted; {out}.part has the captions of 2 photos; the same command goes on; "
        "no sheet was written\n"
    )
    assert not out.exists()
    assert not sheet.exists()
    monkeypatch.setattr(captioner.Captioner, "stream", real)
    _, err = cap("predict", tmp_path, "--model", run_folder, "--out", out)
    assert "2 of 3 photos need no caption any more\n" in err
    assert list(read_predictions(out)) == ["1", "2", "3"]


@pytest.mark.usefixtures("no_more_captions")
def test_nothing_is_loaded_for_wrong_files(run_folder: Path, photos: Path, tmp_path: Path) -> None:
    start = ["predict", photos / "a.jpg", "--model", run_folder]
    for arguments, code, message in (
        (["--out", tmp_path / "x.tsv"], 2, "ends in none of .csv, .jsonl, .coco.json"),
        (["--out", tmp_path / "x.csv", "--json"], 2, "--json is for standard output"),
        (["--out", tmp_path / "x.csv", "--log-probs"], 2, "--log-probs has no effect"),
        (["--out", tmp_path / "x.jsonl", "--words"], 2, "leave out --words"),
        (["--out", tmp_path / "x.coco.json", "--captions", 2], 2, "leave out --captions"),
        (["--overwrite"], 2, "--overwrite has no effect"),
        (["--ids", photos / "captions.txt"], 2, "--ids has no effect"),
        (["--sidecar-folder", tmp_path], 2, "--sidecar-folder has no effect"),
        (["--out", tmp_path / "x.coco.json"], 1, "a.jpg: has no number in its name"),
        (["--sheet", tmp_path / "x.jpg"], 1, "sheets are PNG"),
    ):
        _, err = cap(*start, *arguments, code=code)
        assert message in " ".join(err.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_predict_writes_a_sheet_of_all_photos(
    run_folder: Path, photos: Path, tmp_path: Path
) -> None:
    names = [photos / f"{letter}.jpg" for letter in "abe"]
    options = ["--model", run_folder, "--out", tmp_path / "x.csv", "--sheet", tmp_path / "x.png"]
    cap("predict", *names[:2], *options)
    _, err = cap("predict", *names, *options, code=1)
    assert f"{tmp_path}/x.png: a sheet of 3 photos\n" in err
    assert len(rows(tmp_path / "x.csv")) == 3  # one of them is the error's


def test_evaluate_writes_a_sheet_with_references(
    run_folder: Path, photos: Path, tmp_path: Path
) -> None:
    cache = run_folder.parent / "x.h5"
    common = ["evaluate", "--cache", cache, "--no-meteor", "--images", photos]
    _, err = cap(
        *common, "--model", run_folder, "--out", tmp_path / "scores", "--sheet", tmp_path / "x.png"
    )
    assert f"{tmp_path}/x.png: a sheet of 11 photos\n" in err
    (found,) = (tmp_path / "scores").glob("*.predictions.json")
    some = json.loads(found.read_text())[:2]
    found.write_text(json.dumps(some))
    _, err = cap(*common, "--predictions", found, "--sheet", tmp_path / "x.png")
    assert f"{tmp_path}/x.png: a sheet of 2 photos\n" in err
    for arguments, message in (
        (["--human", "--sheet", "x.png"], "--sheet shows captions of a model or of a file"),
        (["--model", run_folder], "--images has no effect without --gallery or --sheet"),
    ):
        _, err = cap(*common, *arguments, code=2)
        assert message in " ".join(err.replace("│", " ").split())
