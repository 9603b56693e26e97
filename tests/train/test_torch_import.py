"""PyTorch's threads spin briefly, unless the user's environment says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from train.torch_import import seeded_generator, spin_briefly


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("unset")
def test_threads_spin_briefly() -> None:
    spin_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "10000"


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize(
    ("name", "value"),
    [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "7"), ("KMP_BLOCKTIME", "0")],
)
def test_what_the_user_has_set_stays(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    spin_briefly()
    assert os.environ[name] == value
    assert (os.environ.get("GOMP_SPINCOUNT") == value) == (name == "GOMP_SPINCOUNT")


@pytest.mark.usefixtures("unset")
def test_the_command_line_sets_the_spin_before_torch_is_imported() -> None:
    code = (
        "import os, sys\n"
        "from pipeline.cli.main import main\n"
        "sys.argv = ['cap', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.splitlines()[-1] == "10000 False"


@pytest.mark.slow
def test_torchvision_is_imported_without_the_compiler() -> None:
    """In a fresh process, because modules stay imported. See also `tests/pipeline`."""
    code = (
        "import sys\n"
        "from train.torch_import import without_compiler\n"
        "with without_compiler():\n"
        "    from torch._dynamo.utils import is_compile_supported\n"
        "    try: from torch._dynamo import anything_else\n"
        "    except ImportError: print('refused')\n"
        "print('torch._dynamo' in sys.modules, is_compile_supported('cpu') in (True, False))\n"
        "compiler = sys.modules['torch._dynamo']\n"
        "with without_compiler():\n"
        "    print(sys.modules['torch._dynamo'] is compiler)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.split() == ["refused", "False", "True", "True"]


def test_random_numbers_are_there_in_a_process_of_ours() -> None:
    """PyTorch makes no generator before a module is imported that we leave out."""
    code = (
        "from train.torch_import import import_torch, seeded_generator\n"
        "import_torch()\n"
        "import torch\n"
        "print(*torch.randperm(5, generator=seeded_generator(3)).tolist())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    expected = torch.randperm(5, generator=torch.Generator().manual_seed(3)).tolist()
    assert result.stdout.split() == [str(number) for number in expected]
    assert torch.equal(torch.randperm(5, generator=seeded_generator(3)), torch.tensor(expected))
