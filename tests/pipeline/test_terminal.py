"""Progress as a person sees it on a terminal, and as a log gets it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from pipeline.cli.terminal import ProgressLine, duration
from tests.conftest import ROOT, write_photo
from tests.pipeline.test_cli import SMALL, cap

PATH = "a/long/path/" * 9  # longer than a terminal is wide
WORK = f"""
import os, time
import typer
from pipeline.cli.errors import errors
from pipeline.cli.terminal import ProgressLine

def work() -> None:
    with errors("all is kept"), ProgressLine("extracting", "photos") as line:
        line.say("before: [1/2] :dog:")
        line.update(0, 6000, 0.0)
        time.sleep(0.15)
        line.update(1500, 6000, 50.04)
        line.say("{PATH}x.jpg: in between")
        time.sleep(0.15)
        line.update(3000, 6000, 1234.56, "3 set aside")
        line.update(3001, 6000, 1234.56, "never shown: too soon")
        END
    print("result")

typer.run(work)
"""
FINISH = 'line.update(6000, 6000, 987.6, "3 set aside")'


def start(
    command: list[str], columns: int = 80, **environment: str
) -> tuple[subprocess.Popen[bytes], int]:
    """A process whose stderr is a terminal of this width, and the terminal's other end."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    inherited = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, *command],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        cwd=ROOT,
        env=inherited | {"TERM": "xterm-256color"} | environment,
    )
    os.close(theirs)
    return process, ours


def everything(terminal: int) -> str:
    """What is written to a terminal until its last process ends."""
    written = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # nobody has it open any more
            break
        if not part:
            break
        written += part
    os.close(terminal)
    return written.decode()


def run(end: str = FINISH, columns: int = 80, **environment: str) -> str:
    process, terminal = start(["-c", WORK.replace("END", end)], columns, **environment)
    written = everything(terminal)
    assert process.stdout is not None
    assert (process.stdout.read(), process.wait()) == (b"result\n", 0)
    return written


def screen(written: str) -> list[str]:
    """The lines that a terminal shows in the end, were it wide enough for each."""
    plain = re.sub(r"\x1b\[(\d+(;\d+)*)?m|\x1b\[\?25[lh]", "", written)  # colours, the cursor
    lines = plain.replace("\r\n", "\n").split("\n")
    return [re.split(r"\r\x1b\[2K", line)[-1].rstrip() for line in lines if line]


def test_a_bar_moves_on_one_line_of_the_terminal() -> None:
    written = run()
    frames = re.findall(r"(\S+ photos(?:, .*?)?)(?:\x1b|\r)", written)
    assert frames[0] == "0/6,000 photos"
    assert "1,500/6,000 photos, 50.0/s, 1 min 30 s left" in frames
    assert "3,000/6,000 photos, 1,234.6/s, 2 s left, 3 set aside" in frames
    assert "too soon" not in written
    before, between, bar = screen(written)
    assert before == "before: [1/2] :dog:"
    assert between == f"{PATH}x.jpg: in between"
    assert re.fullmatch("extracting +━{10,40} 6,000/6,000 photos, 987.6/s, 3 set aside", bar)


def test_a_kill_leaves_the_cursor_visible() -> None:
    process, terminal = start(["-c", WORK.replace("END", "os.kill(os.getpid(), 9)")])
    shown = re.findall(r"\x1b\[\?25([lh])", everything(terminal))
    assert process.wait() == -signal.SIGKILL
    assert shown[-1] == "h"


@pytest.mark.parametrize("columns", [10, 30, 60, 100, 200])
def test_a_bar_fits_the_terminal(columns: int) -> None:
    written = run(columns=columns)
    bars = [line for line in screen(written.replace("\r\x1b[2K", "\r\n")) if "extracting" in line]
    assert len(bars) >= 4
    assert max(map(len, bars)) <= columns
    if columns >= 30:
        assert all("/6,000 ph" in line for line in bars)


def test_no_color_means_none() -> None:
    assert re.search(r"\x1b\[[\d;]*m", run())
    written = run(NO_COLOR="1")
    assert not re.search(r"\x1b\[[\d;]*m", written)
    assert "━ 6,000/6,000 photos" in written


def test_what_cannot_move_gets_lines() -> None:
    expected = [
        "before: [1/2] :dog:",
        "extracting: 0/6,000 photos",
        f"{PATH}x.jpg: in between",
        "extracting: 6,000/6,000 photos, 987.6 photos/s, 3 set aside",
    ]
    assert run(TERM="dumb").splitlines() == expected
    piped = subprocess.run(
        [sys.executable, "-c", WORK.replace("END", FINISH)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert piped.stderr.splitlines() == expected


def test_lines_come_every_five_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with ProgressLine("extracting", "photos") as line:
        for done in range(13):
            line.update(done, 12, 0.5)
            now += 1
    assert capsys.readouterr().err.splitlines() == [
        "extracting: 0/12 photos, 0.5 photos/s, 24 s left",
        "extracting: 5/12 photos, 0.5 photos/s, 14 s left",
        "extracting: 10/12 photos, 0.5 photos/s, 4 s left",
        "extracting: 12/12 photos, 0.5 photos/s",
    ]


def test_ctrl_c_leaves_the_bar_and_a_line_of_its_own() -> None:
    process, terminal = start(["-c", WORK.replace("END", "time.sleep(60)")])
    written = b""
    while b"3 set aside" not in written:
        written += os.read(terminal, 65536)
    process.send_signal(signal.SIGINT)
    written += everything(terminal).encode()
    assert process.wait() == 130
    *_, bar, last = screen(written.decode())
    assert bar.endswith("3,000/6,000 photos, 1,234.6/s, 2 s left, 3 set aside")
    assert last == "interrupted; all is kept"
    assert written.decode().rindex("\x1b[?25h") > written.decode().rindex("\x1b[?25l")


def test_the_rate_is_that_of_this_run_alone(tmp_path: Path) -> None:
    for seed in range(12):
        write_photo(tmp_path / "photos" / f"{seed:02}.jpg", seed)
    (tmp_path / "photos" / "00.jpg").write_bytes(b"")
    arguments = [
        "extract-features", "--images", str(tmp_path / "photos"), "--out", str(tmp_path / "x.h5"),
        "--batch-size", "4", "--device", "cpu", *SMALL,
    ]  # fmt: skip
    _, err = cap(*arguments)
    assert re.search(
        r"^extracting: 12/12 photos, [\d,.]+ photos/s, 1 set aside$", err, re.MULTILINE
    )
    process, terminal = start(["-m", "pipeline", *arguments])
    bar, *_ = screen(everything(terminal))
    assert process.wait() == 0
    assert re.fullmatch("extracting +━+ 12/12 photos, 1 set aside", bar)  # nothing new, no rate


def test_durations_are_in_words() -> None:
    assert [duration(s) for s in (7, 59.4, 200, 3661, 7500)] == [
        "7 s", "59 s", "3 min 20 s", "1 h 01 min", "2 h 05 min"
    ]  # fmt: skip
