"""The standard streams of a `cap` process: closed, full, or without an encoding for the text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli.terminal import one_field, one_line, print_json
from tests.conftest import ROOT, MakeCache, write_photo
from tests.pipeline.test_cli import SMALL, cap


def cap_process(
    *arguments: object, streams: str = "", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Run `cap` in a shell. streams: redirections, as the shell writes them."""
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {streams}', "sh", *command],
        capture_output=True,
        cwd=ROOT,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(
    "command", [["info", "{cache}"], ["info", "{cache}", "--json"], ["--help"]]
)
def test_output_that_cannot_be_written_is_one_line(
    command: list[str], buffered: str, make_cache: MakeCache
) -> None:
    cache = str(make_cache([["a"]]).path)
    given = [part.replace("{cache}", cache) for part in command]
    result = cap_process(*given, streams=">/dev/full", PYTHONUNBUFFERED=buffered)
    assert result.stderr == b"error: standard output: cannot write (No space left on device)\n"
    assert result.returncode == 1


@pytest.mark.parametrize("command", [["info", "{cache}"], ["--help"]])
def test_a_reader_that_has_read_enough_ends_the_command_quietly(
    command: list[str], make_cache: MakeCache
) -> None:
    cache = str(make_cache([["a"]]).path)
    given = [sys.executable, "-m", "pipeline"]
    given += [part.replace("{cache}", cache) for part in command]
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(given, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, b"")


@pytest.mark.parametrize("streams", ["2>&-", "2>/dev/full"])
def test_the_work_is_done_although_nothing_can_be_said(streams: str, tmp_path: Path) -> None:
    for seed in range(3):
        write_photo(tmp_path / f"photos/{seed}.jpg", seed)
    (tmp_path / "photos/1.jpg").write_bytes(b"no photo")
    result = cap_process(
        "extract-features", "--images", tmp_path / "photos", "--out", tmp_path / "x.h5", *SMALL,
        streams=streams,
    )  # fmt: skip
    assert result.returncode == 0
    assert result.stdout.startswith(f"{tmp_path}/x.h5: 2 photos of 512 features".encode())
    assert "done             2\n" in cap("info", tmp_path / "x.h5")[0]


def test_no_file_gets_the_number_of_a_closed_stream(make_cache: MakeCache) -> None:
    """Libraries write to file number 2 whatever it is, so that a cache must never have it."""
    code = "import os, sys; from pipeline.cli.process import open_streams; open_streams(); "
    code += "file = open(sys.argv[1]); print('result'); sys.exit(file.fileno() > 2)"
    for streams, written in ((">&-", b""), ("2>&-", b"result\n"), ("<&- 2>&-", b"result\n")):
        result = subprocess.run(
            ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, "-c", code, __file__],
            capture_output=True,
            cwd=ROOT,
        )
        assert (result.returncode, result.stdout) == (1, written), streams


def test_a_name_is_printed_whatever_the_encoding_of_the_output() -> None:
    code = "import sys; from pipeline.cli.process import open_streams; open_streams(); "
    code += "print('\\udcff\\u2026\\udcfe.jpg')"
    for encoding, written in (
        ("utf-8:strict", b"\xff\xe2\x80\xa6\xfe.jpg\n"),
        ("ascii:strict", b"\xff\\u2026\xfe.jpg\n"),
    ):
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONIOENCODING": encoding},
        )
        assert result.stdout == written


def test_json_is_utf_8_whatever_the_names_of_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"\xff\xc3\xbc.jpg")
    print_json({"path": name}, indent=None)
    written = capsys.readouterr().out
    assert written == '{"path": "\\udcffü.jpg"}\n'
    assert json.loads(written) == {"path": name}


@pytest.mark.parametrize(
    ("text", "line", "field"),
    [
        ("a b.jpg", "a b.jpg", "a b.jpg"),
        ("a\tb\nc\r.jpg", r"a\tb\nc\r.jpg", r"a\tb\nc\r.jpg"),
        ("\x1b[2J\x85\u2028\udcff", "\\x1b[2J\\x85\\u2028\udcff", "\\x1b[2J\\x85\\u2028\udcff"),
        (r"a\tb", r"a\tb", r"a\\tb"),
    ],
)
def test_control_characters_break_no_line(text: str, line: str, field: str) -> None:
    assert one_line(text) == line
    assert one_field(text) == field
