"""The shell parts of docs/many-machines.md run, and their shards make the whole."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cache.store import open_cache
from tests.conftest import ROOT
from tests.pipeline.test_cli import cap

RECIPES = ROOT / "docs" / "recipes"
SMALL = ("--backbone", "resnet18", "--weights", "random", "--image-size", "32", "--device", "cpu")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment whose `cap` is this one, with small networks and in float32."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "cap"
    command.write_text(
        f"#!{sys.executable}\nimport sys\nsys.argv += {[*SMALL, '--precision', 'float32']!r}\n"
        "from pipeline.cli.main import main\nmain()\n"
    )
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


def shell_of_yaml(text: str) -> str:
    """The script in the job: the block after `- |`, without its indentation."""
    (block,) = re.findall(r"^ +- \|\n((?: {14}.*\n)+)", text, re.MULTILINE)
    return "\n".join(line[14:] for line in block.splitlines())


@pytest.mark.slow
def test_the_shards_of_slurm_and_kubernetes_make_the_whole(
    photos: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    captions = photos / "captions.txt"
    shards = tmp_path / "shards"
    job = [str(RECIPES / "extract.sbatch"), str(photos), str(captions), str(shards)]
    numbers = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MAX": "2"}
    common = ["--batch-size", "4"]
    for _ in range(2):  # the second time there is nothing to do
        subprocess.run([*job, *common], env=environment | numbers, check=True, capture_output=True)

    script = shell_of_yaml((RECIPES / "extract.yaml").read_text(encoding="utf-8"))
    for inside, outside in (("/photos", photos), ("/captions/captions.json", captions)):
        assert inside in script
        script = script.replace(f" {inside} ", f" {outside} ")
    script = script.replace("/shards/", f"{shards}/").replace("--batch-size 256", "--batch-size 4")
    pod = {"JOB_COMPLETION_INDEX": "1", "SHARD_COUNT": "2"}
    subprocess.run(["sh", "-c", script], env=environment | pod, check=True, capture_output=True)

    merged, whole = tmp_path / "merged.h5", tmp_path / "whole.h5"
    cap("merge", *sorted(shards.iterdir()), "--out", merged)
    cap(
        *("extract-features", "--images", photos, "--captions", captions, "--out", whole),
        *(*SMALL, "--precision", "float32", *common),
    )
    assert merged.read_bytes() == whole.read_bytes()
    assert len(open_cache(merged)) == 12


def test_the_job_has_as_many_pods_as_shards() -> None:
    text = (RECIPES / "extract.yaml").read_text(encoding="utf-8")
    (completions,) = re.findall(r"completions: (\d+)", text)
    assert re.search(rf'name: SHARD_COUNT\n +value: "{completions}"', text)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_the_slurm_script_is_one() -> None:
    lines = (RECIPES / "extract.sbatch").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/bin/bash"
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(n < first for n, line in enumerate(lines) if line.startswith("#SBATCH"))
    subprocess.run(["bash", "-n", str(RECIPES / "extract.sbatch")], check=True)
