"""What a command imports, which is most of the time in which it starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT

# PyTorch's compiler, and what it brings along: seconds, for nothing that a command uses.
HEAVY = (
    *("sympy", "triton", "torch._dynamo", "torch._inductor", "torch._meta_registrations"),
    *("torch.fx.experimental.symbolic_shapes", "torch.distributed.fsdp"),
)
RUN = f"""
import sys
from pipeline.cli.main import main

def run(*arguments):
    sys.argv = ["cap", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
    print(arguments[0], [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, color in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (40, 30), color).save(folder / f"{number}.jpg")
        (folder / f"{number}.txt").write_text(f"A {color} wall .\nA wall .\n")
    return folder


def test_no_command_imports_the_compiler(photos: Path, tmp_path: Path) -> None:
    """In a fresh process, because modules stay imported."""
    cache, run = tmp_path / "a.h5", tmp_path / "run"
    commands = (
        f"extract-features --images {photos} --captions sidecar --out {cache}"
        " --backbone resnet18 --weights random --image-size 64",
        f"train --from-cache {cache} --out {run} --epochs 1 --min-count 1",
        f"predict {photos / '0.jpg'} --model {run}",
    )
    code = RUN + "".join(f"run(*{command.split()!r}, '--device', 'cpu')\n" for command in commands)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    for command in ("extract-features", "train", "predict"):
        assert f"{command} []" in done.stderr.splitlines()
