"""Everything that CONTRIBUTING, CHANGELOG and docs/ mention exists: paths, commands, rooms, …"""

from __future__ import annotations

import ast
import html
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from pipeline.cli.app import app
from tests.conftest import ROOT
from tests.project.test_imports import FLOORS, ROOMS, modules

PAGES = (ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
DOT = (ROOT / "docs" / "data-flow.dot").read_text(encoding="utf-8")
TOP = (*FLOORS, "scripts", "tests", "docs")

# File names that look like names of modules.
_FILES = (".h5", ".py", ".pt", ".cap")


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def inline_code(page: Path) -> list[str]:
    """The text between single backticks, outside of code blocks."""
    prose = re.sub(r"^ *```.*?^ *```", "", text(page), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def shell_lines(page: Path) -> Iterator[str]:
    """The commands in code blocks without a language."""
    for block in re.findall(r"^```\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            for command in line.split(" #")[0].split("&&"):
                if command.strip():
                    yield command.strip()


def exists(name: str) -> bool:
    """Whether a path (with wildcards or without) or a dotted name of a floor exists."""
    if "/" in name:
        return any(ROOT.glob(name.rstrip("/")))
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = ROOT.joinpath(*parts[:length])
        for file in (module.with_suffix(".py"), module / "__init__.py"):
            if file.is_file():
                left = parts[length:]
                return not left or (len(left) == 1 and left[0] in top_level_names(file))
    return False


def top_level_names(file: Path) -> set[str]:
    names = set()
    for node in ast.parse(text(file)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom | ast.If) and file.name == "__init__.py":
            # A package offers what it imports, also if it does so late, and tells type checkers.
            imports = [each for each in ast.walk(node) if isinstance(each, ast.ImportFrom)]
            names |= {alias.name for each in imports for alias in each.names}
    return names


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", text(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", text(file), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_modules_exist(page: Path) -> None:
    named = {
        code
        for code in inline_code(page)
        if re.fullmatch(rf"({'|'.join(TOP)})(/[\w.*-]+)+/?", code)
        or (re.fullmatch(rf"({'|'.join(FLOORS)})(\.\w+)+", code) and not code.endswith(_FILES))
    }
    if page.name == "CHANGELOG.md":
        named -= set(re.findall(r"^ *\| `([^`]+)` \|", text(page), re.MULTILINE))  # as they were
        named |= set(re.findall(r"\| `([^`]+)` \|$", text(page), re.MULTILINE))
    assert not [name for name in sorted(named) if not exists(name)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_exist(page: Path) -> None:
    known = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in top_level_names(file)
        if name.startswith("test_")
    }
    named = {code for code in inline_code(page) if re.fullmatch(r"test_\w+", code)}
    assert named <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_with_their_options(page: Path) -> None:
    lines = [*shell_lines(page), *inline_code(page)]
    for line in lines:
        if line.startswith("cap ") and "…" not in line:
            check_cap(shlex.split(line)[1:])
        elif line.startswith("scripts/"):
            assert os.access(ROOT / line.split()[0], os.X_OK) or "." in line.split()[0], line
        elif line.startswith("python -m pytest"):
            for argument in line.split()[3:]:
                path, _, name = argument.partition("::")
                if path.startswith("tests"):
                    assert exists(path), line
                    assert not name or name in top_level_names(ROOT / path), line
        elif line.startswith("python -m tests"):
            assert exists(line.split()[2]), line


def check_cap(arguments: list[str]) -> None:
    command: click.Command = typer.main.get_command(app)  # type: ignore[assignment]
    for argument in arguments:
        if argument.startswith("--"):
            known = {name for parameter in command.params for name in parameter.opts}
            assert argument.split("=")[0] in known, arguments
        elif hasattr(command, "commands"):
            assert argument in command.commands, arguments
            command = command.commands[argument]


def table(floor: str) -> dict[str, set[str]]:
    """Room → the names in the last column of the page's table of a floor."""
    section = ARCHITECTURE.split(f"\n### `{floor}`\n")[1].split("\n#")[0]
    rows = re.findall(rf"^\| `{floor}/(\w+)(?:\.py)?` \|.*?([^|]*)\|$", section, re.MULTILINE)
    return {room: set(re.findall(r"`(\w+)`", last)) for room, last in rows}


@pytest.mark.parametrize("floor", ["train", "pipeline"])
def test_every_room_is_named_with_what_it_may_import(floor: str) -> None:
    assert table(floor) == ROOMS[floor]


def test_every_module_of_the_cache_is_named() -> None:
    section = ARCHITECTURE.split("\n### `cache`\n")[1].split("\n#")[0]
    named = re.findall(r"^\| `(cache/[\w/]+)\.py` \|", section, re.MULTILINE)
    names = {name.replace(".", "/") for name in modules("cache") if not name.endswith("__init__")}
    assert sorted(named) == sorted(names)


def dot_nodes() -> dict[str, str]:
    """Node → the text of its label, words separated by spaces."""
    return {
        name: label_text(label)
        for name, label in re.findall(r"^ *(\w+) \[[^\]]*?label=<(.*?)>\s*\]$", DOT, re.M | re.S)
    }


def label_text(label: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", label)).split())


def test_the_picture_names_what_exists() -> None:
    labels = re.findall(r"label=<(.*?)>(?=[\s\],])", DOT, re.S)
    words = " ".join(label_text(label) for label in labels)
    paths = set(re.findall(rf"\b(?:{'|'.join(FLOORS)})/\w+", words))
    assert len(paths) >= 10
    assert not [path for path in sorted(paths) if not (exists(path) or exists(f"{path}.py"))]
    commands = re.findall(r"label=< *cap ([a-z-]+) *>", DOT)
    assert len(commands) == 3
    for command in commands:
        check_cap([command])
    assert set(re.findall(r"subgraph cluster_(\w+)", DOT)) >= set(FLOORS)


def test_the_picture_is_drawn_from_its_source() -> None:
    """The SVG has the nodes, labels, clusters and arrows of the source."""
    namespace = {"svg": "http://www.w3.org/2000/svg"}
    drawn: dict[str, dict[str, str]] = {"node": {}, "edge": {}, "cluster": {}}
    edges = []
    svg = ElementTree.parse(ROOT / "docs" / "data-flow.svg")
    for group in svg.iterfind(".//svg:g", namespace):
        kind, title = group.get("class", ""), group.findtext("svg:title", "", namespace)
        if kind in drawn:
            texts = " ".join(part.text or "" for part in group.iterfind("svg:text", namespace))
            drawn[kind][title] = " ".join(texts.split())
            edges += [title] if kind == "edge" else []
    nodes = dot_nodes()
    assert len(nodes) > 10
    assert drawn["node"] == nodes
    assert set(drawn["cluster"]) == set(re.findall(r"subgraph (cluster_\w+)", DOT))
    arrows = re.findall(r"^ *(\w+) -> (\w+)(?! \[style=invis)(?: \[.*\])?$", DOT, re.MULTILINE)
    assert sorted(edges) == sorted(f"{start}->{stop}" for start, stop in arrows)


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """A user's folder with files that are called like our packages."""
    for floor in FLOORS:
        (tmp_path / f"{floor}.py").write_text("raise SystemExit('a file of the user')\n")
    return tmp_path


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_files_named_like_the_packages_do_not_disturb_the_command(crowded: Path) -> None:
    command = crowded / "bin" / "cap"  # as pip writes it, in a folder of its own
    command.parent.mkdir()
    command.write_text("from pipeline.cli.main import main\nmain()\n")
    assert "extract-features" in run(crowded, command, "--help").stdout
    assert "extract-features" in run(crowded, "-P", "-m", "pipeline", "--help").stdout


def test_files_named_like_the_packages_hide_them_from_python_m(crowded: Path) -> None:
    assert "a file of the user" in run(crowded, "-m", "pipeline", "--help").stderr
    (crowded / "pipeline.py").unlink()
    (crowded / "cache.py").unlink()
    (crowded / "train.py").write_text("")
    assert "hides the package 'train'" in run(crowded, "-m", "pipeline", "--help").stderr


def test_folders_named_like_the_packages_disturb_nobody(tmp_path: Path) -> None:
    for floor in FLOORS:
        (tmp_path / floor).mkdir()
    assert "extract-features" in run(tmp_path, "-m", "pipeline", "--help").stdout
