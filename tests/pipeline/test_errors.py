"""What goes wrong around a command is one line on stderr and an exit code; a bug is a traceback."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from cache.errors import CapError
from pipeline.cli.errors import errors
from tests.conftest import MakeCache
from tests.pipeline.test_cli import cap

LONG = "x" * 256  # one more than a file system takes


def ending(work: Callable[[], object]) -> tuple[int, str]:
    """(exit code, stderr) of a command that does this work."""
    app = typer.Typer()

    @app.command()
    def command() -> None:
        with errors():
            work()

    result = CliRunner().invoke(app, [])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["extract-features", "--images", LONG, "--out", "a.h5"],
        ["extract-features", "--images", "{folder}", "--out", LONG],
        ["merge", "{cache}", "--out", LONG],
        ["info", LONG],
        ["verify", LONG],
        ["build-vocab", "--from", LONG],
        ["build-vocab", "--from", "{cache}", "--min-count", "1", "--out", LONG],
        ["train", "--from-cache", LONG, "--out", "run"],
        ["sweep", "--from-cache", LONG, "--out", "run"],
        ["runs", LONG],
        ["evaluate", "--model", LONG, "--cache", "{cache}"],
        ["evaluate", "--predictions", LONG, "--cache", "{cache}"],
        ["predict", "a.jpg", "--model", LONG],
        ["demo", "--out", LONG],
    ],
    ids=lambda command: command[0],
)
def test_a_name_that_is_too_long_is_one_line(command: list[str], make_cache: MakeCache) -> None:
    cache = make_cache([["a"]]).path
    there = {"{cache}": str(cache), "{folder}": str(cache.parent)}
    out, err = cap(*(there.get(part, part) for part in command), code=1)
    assert out == ""
    assert err.startswith(f"error: {LONG}: ")
    assert err.endswith("(File name too long)\n")
    assert err.count("\n") == 1


def test_a_file_that_the_system_refuses_is_one_line(tmp_path: Path) -> None:
    assert ending(lambda: (tmp_path / "absent").open()) == (
        1,
        f"error: {tmp_path}/absent: cannot be used (No such file or directory)\n",
    )
    name = str(tmp_path / "a\nb").encode()
    assert ending(lambda: os.stat(name)) == (
        1,
        f"error: {tmp_path}/a\\nb: cannot be used (No such file or directory)\n",
    )


def test_an_error_whose_text_has_line_breaks_is_one_line() -> None:
    def work() -> None:
        raise CapError("a\nb.jpg: first\nsecond")

    assert ending(work) == (1, "error: a\\nb.jpg: first\\nsecond\n")


def test_too_little_memory_is_one_line() -> None:
    code, err = ending(lambda: torch.empty(1 << 50))
    assert code == 1
    assert err.startswith("error: not enough memory (")
    assert err.count("\n") == 1
    assert ending(lambda: bytearray(1 << 62)) == (
        1,
        "error: not enough memory; ask for less at once\n",
    )


@pytest.mark.parametrize(
    "bug", [OSError(5, "Input/output error"), RuntimeError("odd"), KeyError(1)]
)
def test_a_bug_keeps_its_traceback(bug: Exception) -> None:
    def work() -> None:
        raise bug

    with pytest.raises(type(bug)) as caught:
        ending(work)
    assert caught.value is bug
