"""Curves are drawn from whatever a log holds, beside a training that they never end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache.store import FeatureCache
from tests.conftest import ROOT
from tests.train.runs import config
from train.fit.record.curves import CurvesError, PlottedRun, _shown, draw_run, draw_runs
from train.fit.record.drawn_curves import DrawnCurves
from train.fit.reports import EpochLog
from train.fit.run import train

BLUE = (0x25, 0x63, 0xA8)  # the line of validation


def has_colour(picture: Path, colour: tuple[int, int, int]) -> bool:
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (720, 1100, 3)
    return bool((pixels == colour).all(-1).any())


def make_run(folder: Path, epochs: int = 3) -> Path:
    folder.mkdir(parents=True)
    lines = []
    for epoch in range(epochs):
        lines += [{"epoch": epoch, "step": s, "loss": 5.0 / (s + epoch)} for s in (10, 20)]
        lines.append({"epoch": epoch, "val_loss": 3.0 / (epoch + 1), "cider": 0.1 * epoch})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.usefixtures("drawing")
def test_a_run_leaves_its_curves_when_it_ends_and_when_it_is_interrupted(
    cache: FeatureCache, tmp_path: Path
) -> None:
    notices: list[str] = []
    run = tmp_path / "run"
    reports = train(config(cache, run), notice_of_curves=notices.append)
    next(report for report in reports if isinstance(report, EpochLog))
    reports.close()
    assert has_colour(run / "curves.png", BLUE)
    first = (run / "curves.png").read_bytes()
    resumed = config(cache, run, self_critical_epochs=1, self_critical_photos=12, resume=True)
    list(train(resumed, notice_of_curves=notices.append))
    assert (run / "curves.png").read_bytes() != first
    assert has_colour(run / "curves.png", (0xF3, 0xEA, 0xD6))  # behind the self-critical epoch
    assert not notices
    # What a run has drawn goes with it; what somebody else has drawn stays, and is told.
    list(train(config(cache, run, epochs=1, overwrite=True)))
    assert not (run / "curves.png").exists()
    (run / "curves.png").write_bytes(b"mine")
    list(train(config(cache, run, 1, overwrite=True), notice_of_curves=notices.append))
    assert (run / "curves.png").read_bytes() == b"mine"
    assert notices == [
        f"{run}/curves.png: not drawn ({run}/curves.png: is no picture that cap has drawn; "
        "move it away)"
    ]


@pytest.mark.parametrize(
    ("python", "reason"),
    [
        ("/no/such/python", "cannot start a process (No such file or directory)"),
        (shutil.which("false") or "/bin/false", "the process that draws ended with code 1"),
    ],
)
@pytest.mark.usefixtures("drawing")
def test_a_picture_that_cannot_be_drawn_is_one_notice(
    python: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", python)
    notices: list[str] = []
    with DrawnCurves(tmp_path, notices.append) as curves:
        curves.prepare()
        curves.draw_last()
        curves.draw_last()
    assert notices == [f"{tmp_path}/curves.png: not drawn ({reason})"]


@pytest.mark.usefixtures("drawing")
def test_pictures_are_drawn_at_intervals_and_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("train.fit.record.drawn_curves.time.monotonic", lambda: now)
    # A process that answers nothing until the end.
    code = "import sys; [print('drawn') for _ in sys.stdin.readlines()]"
    monkeypatch.setattr("train.fit.record.drawn_curves._CODE", code)
    curves = DrawnCurves(tmp_path, pytest.fail)
    with curves:
        for now in (0.0, 29.0, 31.0, 45.0, 62.0, 100.0):  # noqa: B007
            curves.draw_if_due()
        assert curves._asked == 1
        curves.draw_last()
    assert curves._asked == 2


def test_drawing_says_nothing_of_fonts_homes_and_scripts(tmp_path: Path) -> None:
    """In a fresh process. A font that lacks letters, a home that cannot be written to, and the
    settings of a user's own matplotlib are no business of whoever trains.
    """
    run = make_run(tmp_path / "_рус 犬 日本 $x$ \\frac ไทย\n\x1b[31m")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfigure.facecolor: black\n")
    environment = os.environ | {"MATPLOTLIBRC": str(tmp_path), "MPLBACKEND": "no_such_backend"}
    environment |= {"HOME": "/nonexistent", "MPLCONFIGDIR": "/proc/nowhere"}
    environment |= {"PYTHONPATH": str(ROOT)}
    code = (
        "import sys; from pathlib import Path; from train.fit.record.curves import draw_run\n"
        "print(draw_run(Path(sys.argv[1]), Path(sys.argv[2])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, run, tmp_path / "out.png"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
    assert has_colour(tmp_path / "out.png", BLUE)
    with Image.open(tmp_path / "out.png") as image:
        assert image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)


def test_names_are_short_and_no_formulas() -> None:
    assert _shown("a$b$") == r"a\$b\$"
    assert _shown("x\n\x1b[31m") == r"x\n\x1b[31m"
    assert _shown("\udcff") == r"\udcff"
    assert len(_shown("n" * 300)) < 50


def test_runs_are_drawn_over_one_another_and_many_of_them(tmp_path: Path) -> None:
    runs = [
        PlottedRun(
            f"_run {number}", number % 2, make_run(tmp_path / f"{number}", epochs=1 + number)
        )
        for number in range(20)
    ]
    (tmp_path / "none").mkdir()
    nothing = PlottedRun("none", 0, tmp_path / "none")
    assert draw_runs([*runs, nothing], tmp_path / "new/all.png") == 20
    assert has_colour(tmp_path / "new/all.png", BLUE)
    assert has_colour(tmp_path / "new/all.png", (0xC4, 0xC7, 0xCC))  # those without a name
    draw_runs(runs[:1], tmp_path / "new/all.png")  # in the place of one of ours
    with pytest.raises(CurvesError, match=r"x\.png: not drawn, because no run has a log"):
        draw_runs([nothing], tmp_path / "x.png")


def test_only_pictures_that_cap_has_drawn_are_replaced(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name, found in (
        ("photo.png", "is no picture that cap has drawn; move it away"),
        ("x.pdf", r"pictures are PNG; name a file that ends in \.png"),
    ):
        (tmp_path / name).write_bytes(b"mine")
        with pytest.raises(CurvesError, match=found):
            draw_run(run, tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"mine"


def test_nothing_is_drawn_of_a_run_that_has_not_begun(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"epo')
    assert not draw_run(tmp_path, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("version", ["v0.1.0", "v0.2.0"])
def test_logs_of_earlier_versions_are_drawn(version: str, tmp_path: Path) -> None:
    assert draw_run(ROOT / "tests/formats" / version / "run", tmp_path / "x.png")
    assert has_colour(tmp_path / "x.png", BLUE)
