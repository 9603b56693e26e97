"""`scripts/gpu_check.sh` without a GPU says so, and its checks also run on a CPU."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT


def gpu_check(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "scripts" / "gpu_check.sh"), *map(str, arguments)],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_claimed(tmp_path: Path) -> None:
    done = gpu_check("--out", tmp_path / "x.json")
    assert done.returncode == 1
    assert done.stderr.strip() == "no CUDA GPU here: nothing was checked or measured"
    assert not (tmp_path / "x.json").exists()


def test_the_checks_themselves_run_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    done = gpu_check("--out", out, "--device", "cpu", "--backbone", "resnet18", "--checks-only")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)
    checks = json.loads(out.read_text())["checks"]
    assert len(checks) == 10
    assert all(figures["ok"] for figures in checks.values())
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


def test_a_failed_check_is_an_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", script)  # dataclasses look there
    spec.loader.exec_module(script)

    def broken(setting: object) -> dict[str, object]:
        raise AssertionError("other bytes")

    def fine(setting: object) -> dict[str, object]:
        return {"figure": 1}

    extraction = importlib.import_module("gpu_check_extraction")
    monkeypatch.setattr(extraction, "CHECKS", (broken, fine))
    monkeypatch.setattr(script, "TRAINING_CHECKS", ())
    out = tmp_path / "x.json"
    options = ["--device", "cpu", "--backbone", "resnet18", "--checks-only", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *options])
    assert script.main() == 1
    checks = json.loads(out.read_text())["checks"]
    assert checks["broken"]["error"] == "AssertionError: other bytes"
    assert (checks["fine"]["ok"], checks["fine"]["figure"]) == (True, 1)
