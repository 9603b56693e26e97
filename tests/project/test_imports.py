"""Who may import whom: cache ← train ← pipeline, room by room, and nobody scripts or tests."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

FLOORS = ("cache", "train", "pipeline")
FOREIGN = {  # packages that a floor does without
    "cache": {"torch", "torchvision"},
    "train": {"torchvision"},
    "pipeline": set[str](),
}

# What each room, or module beside the rooms, may import of its own floor. The floors below are
# open to all: `cache` to `train`, both to `pipeline`. `docs/architecture.md` draws this.
TRAIN = {
    "option": set[str](),
    "config": {"option"},
    "device": set[str](),
    "private_torch": set[str](),
    "torch_import": set[str](),
    "allocator": set[str](),
    "captions": {"config"},
    "model": {"config", "captions"},
    "search": {"private_torch", "config", "captions", "model"},
    "scores": {"captions"},
    "step": {"private_torch", "torch_import", "device", "config", "captions", "model", "search"},
    "fit": {
        *("config", "device", "captions", "model", "search", "scores", "step", "allocator"),
        "torch_import",
    },
}
PIPELINE = {
    "photos": set[str](),
    "captions": {"photos"},
    "encoder": {"photos"},
    "inspection": {"photos", "captions", "encoder"},
    "gallery": {"photos", "captions", "captioner", "evaluation"},
    "extraction": {"photos", "captions", "encoder"},
    "captioner": {"photos", "captions", "encoder"},
    "evaluation": {"photos", "captions", "captioner", "extraction"},
    "demo": {"extraction", "captioner", "evaluation", "gallery"},
    "bench": {"photos", "encoder", "extraction", "captioner"},
    "cli": {
        *("photos", "captions", "encoder", "extraction", "captioner", "evaluation"),
        *("inspection", "gallery", "demo", "bench"),
    },
    "__main__": {"cli"},
}
ROOMS = {"cache": None, "train": TRAIN, "pipeline": PIPELINE}


def modules(floor: str) -> dict[str, Path]:
    """Dotted name → file of every module of a floor, however deep."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in sorted((ROOT / floor).rglob("*.py"))
    }


MODULES = {name: path for floor in FLOORS for name, path in modules(floor).items()}


def imported(path: Path) -> Iterator[str]:
    """Every imported module by its dotted name, also where the import is inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                member = f"{node.module}.{alias.name}"
                yield member if member in MODULES else str(node.module)


@pytest.mark.parametrize("floor", FLOORS)
def test_floors_import_downwards(floor: str) -> None:
    above = {*FLOORS[FLOORS.index(floor) + 1 :], "scripts", "tests"}
    for name, path in modules(floor).items():
        found = {target.split(".")[0] for target in imported(path)}
        assert not found & (above | FOREIGN[floor]), name


@pytest.mark.parametrize("floor", ["train", "pipeline"])
def test_rooms_import_what_they_may(floor: str) -> None:
    allowed = ROOMS[floor]
    assert allowed is not None
    for name, path in modules(floor).items():
        room = name.split(".")[1]
        if room == "__init__":
            continue
        for target in imported(path):
            parts = target.split(".")
            if parts[0] == floor and parts[1] != room:
                assert parts[1] in allowed[room], f"{name} imports {target}"


def test_private_parts_of_torch_are_in_two_modules() -> None:
    private = re.compile(
        r"torch\.(_[a-z]|ops\.|cpu\._|backends\.\w+\._)|nn\.modules\.|torch\._C|\._version\b"
    )
    for name, path in MODULES.items():
        if name not in ("train.private_torch", "train.torch_import"):
            assert not private.search(path.read_text(encoding="utf-8")), name


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: {t for t in imported(path) if t in MODULES} for name, path in MODULES.items()}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError, naming the circle


@pytest.mark.parametrize("floor", FLOORS)
def test_every_room_says_what_it_is_for(floor: str) -> None:
    for folder in {path.parent for path in modules(floor).values()}:
        docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8")))
        assert docstring, folder


@pytest.mark.parametrize("floor", FLOORS)
def test_a_folder_reads_like_a_table_of_contents(floor: str) -> None:
    for folder in {path.parent for path in modules(floor).values()}:
        unlisted = {"__init__.py", "__pycache__", "py.typed"}
        assert len({p.name for p in folder.iterdir()} - unlisted) <= 12, folder


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; import pipeline.cli.app;"
        "print([m for m in ('torch', 'numpy', 'h5py', 'nltk', 'PIL', 'pycocotools') "
        "if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"
