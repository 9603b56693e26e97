"""Training as a person sees it: a live line on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from pipeline.cli.terminal import Verbosity, set_verbosity
from pipeline.cli.training.progress import TrainingProgress
from tests.conftest import MakeCache
from tests.pipeline.test_cli import cap
from tests.pipeline.test_terminal import everything, screen, start
from train.fit.reports import StepLog

WORK = """
import sys, time
from pipeline.cli.terminal import Verbosity, set_verbosity
from pipeline.cli.training.progress import TrainingProgress
from train.fit.reports import EpochLog, StepLog

set_verbosity(Verbosity(VERBOSITY))
with TrainingProgress(every_step_log=EVERY) as progress:
    for epoch in range(2):
        for step in (1000, 2000, 3236):
            time.sleep(0.11)
            left = 100.0 if epoch else None
            progress.show(StepLog(epoch, 20, step, 3236, 2.5, 249600.0, steps_per_s=1950.0,
                                  seconds_left=left, smoothed=True))
        progress.show(EpochLog(epoch, 20, 2.4, 0.2, 0.8, 0.9, True, 1.7, 3236 * (epoch + 1)))
    progress.say("a notice")
print("result")
"""


def work(every: bool = False, verbosity: int = 1) -> str:
    return WORK.replace("EVERY", str(every)).replace("VERBOSITY", str(verbosity))


def on_terminal(code: str, columns: int = 100) -> str:
    process, terminal = start(["-c", code], columns)
    written = everything(terminal)
    assert process.stdout is not None
    assert (process.stdout.read(), process.wait()) == (b"result\n", 0)
    return written


def frames(written: str) -> list[str]:
    plain = re.sub(r"\x1b\[[\d;]*m|\x1b\[\?25[lh]|━|╸|╺", "", written)
    found = re.findall(r"epoch +\d+/20[^\r\n\x1b]*", plain)
    return [re.sub(" +", " ", frame).strip() for frame in found]


def test_a_live_line_says_how_far_and_how_fast_training_is() -> None:
    written = on_terminal(work())
    found = frames(written)
    assert "epoch 1/20 1,000/3,236 steps, loss 2.500, 1,950/s, 249,600 captions/s" in found
    assert (
        "epoch 2/20 2,000/3,236 steps, loss 2.500, 1,950/s, at most 1 min 40 s left, "
        "249,600 captions/s" in found
    )
    assert any("3,236/3,236 steps, loss 2.500, 1,950/s, validating" in frame for frame in found)
    # In the end the epochs are there, and the line is gone.
    kept = re.findall(r"(?:Epoch \[\d/20\]|a notice)(?=[^\r\n]*\r\n)", written)
    assert kept == ["Epoch [1/20]", "Epoch [2/20]", "a notice"]
    assert written.endswith("\r\x1b[1A\x1b[2K")


def test_the_live_line_fits_the_terminal() -> None:
    columns = 60
    written = on_terminal(work(), columns)
    lines = [line for line in screen(written.replace("\r\x1b[2K", "\r\n")) if "epoch" in line]
    assert len(lines) >= 6
    assert max(map(len, lines)) <= columns
    assert all("steps, loss 2.500" in line for line in lines)


def test_lines_that_were_asked_for_are_above_the_live_line() -> None:
    lines = screen(on_terminal(work(every=True)))
    steps = [line for line in lines if line.startswith("Epoch [1/20], Step [")]
    assert [line.split(", ")[1] for line in steps] == [
        "Step [1000/3236]", "Step [2000/3236]", "Step [3236/3236]"
    ]  # fmt: skip


def test_quiet_means_nothing() -> None:
    assert on_terminal(work(verbosity=0)) == ""


def test_without_a_terminal_there_are_a_few_lines_and_then_one_every_five_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    set_verbosity(Verbosity.USUAL)
    for every, expected in ((False, [1, 2, 3, 23, 43]), (True, list(range(1, 61)))):
        progress = TrainingProgress(every_step_log=every)
        for step in range(1, 61):
            progress.show(StepLog(0, 1, step, 60, 2.5, 100.0, steps_per_s=4.0))
            now += 0.25
        written = capsys.readouterr().err
        assert not set(written) & {"\x1b", "\r"}
        lines = written.splitlines()
        assert lines[0] == "Epoch [1/1], Step [1/60], Loss: 2.5000, Perplexity: 12.18, " + (
            "4.0 steps/s, 100 captions/s"
        )
        assert [int(line.split("Step [")[1].split("/")[0]) for line in lines] == expected


@pytest.mark.parametrize(
    ("rate", "shown"), [(0.042, "0.042"), (1.0, "1.0"), (9.94, "9.9"), (1950.4, "1,950")]
)
def test_a_rate_has_the_digits_that_tell_something(rate: float, shown: str) -> None:
    line = StepLog(0, 1, 1, 2, 2.5, 1.0, steps_per_s=rate).line()
    assert f", {shown} steps/s, " in line


@pytest.mark.usefixtures("drawing")
def test_the_commands_draw_and_group(make_cache: MakeCache, tmp_path: Path) -> None:
    cache = make_cache([["a dog runs", "the dog runs"], ["a cat sleeps"]] * 6).path
    runs = tmp_path / "runs"
    shared = [
        *("train", "--from-cache", cache, "--recipe", "classic", "--epochs", 1, "--device", "cpu"),
        *("--hidden-size", 16, "--embedding-size", 8, "--batch-size", 4, "--min-count", 1),
    ]
    cap(*shared, "--out", runs / "a", "--val-share", 0.5)
    cap(*shared, "--out", runs / "b", "--val-share", 0.2)
    assert (runs / "a/curves.png").read_bytes()[1:4] == b"PNG"
    out, err = cap("runs", runs, "--plot", tmp_path / "all.png", "--json")
    assert err == f"drew 2 runs into {tmp_path}/all.png\n"
    assert (tmp_path / "all.png").read_bytes()[1:4] == b"PNG"
    listed = json.loads(out)
    assert [(run["group"], run["rank"], run["judged_on"]["photos"]) for run in listed] == [
        (1, 1, 6),
        (2, 1, 2),
    ]
    assert cap("runs", runs)[0].count("of x.h5, by greedy captions:\n") == 2
    (tmp_path / "photo.png").write_bytes(b"mine")
    _, err = cap("runs", runs, "--plot", tmp_path / "photo.png", code=1)
    assert err == (f"error: {tmp_path}/photo.png: is no picture that cap has drawn; move it away\n")
