"""Every command in the README is one that exists, with options that exist."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
import typer

from pipeline.captioner.captioner import Captioner
from pipeline.captioner.predictions import Prediction
from pipeline.cli.app import app
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    found = []
    for kind, block in BLOCKS:
        if kind not in ("", "console"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if kind == "console" and not line.startswith("$ "):
                continue  # output
            found.append(line.removeprefix("$ ").split(" #")[0].strip())
    inline = re.findall(r"`(cap [^`]+|python scripts/[^`]+)`", README.replace("\n", " "))
    return [line for line in found if line] + inline


def test_the_readme_has_its_commands() -> None:
    starts = {line.split()[0] for line in commands()}
    assert {"scripts/demo.sh", "scripts/test.sh", "scripts/download_coco.sh", "cap"} <= starts
    shown = {line.split()[1] for line in commands() if line.startswith("cap ")}
    assert {command.name or command.callback.__name__ for command in app.registered_commands} - {  # type: ignore[union-attr]
        "demo"
    } <= shown


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_every_command_of_the_readme_parses(line: str) -> None:
    program, *arguments = shlex.split(line)
    if program == "cap":
        group = typer.main.get_command(app)
        if arguments[0].startswith("--"):
            assert any(arguments[0] in parameter.opts for parameter in group.params)
            return
        command = group.commands[arguments[0]]  # type: ignore[attr-defined]
        if len(arguments) > 1:  # else it is only being named
            command.make_context(arguments[0], arguments[1:])
    elif program.startswith("scripts/"):
        assert os.access(ROOT / program, os.X_OK)
    elif program == "python":
        assert (ROOT / arguments[0]).exists()
    else:
        assert program in ("python3", ".venv/bin/pip", ".", "curl")


def test_the_readmes_python_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [block for kind, block in BLOCKS if kind == "python"]

    class Stub:
        def caption(self, paths: list[str]) -> list[Prediction]:
            return [Prediction(path, "a dog", -1.0) for path in paths]

    monkeypatch.setattr(Captioner, "load", lambda model, **settings: Stub())
    exec(block, {})  # the README's own code


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / Path(target)).exists(), target
