"""`cap` as one of the processes that torchrun starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli.app import app
from tests.conftest import ROOT, MakeCache
from tests.train.test_together import ends, free_ports, start

SMALL = [
    "--hidden-size", "8", "--embedding-size", "8", "--min-count", "1", "--batch-size", "8",
    "--device", "cpu",
]  # fmt: skip


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    for name, value in (place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("command", ["sweep", "extract-features", "info", "bench train"])
def test_commands_that_cannot_share_their_work_refuse_to(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    as_process(monkeypatch, 0)
    arguments = {
        "sweep": ["--from-cache", "x.h5", "--out", "run"],
        "extract-features": ["--images", "photos", "--out", "x.h5"],
        "info": ["x.h5"],
        "bench train": [],
    }
    result = CliRunner().invoke(app, [*command.split(), *arguments[command]])
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: cap {command} works in one process, and torchrun has started 2; start it without "
        "torchrun, or unset RANK and WORLD_SIZE\n"
    )


def test_only_the_first_process_says_what_is_wrong_with_the_arguments() -> None:
    arguments = ("pipeline", "train", "--from-cache", "x.h5", "--out", "run", "--hiden-size", "3")
    (first, out, err), (second, *silent) = ends([start(n, *arguments) for n in range(2)])
    assert (first, second) == (2, 2)
    assert (out, silent) == ("", ["", ""])
    assert "No such option: --hiden-size" in err


def test_what_goes_wrong_in_one_process_is_said_once_by_the_first(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    cache = make_cache([["a dog", "a cat"]] * 8).path
    run = tmp_path / "run"
    (port,) = free_ports(1)
    given = ["pipeline", "train", "--out", str(run), *SMALL]
    caches = [str(cache), f"{tmp_path}/else\udcffwhere.h5"]  # a name that is not UTF-8
    started = [start(n, *given, "--from-cache", path, port=port) for n, path in enumerate(caches)]
    first, second = ends(started)
    assert first == (
        1,
        "",
        f"error: {run}: process 1 of 2: {tmp_path}/else\\udcffwhere.h5: no such file; "
        "run the command again\n",
    )
    assert second == (1, "", "")
    assert not run.exists()


def test_torchrun_trains_and_passes_an_interruption_on(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    cache, run = make_cache([["a dog", "a cat"]] * 8).path, tmp_path / "run"
    torchrun = subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
            "--master-port", *free_ports(1), "-m", "pipeline", "train",
            "--from-cache", str(cache), "--out", str(run), "--epochs", "100000",
            "--log-every", "1", *SMALL,
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert torchrun.stderr is not None
    said = []
    for line in torchrun.stderr:
        said.append(line)
        if line.startswith("Epoch [2/"):
            torchrun.send_signal(signal.SIGTERM)
            break
    said += torchrun.stderr.readlines()
    assert torchrun.wait(timeout=60)
    text = "".join(said)
    assert text.count("2 processes, each on its share of the captions of every step\n") == 1
    assert text.count(f"interrupted; the model so far is in {run}; go on with --resume\n") == 1
    assert "forcefully" not in text
    assert (run / "checkpoint.pt").exists()
    assert not (run / "run.lock").exists()
