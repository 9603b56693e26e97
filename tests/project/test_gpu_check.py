"""`scripts/gpu_check.sh` without a GPU says so, and its checks also run on a CPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.conftest import ROOT


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("gpu_check")


def run_on_a_cpu(script: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of the script's checks."""
    options = ["--device", "cpu", "--backbone", "resnet18", "--checks-only", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *options])
    code: int = script.main()
    return code


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_claimed(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(ROOT / "scripts" / "gpu_check.sh"), "--out", str(tmp_path / "x.json")],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "no CUDA GPU here: nothing was checked or measured"
    assert not (tmp_path / "x.json").exists()


def test_the_checks_themselves_run_on_a_cpu(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.set_num_threads(1)  # the small sizes gain nothing from more
    out = tmp_path / "x.json"
    code = run_on_a_cpu(script, out, monkeypatch)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert printed.out.strip() == str(out)
    checks = json.loads(out.read_text())["checks"]
    assert len(checks) == 10
    assert all(figures["ok"] for figures in checks.values())
    assert checks["graphs_train_as_direct_steps_do"]["steps"] == 48
    assert checks["resumed_extraction_has_the_same_bytes"]["photos"] == 32


def test_training_is_checked_without_the_packages_that_decode_photos() -> None:
    code = (
        "import sys, gpu_check; "
        "print([m for m in ('simplejpeg', 'torchvision', 'nltk', 'PIL', 'pycocotools') "
        "if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_failed_check_is_an_exit_code(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(setting: object) -> dict[str, object]:
        raise AssertionError("other bytes")

    def fine(setting: object) -> dict[str, object]:
        return {"figure": 1}

    extraction = importlib.import_module("gpu_check_extraction")
    monkeypatch.setattr(extraction, "CHECKS", (broken, fine))
    monkeypatch.setattr(script, "TRAINING_CHECKS", ())
    out = tmp_path / "x.json"
    assert run_on_a_cpu(script, out, monkeypatch) == 1
    checks = json.loads(out.read_text())["checks"]
    assert checks["broken"]["error"] == "AssertionError: other bytes"
    assert (checks["fine"]["ok"], checks["fine"]["figure"]) == (True, 1)
