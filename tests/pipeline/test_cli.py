"""The commands as a user types them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from cache.store import open_cache
from pipeline.cli.app import app
from pipeline.cli.extract import _kept, _state
from pipeline.extraction.config import ExtractConfig
from tests.conftest import ROOT, MakeCache, write_photo
from train.config import BEST, CLASSIC, Recipe

COMMANDS = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
SMALL = ["--backbone", "resnet18", "--weights", "random", "--image-size", "64"]


def cap(*arguments: object, code: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of a command that must end with this exit code."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def work(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with x.h5 and a trained run."""
    folder = tmp_path_factory.mktemp("work")
    out, err = cap(
        "extract-features", "--images", photos, "--captions", photos / "captions.txt",
        "--out", folder / "x.h5", "--batch-size", 4, *SMALL,
    )  # fmt: skip
    assert out.startswith(
        f"{folder}/x.h5: 11 photos of 512 features x 1 views, 24 captions; 1 set aside; 12 new in "
    )
    assert "e.jpg: not an image, or of an unknown format; set aside" in err
    out, err = cap(
        "train", "--from-cache", folder / "x.h5", "--out", folder / "run", "--epochs", 2,
        "--batch-size", 8, "--min-count", 1, "--hidden-size", 32, "--embedding-size", 16,
        "--log-every", 1, "--val-share", 0.2, "--device", "cpu",
    )  # fmt: skip
    assert re.fullmatch(
        rf"{folder}/run/best\.cap \(epoch \d: validation loss \d\.\d+, CIDEr \d\.\d+\)\n", out
    )
    # The recipe smooths the targets, so the training loss has no perplexity.
    assert re.search(r"Epoch \[1/2\], Step \[1/3\], Smoothed loss: \d\.\d{4}, \d", err)
    assert re.search(
        r"^\d+ captions of 9 photos to train on, \d+ captions of 2 photos held out for validation, "
        r"vocabulary of \d+ words \(every word\), ",
        err,
        re.MULTILINE,
    )
    assert re.search(r"Validation loss: \d\.\d{4}, Perplexity: \d+\.\d\d, BLEU-4", err)
    return folder


def test_every_command_says_what_it_does_with_an_example() -> None:
    out, _ = cap("--help")
    for name in COMMANDS:
        assert name in out
        text, _ = cap(name, "--help")
        assert f"Example: cap {name} " in " ".join(text.split())
        assert re.search(r"Usage: .*? [A-Z][a-z]+ [^.]*[.:]", " ".join(text.split())), name


def test_defaults_shown_are_the_configs(work: Path) -> None:
    command = typer.main.get_command(app)
    shown = {
        name: {parameter.name: parameter.default for parameter in sub.params}
        for name, sub in command.commands.items()  # type: ignore[attr-defined]
    }
    extract, train = shown["extract-features"], shown["train"]
    defaults = ExtractConfig(Path(), Path())
    assert extract["backbone"] is None  # as the cache was begun, or else the config's
    help = " ".join(cap("extract-features", "--help")[0].split())
    of_network = "what the network was trained for, 224 for most"
    weights = "IMAGENET1K_V1, of timm pretrained"
    for default in ("resnet152", weights, "full", of_network, "treebank"):
        assert f"[default: {default}, or as --out was begun, or --reuse made]" in help
    assert (defaults.backbone, defaults.weights) == ("resnet152", "IMAGENET1K_V1")
    assert (defaults.views, defaults.image_size) == (("full",), None)
    assert extract["batch_size"] == defaults.batch_size
    assert train["recipe"] == "best"
    assert (CLASSIC.embedding_size, CLASSIC.hidden_size, CLASSIC.batch_size) == (256, 512, 128)
    text = " ".join(cap("train", "--help")[0].split())
    assert f"[best: {BEST.embedding_size}, classic: {CLASSIC.embedding_size}]" in text
    for field in dataclasses.fields(Recipe):
        if field.type in ("int", "float", "str"):
            # the kind of value: `<int>`, or `INTEGER` with an older typer
            assert re.search(rf" --{field.name.replace('_', '-')} [<A-Z]", text), field.name


def test_info_shows_and_prints_json(work: Path) -> None:
    out, _ = cap("info", work / "x.h5")
    assert re.search(r"^done +11$", out, re.MULTILINE)
    assert re.search(r"^backbone +resnet18$", out, re.MULTILINE)
    facts = json.loads(cap("info", work / "x.h5", "--json", "--unreadable")[0])
    assert facts["captions"] == 24
    assert facts["errors"] == [{"path": "e.jpg", "reason": "not an image, or of an unknown format"}]
    assert cap("info", work / "x.h5", "--unreadable")[0].startswith("e.jpg\tnot an image")


def test_verify_finds_changed_photos_and_damage(work: Path, photos: Path, tmp_path: Path) -> None:
    out, _ = cap("verify", work / "x.h5", "--images", photos, "--device", "cpu")
    assert "12 rows, 0 pending; 11 photos compared, 11 encoded again" in out
    assert "all good" in out
    for path in photos.glob("*.jpg"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_photo(tmp_path / "b.jpg", 99)
    (tmp_path / "c.jpg").unlink()
    out, err = cap("verify", work / "x.h5", "--images", tmp_path, "--device", "cpu", code=1)
    assert "b.jpg: the photo has changed" in err
    assert "c.jpg: No such file" in err
    (tmp_path / "elsewhere").mkdir()
    out, err = cap("verify", work / "x.h5", "--images", tmp_path / "elsewhere", code=1)
    assert "1 problem" in out
    assert err.count("\n") == 1
    assert "none of the 11 photos looked for is there, for example" in err
    assert "no photo was looked at" in cap("verify", work / "x.h5")[0]
    data = bytearray((work / "x.h5").read_bytes())
    data[-700] ^= 1
    (tmp_path / "y.h5").write_bytes(data)
    _, err = cap("verify", tmp_path / "y.h5", code=1)
    assert "damaged" in err or "checksum" in err
    result = json.loads(cap("verify", work / "x.h5", "--json")[0])
    assert result["ok"]
    assert result["rows"] == 12


def test_build_vocab_counts_caches_and_caption_files_alike(
    work: Path, photos: Path, tmp_path: Path
) -> None:
    from_cache = json.loads(cap("build-vocab", "--from", work / "x.h5", "--json")[0])
    from_file = json.loads(cap("build-vocab", "--from", photos / "captions.txt", "--json")[0])
    assert from_cache == from_file
    assert from_cache["size"] == 4 + 8  # . noise , a coarse number of photo
    assert from_cache["most_frequent"]["."] == 24
    out, _ = cap("build-vocab", "--from", work / "x.h5", "--out", tmp_path / "vocab.json")
    assert out.startswith(
        "8 words occur at least 4 times; the vocabulary also has 4 special ones\n"
    )
    assert json.loads((tmp_path / "vocab.json").read_text())["min_count"] == 4


@pytest.mark.usefixtures("small_meteor")
def test_evaluate_writes_scores_and_coco_results(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = cap("evaluate", "--model", work / "run", "--cache", work / "x.h5", "--json")
    scores = json.loads(out)
    written = json.loads((work / "run" / "best.x.beam3.scores.json").read_text())
    assert {key: written[key] for key in scores} == scores
    assert scores["count"] == 11
    results = json.loads((work / "run" / "best.x.beam3.predictions.json").read_text())
    assert len(results) == 11
    assert results[0].keys() == {"image_id", "caption"}
    monkeypatch.setenv("PATH", "")  # no Java
    table, err = cap(
        "evaluate", "--model", work / "run", "--cache", work / "x.h5", "--beam-size", 1
    )
    assert re.search(r"^bleu_4 +\d+\.\d\d +\d+\.\d\d – \d+\.\d\d$", table, re.MULTILINE)
    assert re.search(
        r"^\d+ distinct captions of 11; \d+ words used of \d+ known", table, re.MULTILINE
    )
    assert "meteor" not in table
    assert "no Java" in err


def test_predict_prints_a_caption_a_line_and_goes_on_after_a_bad_photo(
    work: Path, photos: Path
) -> None:
    out, err = cap("predict", photos, "--model", work / "run", "--device", "cpu", code=1)
    lines = [line.split("\t") for line in out.splitlines()]
    assert [Path(path).name for path, _ in lines] == [f"{x}.jpg" for x in "abcdfghijkl"]
    assert f"error: {photos}/e.jpg: not an image" in err
    assert "1 of 12 photos have no caption" in err
    plain, _ = cap("predict", photos / "a.jpg", "--model", work / "run", "--json")
    out, _ = cap("predict", photos / "a.jpg", "--model", work / "run", "--json", "--log-probs")
    found = json.loads(out)
    assert {**json.loads(plain), "log_probs": found["log_probs"]} == found
    assert found.keys() == {"path", "caption", "words", "score", "log_probs"}
    assert len(found["log_probs"]) == len(found["words"]) + 1
    assert lines[0][1] == found["caption"]
    spoken = " ".join(found["words"])
    assert found["caption"].lower().replace(" ", "") == spoken.replace(" ", "")
    assert found["caption"] != spoken
    out, _ = cap("predict", photos / "a.jpg", "--model", work / "run", "--words")
    assert out == f"{photos / 'a.jpg'}\t{spoken}\n"
    _, err = cap("predict", "a.jpg", "--model", work / "run", "--words", "--json", code=2)
    assert "leave out --words" in err


def test_predict_gives_several_captions_searched_or_drawn(work: Path, photos: Path) -> None:
    photo, run = photos / "a.jpg", work / "run"
    out, _ = cap("predict", photo, "--model", run, "--captions", 3, "--beam-size", 4)
    lines = [line.split("\t") for line in out.splitlines()]
    assert [path for path, _ in lines] == [str(photo)] * 3
    assert len({caption for _, caption in lines}) == 3
    options = ["--sample", "--captions", 2, "--top-p", 0.9, "--temperature", 1.5, "--json"]
    once, again, other = (
        json.loads(cap("predict", photo, "--model", run, *options, "--seed", seed)[0])
        for seed in (0, 0, 1)
    )
    assert once == again
    assert once != other
    assert len(once["captions"]) == 2
    assert once["captions"][0]["caption"] == once["caption"]
    assert once["captions"][0]["score"] >= once["captions"][1]["score"]
    out, err = cap("predict", photo, "--model", run, "--captions", 5)
    assert out.count("\n") == 5
    assert err.startswith("searching with 5 beams, for 5 captions\n")
    out, err = cap("predict", photo, "--model", run, "--captions", 5, "--groups", 2)
    assert err.startswith("searching with 6 beams, for 5 captions in 2 groups\n")
    _, err = cap("predict", photo, "--model", run, "--groups", 2)
    assert err.startswith("searching with 4 beams, for 2 groups\n")
    _, err = cap("predict", photo, "--model", run, "--sample", "--temperature", 0, code=2)
    assert "'--temperature'" in err


def test_captioning_that_takes_long_shows_how_far_it_is(
    work: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = ["predict", photos, "--model", work / "run", "--device", "cpu"]
    assert "captioning" not in cap(*told, code=1)[1]
    monkeypatch.setattr("pipeline.cli.models.predict._SOON_S", 0.0)
    out, err = cap(*told, code=1)
    assert out.count("\n") == 11
    assert re.search(r"^captioning: 12/12 photos, [\d.,]+ photos/s$", err, re.MULTILINE)
    assert f"error: {photos}/e.jpg: not an image" in err


@pytest.mark.parametrize("end", ["\n", "\0"], ids=["lines", "null"])
def test_paths_come_from_standard_input(work: Path, photos: Path, end: str) -> None:
    names = [str(photos / "b.jpg"), str(photos / "a.jpg")]
    process = spawn(
        "predict", "-", photos / "c.jpg", "--model", work / "run", *["-0"] * (end == "\0"),
        stdin=subprocess.PIPE,
    )  # fmt: skip
    out, err = process.communicate("".join(name + end for name in names), timeout=60)
    assert process.returncode == 0, err
    assert [line.split("\t")[0] for line in out.splitlines()] == [*names, str(photos / "c.jpg")]


def test_paths_that_cannot_be_are_named(work: Path) -> None:
    told = ["--model", work / "run"]
    _, err = cap("predict", "https://example.org/a.jpg", *told, code=1)
    assert err == (
        "error: https://example.org/a.jpg: is an address; download the photo and name the file\n"
    )
    _, err = cap("predict", "-", *told, code=1)  # nothing on it
    assert err == "error: standard input: no paths\n"
    _, err = cap("predict", "a.jpg", "--null", *told, code=2)
    assert "--null has no effect without -" in err
    _, err = cap("predict", "a.jpg", "--log-probs", *told, code=2)
    assert "--log-probs has no effect without --json" in err


@pytest.mark.usefixtures("small_meteor")
def test_a_file_of_predictions_scores_as_its_model_did(
    work: Path, photos: Path, tmp_path: Path
) -> None:
    model, cache = work / "run", work / "x.h5"
    wanted = json.loads(cap("evaluate", "--model", model, "--cache", cache, "--json")[0])
    predictions = model / "best.x.beam3.predictions.json"
    by_cache = json.loads(
        cap("evaluate", "--predictions", predictions, "--cache", cache, "--json")[0]
    )
    wanted["diversity"]["vocabulary"] = None  # no model, no vocabulary
    assert by_cache == wanted
    names = [path.name for path in sorted(photos.glob("*.jpg")) if path.name != "e.jpg"]
    (tmp_path / "only.txt").write_text("\n".join(names))
    by_file = json.loads(
        cap(
            "evaluate", "--predictions", predictions, "--captions", photos / "captions.txt",
            "--only", tmp_path / "only.txt", "--json",
        )[0]
    )  # fmt: skip
    assert by_file == wanted
    whole = ["evaluate", "--predictions", predictions, "--captions", photos / "captions.txt"]
    lack = f"{predictions}: no caption for 1 of the 12 photos in {photos}/captions.txt "
    _, err = cap(*whole, "--no-meteor")
    assert f"{lack}(first: e.jpg); scored the other 11, so" in err
    _, err = cap(*whole, "--all", code=1)
    assert f"\nerror: {lack}(first: e.jpg); choose photos with --split or --only, or" in err


FAST = ["--no-meteor", "--beam-size", 1]


def test_two_models_of_a_folder_have_files_of_their_own(work: Path, tmp_path: Path) -> None:
    run = shutil.copytree(work / "run", tmp_path / "run")
    for model in ("best", "last"):
        shutil.copy(run / f"{model}.cap", tmp_path / f"{model}.cap")
    shutil.copy(run / "last.cap", tmp_path / "a.cap")
    for model in ("last", "a", "best"):
        path = tmp_path / f"{model}.cap"
        _, err = cap("evaluate", "--model", path, "--cache", work / "x.h5", *FAST)
        name = f"{model}.x.beam1"
        scores, predictions = (
            tmp_path / f"{name}.{what}.json" for what in ("scores", "predictions")
        )
        assert f"written to {scores} and {predictions}\n" in err
    written = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(written) == 6
    best, last, other = (written[f"{name}.x.beam1.scores.json"] for name in ("best", "last", "a"))
    assert best["model"] == "best.cap"
    assert other == last | {"model": "a.cap", "of": other["of"]}
    assert last["of"] != other["of"]
    predictions_of = [written[f"{name}.x.beam1.predictions.json"] for name in ("a", "last")]
    assert predictions_of[0] == predictions_of[1]


@pytest.mark.parametrize(
    "ids",
    [[f"{n:05d}" for n in range(11)], [f"{n}" for n in range(11)], list(range(-5, 6))],
    ids=["fixed width", "numbers as strings", "numbers"],
)
def test_predictions_of_a_coco_file_are_read_back_whatever_its_ids(
    work: Path, photos: Path, tmp_path: Path, ids: list[int | str]
) -> None:
    names = [path.name for path in sorted(photos.glob("*.jpg")) if path.name != "e.jpg"]
    images = [{"id": i, "file_name": name} for i, name in zip(ids, names, strict=True)]
    notes = [{"id": n, "image_id": i, "caption": f"Noise {n} ."} for n, i in enumerate(ids)]
    coco = tmp_path / "coco.json"
    coco.write_text(json.dumps({"images": images, "annotations": notes}))
    cache = tmp_path / "coco.h5"
    cap(
        "extract-features", "--images", photos, "--captions", coco, "--out", cache,
        "--batch-size", 4, *SMALL,
    )  # fmt: skip
    shutil.copy(work / "run" / "best.cap", tmp_path)
    model = tmp_path / "best.cap"
    wanted = json.loads(cap("evaluate", "--model", model, "--cache", cache, "--json", *FAST)[0])
    wanted["diversity"]["vocabulary"] = None
    predictions = tmp_path / "best.coco.beam1.predictions.json"
    for source in (["--cache", cache], ["--captions", coco]):
        out, _ = cap("evaluate", "--predictions", predictions, *source, "--json", FAST[0])
        assert json.loads(out) == wanted


def test_features_that_are_not_finite_are_one_line(
    work: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    """In a cache of another program, whose checksums are right."""
    encoder = dataclasses.asdict(open_cache(work / "x.h5").encoder)
    features = np.ones((5, 1, 512))
    features[3, 0, 100] = np.nan
    cache = make_cache([["A dog ."]] * 5, features, **encoder).path
    out, err = cap("verify", cache, code=1)
    assert out.endswith("\n1 problem\n")
    assert err == "0003.jpg: row 3 has features that are not finite (NaN or infinity)\n"
    for command in (
        ["evaluate", "--model", work / "run", "--cache", cache],
        ["train", "--from-cache", cache, "--val-share", 0.1, "--out", tmp_path / "run"],
    ):
        _, err = cap(*command, code=1)
        assert re.fullmatch(
            rf"error: {cache}: 1 of \d photos are damaged \(first: 0003\.jpg, row 3, has features "
            rf"that are not finite .*\); `cap verify {cache}` names them, .*\n",
            err.splitlines(keepends=True)[-1],
        )


def test_a_model_with_a_flipped_byte_is_one_line(work: Path, photos: Path, tmp_path: Path) -> None:
    data = bytearray((work / "run" / "best.cap").read_bytes())
    data[-1000] ^= 4
    (tmp_path / "x.cap").write_bytes(data)
    _, err = cap("predict", photos / "a.jpg", "--model", tmp_path / "x.cap", code=1)
    assert err.startswith(f"error: {tmp_path}/x.cap: damaged model file (it does not match its")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("small_meteor")
def test_people_are_scored_against_one_another(work: Path, photos: Path) -> None:
    by_cache, _ = cap("evaluate", "--human", "--cache", work / "x.h5")
    assert re.search(r"^cider +\d+\.\d\d$", by_cache, re.MULTILINE)
    assert "people, 11 photos, mean of 2 rounds, each caption against the 1 others" in by_cache
    by_file = json.loads(
        cap("evaluate", "--human", "--captions", photos / "captions.txt", "--json")[0]
    )
    assert by_file["count"] == 12
    assert by_file["rounds"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "absent.h5"], "absent.h5: no such file"),
        (["extract-features", "--images", "absent", "--out", "x.h5"], "absent: no such folder"),
        (
            ["extract-features", "--images", "LICENSE", "--out", "x.h5"],
            "LICENSE: is a text file, not a folder",
        ),
        (
            ["train", "--from-cache", "README.md", "--out", "x"],
            "README.md: is a text file, not a feature cache",
        ),
        (["evaluate", "--model", "absent", "--cache", "x.h5"], "absent: not found"),
        (["predict", "a.jpg", "--model", "absent"], "absent: not found"),
        (
            ["evaluate", "--predictions", "absent", "--cache", "x.h5"],
            "absent: cannot read (No such",
        ),
        (["evaluate", "--human", "--captions", "absent"], "absent: cannot read (No such"),
        (["build-vocab", "--from", "README.md"], "README.md: "),
        (
            ["build-vocab", "--from", "{cache}", "--min-count", "1", "--out", "absent/v.json"],
            "absent/v.json: cannot write (No such file or directory)",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(
    arguments: list[str], message: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    out, err = cap(*(part.format(cache=work / "x.h5") for part in arguments), code=1)
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["extract-features", "--images", ".", "--out", "x.h5", "--views", "top"],
        ["extract-features", "--images", ".", "--out", "x.h5", "--precision", "int8"],
        ["train", "--from-cache", "x.h5", "--out", "x", "--epochs", "0"],
        ["train", "--from-cache", "x.h5", "--out", "x", "--recipe", "worst"],
        ["train", "--from-cache", "x.h5", "--out", "x", "--select-by", "taste"],
        ["evaluate", "--model", "x"],
        ["evaluate", "--cache", "x.h5"],
        ["evaluate", "--model", "x", "--human", "--cache", "x.h5"],
        ["evaluate", "--model", "x", "--captions", "x.json"],
        ["evaluate", "--human", "--cache", "x.h5", "--captions", "x.json"],
        ["evaluate", "--human", "--cache", "x.h5", "--split", "test"],
        ["predict", "a.jpg", "--model", "x", "--view", "left"],
        ["extract-features", "--images", ".", "--out", "x.h5", "--image-size", "200000"],
        ["nonsense"],
    ],
)
def test_wrong_arguments_are_exit_code_2(arguments: list[str]) -> None:
    cap(*arguments, code=2)


def spawn(*arguments: object, stdin: int | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from pipeline.cli.main import main; main()", *map(str, arguments)],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_ctrl_c_before_a_command_begins_is_quiet(tmp_path: Path) -> None:
    # Stands where the imports are that take most of the time until then.
    (tmp_path / "typer.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", "from pipeline.cli.main import main; main()", "info", "x.h5"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        timeout=50,
    )
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "")


def test_ctrl_c_during_extraction_says_how_to_go_on(tmp_path: Path) -> None:
    for seed in range(600):
        write_photo(tmp_path / "photos" / f"{seed}.jpg", seed)
    process = spawn(
        "extract-features", "--images", tmp_path / "photos", "--out", tmp_path / "x.h5",
        "--batch-size", 4, *SMALL,
    )  # fmt: skip
    while not (tmp_path / "x.h5").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == (
        f"interrupted; what is done is kept in {tmp_path}/x.h5; run the same command to go on"
    )
    cap("info", tmp_path / "x.h5")


def test_ctrl_c_before_anything_is_written_promises_nothing(tmp_path: Path) -> None:
    out = tmp_path / "x.h5"
    assert _kept(out, _state(out)) == "no photo was done yet; run the same command again"
    out.write_bytes(b"of somebody else")
    before = _state(out)
    assert _kept(out, before) == f"{out} is as it was; run the same command again"
    (tmp_path / "new").write_bytes(b"of the command")
    (tmp_path / "new").replace(out)
    kept = f"what is done is kept in {out}; run the same command to go on"
    assert _kept(out, before) == _kept(out, None) == kept


def test_photos_copied_are_not_new(photos: Path, tmp_path: Path) -> None:
    command = ["extract-features", "--images", photos, "--reuse", tmp_path / "old.h5", *SMALL]
    cap(*command[:3], "--out", tmp_path / "old.h5", *SMALL)
    out, err = cap(*command, "--out", tmp_path / "x.h5")
    assert "; 1 set aside; 1 new, 11 copied in " in out
    assert "copying: 0/12 photos" in err
    found = json.loads(cap(*command, "--out", tmp_path / "y.h5", "--json")[0])
    assert (found["new"], found["copied"]) == (1, 11)


def test_ctrl_c_during_training_keeps_the_step(work: Path, tmp_path: Path) -> None:
    process = spawn(
        "train", "--from-cache", work / "x.h5", "--out", tmp_path / "run", "--epochs", 100000,
        "--batch-size", 8, "--min-count", 1, "--log-every", 1, "--device", "cpu",
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("Epoch [1/100000], Step [2/"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"interrupted; the model so far is in {tmp_path}/run; go on with --resume" in err
    assert (tmp_path / "run" / "last.cap").exists()
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_ctrl_c_before_training_begins_promises_no_model(work: Path, tmp_path: Path) -> None:
    # Stands where the second goes by until then.
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    arguments = ["train", "--from-cache", str(work / "x.h5"), "--out", str(tmp_path / "run")]
    process = subprocess.run(
        [sys.executable, "-c", "from pipeline.cli.main import main; main()", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        timeout=50,
    )
    assert process.returncode == 130
    assert process.stderr == "interrupted; training had not begun; run the same command again\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("epoch", "kept"),
    [
        (0, "no checkpoint was saved; start again with --overwrite"),
        (1, "the last checkpoint is in {run}; go on with --resume"),
    ],
)
def test_a_second_ctrl_c_says_what_there_is(
    epoch: int, kept: str, work: Path, tmp_path: Path
) -> None:
    # Two at once, in the middle of the first step of an epoch.
    code = f"""
import os, signal
from train.fit.trainer import Trainer
step = Trainer._step
def interrupted(self, chosen, views, position, steps):
    if position == {epoch} * steps // 3:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    return step(self, chosen, views, position, steps)
Trainer._step = interrupted
from pipeline.cli.main import main
main()
"""
    arguments = ["train", "--from-cache", str(work / "x.h5"), "--out", str(tmp_path / "run")]
    arguments += ["--batch-size", "8", "--min-count", "1", "--epochs", "3", "--device", "cpu"]
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=50,
    )
    assert process.returncode == 130, process.stderr
    said = f"interrupted; {kept}".replace("{run}", f"{tmp_path}/run")
    assert process.stderr.splitlines()[-1] == said
    assert (tmp_path / "run/checkpoint.pt").exists() == (epoch > 0)
    again = ["--resume"] if epoch else ["--overwrite"]
    cap(*arguments, *again)


def test_a_closed_pipe_is_no_traceback(work: Path, photos: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "predict", str(photos / "a.jpg"),
         "--model", str(work / "run")],
        stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    assert process.returncode == 1
