"""What every command does alike: `--quiet`, `--verbose`, `--json`, `--version`, exit codes."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer

from pipeline.cli.app import app
from tests.conftest import ROOT, write_photo
from tests.pipeline.classic_run import random_run
from tests.pipeline.test_cli import SMALL, cap, spawn

GROUP: Any = typer.main.get_command(app)
FORMATS = ROOT / "tests" / "formats" / "v0.2.0"
COMMANDS = sorted(name for name in GROUP.commands if name != "bench")


def test_the_version_names_what_a_report_needs() -> None:
    out, err = cap("--version")
    assert re.fullmatch(
        rf"cap \S+.* \(Python {re.escape(platform.python_version())}, "
        rf"torch {re.escape(version('torch'))}\)\n",
        out,
    )
    assert err == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_quiet_or_verbose(name: str) -> None:
    options = {opt for parameter in GROUP.commands[name].params for opt in parameter.opts}
    assert {"--quiet", "-q", "--verbose", "-v"} <= options


def test_every_command_has_json() -> None:
    for name in COMMANDS:
        options = {opt for parameter in GROUP.commands[name].params for opt in parameter.opts}
        assert "--json" in options, name


def documented(name: str) -> list[str]:
    """The members that the page lists for a command, those that are always there."""
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `cap {name}` \| (.*) \|$", page, re.MULTILINE)
    return re.findall(r"`(\w+)`", row.split(";")[0])


def test_json_has_the_members_that_are_documented(tmp_path: Path, photos: Path) -> None:
    run, cache, new = tmp_path / "run", tmp_path / "x.h5", tmp_path / "new.h5"
    small = ["--epochs", 1, "--min-count", 1, "--batch-size", 8, "--hidden-size", 8]
    images = ["--images", photos, "--captions", photos / "captions.txt"]
    told: dict[str, list[object]] = {
        "extract-features": [*images, "--out", cache, *SMALL],
        "backbones": [],
        "merge": [FORMATS / "shard-1.h5", FORMATS / "shard-2.h5", "--out", new],
        "verify": [cache],
        "build-vocab": ["--from", cache],
        "train": ["--from-cache", cache, "--out", run, "--device", "cpu", *small],
        "runs": [tmp_path],
        "evaluate": ["--model", run, "--cache", cache, "--no-meteor"],
        "predict": [photos / "a.jpg", "--model", run],
        "search": ["a photo", "--model", run, "--cache", cache],
        "explain": [*(photos / "a.jpg", "--model", run, "--grid", 3, "--out", tmp_path / "a.png")],
        "export": ["--model", run, "--out", tmp_path / "folder", "--max-length", 2],
        "compare-encoders": [
            *(*images, "--out", tmp_path / "encoders", "--steps", 1, "--image-size", 32),
            *("--backbones", "resnet18", "--weights", "resnet18=random"),
        ],
        "import-classic": [*random_run().write(tmp_path / "files"), "--out", tmp_path / "old"],
    }
    for name, arguments in told.items():
        found = json.loads(cap(name, *arguments, "--json")[0])
        members = list((found[0] if isinstance(found, list) else found).keys())
        assert members == documented(name), name
    assert set(told) | {"info"} == {
        name for name in COMMANDS if name not in ("sweep", "demo", "serve")
    }
    listed = json.loads(cap("runs", tmp_path, "--json")[0])[0]
    assert listed["best_epoch"] == 1


def test_quiet_leaves_results_and_errors(tmp_path: Path) -> None:
    for seed in range(5):
        write_photo(tmp_path / "photos" / f"{seed}.jpg", seed)
    (tmp_path / "photos" / "5.jpg").write_bytes(b"no photo")
    (tmp_path / "photos" / "x.raw").write_bytes(b"raw")
    told = ["extract-features", "--images", tmp_path / "photos", "--device", "cpu", *SMALL]
    usual = cap(*told, "--out", tmp_path / "a.h5")
    quiet = cap(*told, "--out", tmp_path / "b.h5", "--quiet")
    assert "extracting: " in usual[1]
    assert "left out 1 .raw" in usual[1]
    assert quiet[1] == ""
    assert quiet[0].split(" in ")[0] == usual[0].split(" in ")[0].replace("a.h5", "b.h5")
    _, err = cap(*told, "--out", tmp_path, "--quiet", code=1)
    assert err.startswith(f"error: {tmp_path}: is a folder")
    assert "extracting: " in cap(*told, "--out", tmp_path / "c.h5")[1]  # not quiet for ever


def test_a_detail_is_written_only_on_request(tmp_path: Path) -> None:
    for seed in range(3):
        write_photo(tmp_path / "photos" / f"{seed}.jpg", seed)
    told = ["extract-features", "--images", tmp_path / "photos", "--out", tmp_path / "x.h5"]
    cap(*told, *SMALL, "--device", "cpu", "--batch-size", 2)
    detail = "continuing with the cache's own batch size, 2"
    again = [*told, "--device", "cpu", "--batch-size", 3]
    assert detail not in cap(*again)[1]
    assert detail in cap(*again, "--verbose")[1]


def test_quiet_and_verbose_contradict_each_other() -> None:
    _, err = cap("backbones", "-q", "-v", code=2)
    assert "--quiet and --verbose contradict each other" in err


@pytest.mark.parametrize(
    "told",
    [
        ["extract-features", "--images", "", "--out", "x.h5"],
        ["extract-features", "--images=", "--out", "x.h5"],
        ["predict", "", "--model", "x"],
        ["merge", "a.h5", "", "--out", "x.h5"],
    ],
)
def test_an_empty_value_is_refused(told: list[str]) -> None:
    _, err = cap(*told, code=2)
    name = "--images" if "extract-features" in told else "an argument"
    assert f"Error: the value of {name} is empty; is a variable of the shell not set?" in err


def test_a_run_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    cache = FORMATS / "cache.h5"
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(11):
        (folder / f"{number}.txt").touch()
    for command in ("train", "sweep"):
        _, err = cap(command, "--from-cache", cache, "--out", folder, code=1)
        assert err == (
            f"error: {folder}: holds 11 other files; name a folder of its own with --out\n"
        )
    assert len(list(folder.iterdir())) == 11
    (folder / "0.txt").unlink()  # a few notes, or a log, are no reason
    told = ["--epochs", 1, "--batch-size", 8, "--min-count", 1, "--device", "cpu", "--quiet"]
    cap("train", "--from-cache", cache, "--out", folder, *told)
    assert (folder / "best.cap").is_file()


def test_a_run_is_replaced_however_many_files_it_has(tmp_path: Path) -> None:
    run = shutil.copytree(FORMATS / "run", tmp_path / "run")
    for number in range(20):
        (run / f"{number}.txt").touch()
    _, err = cap("train", "--from-cache", FORMATS / "cache.h5", "--out", run, code=1)
    assert "already holds a run; continue it with --resume" in err


def test_sigterm_ends_training_as_ctrl_c_does(tmp_path: Path) -> None:
    process = spawn(
        "train", "--from-cache", FORMATS / "cache.h5", "--out", tmp_path / "run", "--epochs",
        100000, "--batch-size", 8, "--min-count", 1, "--log-every", 1, "--device", "cpu",
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("Epoch [1/100000], Step [2/"):
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"interrupted; the model so far is in {tmp_path}/run; go on with --resume" in err
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_no_command_writes_colours_to_what_is_no_terminal() -> None:
    for told in (["backbones"], ["--help"], ["train", "--lr", "1"]):
        code = 2 if "--lr" in told else 0
        assert "\x1b[" not in "".join(cap(*told, code=code))


def test_json_is_json_with_an_unreadable_name(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(folder)
    out, _ = cap("info", os.fsdecode(folder), "--json")
    assert json.loads(out)["kind"] == "folder"
