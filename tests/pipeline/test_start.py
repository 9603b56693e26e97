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


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("sys.exit()", 0),
        ("sys.exit(3)", 3),
        ("sys.exit('in words')", 1),
        ("raise ValueError", 1),
        ("try: main()\nexcept SystemExit: raise ValueError from None", 1),
    ],
)
def test_a_process_with_torch_ends_at_once_with_its_exit_code_and_everything_written(
    code: str, status: int, tmp_path: Path
) -> None:
    """At once: what the interpreter does after the exit handlers is left out."""
    body = code if "main()" in code else "main()"
    ended = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import atexit, sys, types\n"
            "class Told:\n"
            "    def __del__(self, write=sys.stderr.write): write('dismantled ')\n"
            "import pipeline.cli.app as app\n"
            "from pipeline.cli.main import main\n"
            "def command():\n"
            "    sys.modules['torch'] = types.ModuleType('torch')\n"
            "    sys.modules['told'] = told = types.ModuleType('told')\n"
            "    told.one = Told()\n"
            "    atexit.register(sys.stderr.write, 'handlers ')\n"
            "    sys.stdout.write('result')\n"
            f"    {code if body == 'main()' else 'sys.exit()'}\n"
            "app.app = command\n" + body,
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (status, "result"), ended.stderr
    assert "handlers " in ended.stderr
    assert ("dismantled " in ended.stderr) == ("ValueError" in code)
    assert ("ValueError" in ended.stderr) == ("ValueError" in code)
    assert ("in words" in ended.stderr) == ("in words" in code)
