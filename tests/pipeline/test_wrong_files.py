"""A file where another kind of file belongs: one line that says what it is and where it belongs."""

from __future__ import annotations

import inspect
import itertools
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from pipeline.cli.app import app
from pipeline.cli.arguments.files import wanted_by, wrong_file
from pipeline.inspection.kinds import Kind, kind_of
from tests.conftest import ROOT, write_photo
from tests.pipeline.test_cli import cap

GROUP: Any = typer.main.get_command(app)
FORMATS = ROOT / "tests" / "formats" / "v0.2.0"
NAMES = {
    Kind.CACHE: "x.h5",
    Kind.MODEL: "run/best.cap",
    Kind.RUN: "run",
    Kind.SWEEP: "sweep",
    Kind.CHECKPOINT: "run/checkpoint.pt",
    Kind.WEIGHTS: "w.pth",
    Kind.PICTURE: "photos/a.jpg",
    Kind.TEXT: "captions.csv",
    Kind.FOLDER: "photos",
}
# How little each command must be told, with files of the right kinds.
RIGHT: dict[str, list[str]] = {
    "extract-features": [
        *("--images", "photos", "--out", "new.h5", "--captions", "captions.csv"),
        *("--only", "list.txt", "--reuse", "x.h5", "--weights", "w.pth"),
    ],
    "merge": ["x.h5", "--out", "new.h5"],
    "info": ["captions.csv", "--images", "photos"],
    "verify": ["x.h5", "--images", "photos", "--weights", "w.pth"],
    "build-vocab": ["--from", "x.h5", "--out", "vocabulary.json"],
    "train": [
        *("--from-cache", "x.h5", "--out", "new", "--val-list", "list.txt"),
        *("--from-model", "run"),
    ],
    "sweep": ["--from-cache", "x.h5", "--out", "new", "--val-cache", "x.h5"],
    "runs": ["run"],
    "evaluate": ["--model", "run", "--cache", "x.h5"],
    "predict": ["photos", "--model", "run", "--weights", "w.pth"],
    "demo": ["--out", "new"],
    "import-classic": [
        *("--encoder", "w.pth", "--decoder", "v.pth", "--vocab", "vocab.pkl", "--out", "new"),
    ],
}
SCORED = ["--predictions", "results.json", "--captions", "captions.csv", "--only", "list.txt"]
LINES = [*RIGHT.items(), ("evaluate", SCORED)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file or folder of each kind, by NAMES, and the others of RIGHT."""
    folder = tmp_path_factory.mktemp("files")
    shutil.copy(FORMATS / "cache.h5", folder / "x.h5")
    shutil.copytree(FORMATS / "run", folder / "run")
    (folder / "sweep").mkdir()
    (folder / "sweep" / "sweep.journal").touch()
    torch.save({"w": torch.ones(1)}, folder / "w.pth")
    torch.save({"v": torch.ones(1)}, folder / "v.pth")
    (folder / "vocab.pkl").write_bytes(pickle.dumps({"a": 1}))
    write_photo(folder / "photos" / "a.jpg", 0)
    (folder / "captions.csv").write_text("image,caption\na.jpg,A photo .\n")
    (folder / "list.txt").write_text("a.jpg\n")
    (folder / "results.json").write_text('[{"image_id": "a.jpg", "caption": "a photo"}]')
    return folder


def parameters(command: str) -> dict[str, Any]:
    """The command's files, by the name of the parameter."""
    return {p.name: p for p in GROUP.commands[command].params if wanted_by(command, p.name)}


def test_each_kind_is_known(files: Path, tmp_path: Path) -> None:
    assert {kind: kind_of(files / name) for kind, name in NAMES.items()} == {
        kind: kind for kind in NAMES
    }
    assert kind_of(tmp_path / "absent") is Kind.ABSENT
    assert kind_of("/dev/null") is Kind.OTHER
    assert kind_of("a\0b") is Kind.OTHER
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    assert kind_of(tmp_path / "noise") is Kind.OTHER
    (tmp_path / "utf16.csv").write_text("image,caption\n", encoding="utf-16")
    assert kind_of(tmp_path / "utf16.csv") is Kind.TEXT


def test_files_of_the_first_version_are_known() -> None:
    old = FORMATS.parent / "v0.1.0"
    kinds = {"cache.h5": Kind.CACHE, "run": Kind.RUN, "run/checkpoint.pt": Kind.CHECKPOINT}
    assert {name: kind_of(old / name) for name in kinds} == kinds


def test_a_folder_of_photos_may_hold_a_run(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "run", tmp_path / "both")
    write_photo(tmp_path / "both" / "a.jpg", 0)
    assert kind_of(tmp_path / "both") is Kind.FOLDER


def test_photos_may_lie_below_a_run(files: Path, tmp_path: Path) -> None:
    run = shutil.copytree(files / "run", tmp_path / "run")
    write_photo(run / "photos" / "a.jpg", 0)
    for name in ("images", "paths"):
        assert wrong_file("predict", {}, {name: [str(run)]}) is None
        assert wrong_file("predict", {}, {name: [str(files / "run")]}) is not None


def test_every_option_for_a_file_is_looked_at() -> None:
    """A new one has to be added to `pipeline/cli/arguments/files.py`."""
    for registered in app.registered_commands:
        command: Any = registered.callback
        name = registered.name or command.__name__
        signature = inspect.signature(command, eval_str=True)
        for parameter in signature.parameters.values():
            # `cap info` takes anything, and a writer of a cache looks at its --out.
            if "Path" in str(parameter.annotation) and parameter.name not in ("out", "file"):
                assert wanted_by(name, parameter.name) is not None, (name, parameter.name)


@pytest.mark.parametrize("kind", NAMES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line[0]} {line[1][0]}")
def test_a_file_of_another_kind_is_named_in_one_line(
    kind: Kind, line: tuple[str, list[str]], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    command, told = line
    for parameter in parameters(command).values():
        wanted = wanted_by(command, parameter.name)
        assert wanted is not None
        flag = parameter.opts[0]
        place = told.index(flag) + 1 if flag in told else 0
        if kind not in wanted.refuses or (place == 0 and flag[:1] == "-"):
            continue
        arguments = [*told[:place], NAMES[kind], *told[place + 1 :]]
        out, err = cap(command, *arguments, code=1)
        assert out == ""
        assert err.startswith(f"error: {NAMES[kind]}: is {kind.value}, not {wanted.text}; ")
        assert err.count("\n") == 1


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line[0]} {line[1][0]}")
def test_any_two_arguments_that_are_swapped_are_noticed(
    line: tuple[str, list[str]], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    command, told = line
    places = [0] if told[0][:1] != "-" else []
    places += [place + 1 for place, word in enumerate(told) if word[:1] == "-"]
    for one, other in itertools.combinations(places, 2):
        first, second = told[one], told[other]
        alike = {kind_of(first), kind_of(second)}
        if len(alike) == 1:  # two lists, two caches
            continue
        swapped = list(told)
        swapped[one], swapped[other] = second, first
        before = sorted(files.rglob("*"))
        _, err = cap(command, *swapped, code=1)
        error = err.splitlines()[-1]  # what comes before was understood
        assert error.startswith("error: ")
        assert first in error or second in error
        assert err.count("error: ") == 1
        assert sorted(files.rglob("*")) == before


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("train --from-cache run --out new", "run: is a run's folder, not a feature cache; did "),
        ("evaluate --cache run --model x.h5", "run: is a run's folder, not a feature cache; did "),
        ("predict a.jpg --model x.h5", "x.h5: is a feature cache, not a model; `cap info x.h5` "),
        (
            "predict a.jpg --model run/checkpoint.pt",
            "run/checkpoint.pt: is a run's checkpoint, not a model; the run's folder, run, is a",
        ),
        (
            "train --from-cache captions.csv --out new",
            "captions.csv: is a text file, not a feature cache; `cap extract-features` makes one",
        ),
        ("predict a.jpg --model sweep", "sweep: is a sweep's folder, not a model; `cap runs sw"),
        ("bench predict --weights x.h5", "x.h5: is a feature cache, not a file of a network's "),
    ],
)
def test_the_line_says_where_it_belongs(
    told: str, message: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    _, err = cap(*told.split(), code=1)
    assert err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    "told",
    [
        "extract-features --images photos --out captions.csv/new/x.h5",
        "merge x.h5 --out captions.csv/x.h5",
        "train --from-cache x.h5 --out captions.csv/run",
        "evaluate --model run --cache x.h5 --out captions.csv/results",
        "build-vocab --from x.h5 --out captions.csv/v.json",
    ],
)
def test_the_part_of_a_path_that_cannot_be_is_named(
    told: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    _, err = cap(*told.split(), code=1)
    assert err == "error: captions.csv: is a text file, so nothing can be written below it\n"


def test_a_drive_that_does_not_answer_is_left_to_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pipeline.cli.arguments import files

    def never(path: str) -> Kind:
        import time

        time.sleep(0.5)
        return Kind.CACHE

    monkeypatch.setattr(files, "_SOON_S", 0.01)
    monkeypatch.setattr(files, "kind_of", never)
    assert files.wrong_file("predict", {"model": "--model"}, {"model": Path("far")}) is None
