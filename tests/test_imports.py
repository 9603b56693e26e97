"""Who may import whom: cache ← train ← pipeline, and nobody scripts or tests."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "cache": {"train", "pipeline", "scripts", "tests", "torch", "torchvision"},
    "train": {"pipeline", "scripts", "tests", "torchvision"},
    "pipeline": {"scripts", "tests"},
}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_run_one_way(package: str) -> None:
    files = sorted((ROOT / package).glob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & FORBIDDEN[package], path.name


def test_packages_are_flat_and_listed() -> None:
    for package in FORBIDDEN:
        assert not [p for p in (ROOT / package).iterdir() if p.is_dir() and p.name[0] != "_"]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; import pipeline.cli;"
        "print([m for m in ('torch', 'numpy', 'h5py', 'nltk', 'PIL', 'pycocotools') "
        "if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"
