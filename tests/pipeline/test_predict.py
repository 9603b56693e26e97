"""`cap predict`: lines for any names, drives that do not answer, models that say little."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.captioner import captioner
from pipeline.captioner.captioner import Captioner
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

    def read(path: Path, *arguments: Any, **options: Any) -> ReadPhoto:
        if path.name == "d.jpg":
            never.wait()
        return read_photo(path, *arguments, **options)

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
