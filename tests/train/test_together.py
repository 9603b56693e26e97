"""Two processes train together, connected by Gloo, and reach what one process reaches."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, MakeCache
from tests.train.runs import WORDS, same, weights
from tests.train.together import WINDOW, settings, streamed, trained
from train.fit.processes.follower import _check_alike
from train.fit.processes.leader import DATA, SETTINGS
from train.fit.record.run_folder import TrainError
from train.fit.reports import Started
from train.fit.resume import run_settings
from train.fit.run import train

# Each of these follows from rounding alone: BatchNorm takes any constant out of what it measures.
_ROUNDING_ALONE = ("project.bias", "normalize.running_mean")


def start(rank: int, *arguments: str, port: str = "0") -> subprocess.Popen[str]:
    """One of two processes."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=os.environ | place | address | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each."""
    try:
        said = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        (process.returncode, out, err) for process, (out, err) in zip(processes, said, strict=True)
    ]


def both(what: str, folder: Path, connections: int) -> list[tuple[int, str, str]]:
    ports = free_ports(connections)
    return ends([start(n, "tests.train.together", what, str(folder), *ports) for n in range(2)])


def free_ports(count: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in sockets]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a cache of 30 photos in two views, three captions each."""
    from tests.conftest import make_cache

    made = tmp_path_factory.mktemp("together")
    maker: MakeCache = make_cache.__wrapped__(made)  # type: ignore[attr-defined]
    random = np.random.default_rng(0)
    captions = [
        [" ".join(random.choice(WORDS, random.integers(2, 9))) for _ in range(3)] for _ in range(30)
    ]
    maker(captions, views=("full", "flip"))
    return made


@pytest.fixture(scope="module")
def first_launch(folder: Path) -> list[tuple[int, str, str]]:
    return both("trainers", folder, 3)


@pytest.fixture(scope="module")
def second_launch(
    folder: Path, first_launch: list[tuple[int, str, str]]
) -> list[tuple[int, str, str]]:
    shutil.copytree(folder / "part", folder / "alone")
    return both("resumed", folder, 3)


def difference(state: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest one of any weight, average, moment or statistic."""
    differences = [0.0]

    def compare(found: Any, expected: Any, name: str) -> None:
        if isinstance(found, dict):
            assert found.keys() == expected.keys()
            for key in found:
                compare(found[key], expected[key], key)
        elif isinstance(found, torch.Tensor) and name not in _ROUNDING_ALONE:
            differences.append(float((found.float() - expected.float()).abs().max()))
        elif name == "steps":
            assert found == expected

    compare(state, other, "")
    return max(differences)


@pytest.mark.parametrize("name", ["classic", "best", "as on a GPU", "self-critical"])
def test_two_processes_reach_what_one_does(
    name: str, folder: Path, first_launch: list[tuple[int, str, str]]
) -> None:
    together = torch.load(folder / f"{name}.pt", weights_only=True)
    assert difference(together, trained(name, folder, None).state()) < 2e-5


def test_dropout_and_sampled_words_follow_from_the_seed(
    folder: Path, first_launch: list[tuple[int, str, str]]
) -> None:
    first = torch.load(folder / "dropout.pt", weights_only=True)
    again = torch.load(folder / "dropout again.pt", weights_only=True)
    assert difference(first, again) == 0
    assert difference(first, trained("dropout", folder, None).state()) > 1e-4


def test_weights_and_batches_that_differ_are_noticed(
    first_launch: list[tuple[int, str, str]],
) -> None:
    for _, out, _ in first_launch:
        weights_differ, batches_differ = out.splitlines()
        assert weights_differ.startswith("the weights of the 2 processes differ after epoch 1; ")
        assert batches_differ == "the processes go through the captions in different orders"


def test_processes_with_other_settings_or_data_are_refused(folder: Path) -> None:
    chosen = settings(folder, "alike")
    data = {"captions": "1", "from_model": ""}
    told = {SETTINGS: run_settings(chosen), DATA: data}
    _check_alike(chosen, told, data)
    with pytest.raises(TrainError, match=r"^has seed 0, the first process 1$"):
        _check_alike(chosen, told | {SETTINGS: run_settings(chosen) | {"seed": 1}}, data)
    with pytest.raises(TrainError, match=r"x\.h5: holds other captions than that of the first pr"):
        _check_alike(chosen, told, data | {"captions": "2"})


def test_the_others_end_with_the_first(first_launch: list[tuple[int, str, str]]) -> None:
    assert [(code, err) for code, _, err in first_launch] == [(0, ""), (0, "")]


def test_a_resumed_run_of_as_many_processes_has_the_same_bits(
    folder: Path, second_launch: list[tuple[int, str, str]]
) -> None:
    assert same(weights(folder / "whole/last.cap"), weights(folder / "part/last.cap"))
    logs = [(folder / name / "metrics.jsonl").read_text().count("\n") for name in ("whole", "part")]
    assert logs[0] == logs[1]


def test_a_run_goes_on_in_one_process(
    folder: Path, second_launch: list[tuple[int, str, str]]
) -> None:
    for _ in train(settings(folder, "alone", resume=True)):
        pass
    alone, together = (
        torch.load(folder / name / "checkpoint.pt", weights_only=True)["trainer"]
        for name in ("alone", "whole")
    )
    assert difference(alone, together) < 0.1


def test_streamed_features_reach_every_process_in_the_same_order(
    folder: Path, second_launch: list[tuple[int, str, str]]
) -> None:
    lines = [
        report.summary()
        for report in train(streamed(folder, "streamed alone", WINDOW))
        if isinstance(report, Started)
    ]
    assert "of them in memory at a time" in lines[0]
    alone, together = (
        torch.load(folder / name / "checkpoint.pt", weights_only=True)["trainer"]
        for name in ("streamed alone", "streamed")
    )
    assert difference(alone, together) < 2e-5


def test_if_one_process_is_killed_the_other_says_so_and_ends(
    folder: Path, second_launch: list[tuple[int, str, str]]
) -> None:
    (code, _, err), (killed, _, _) = second_launch
    assert killed == -9
    assert code == 1
    killed_run = folder / "killed"
    ending = f"{killed_run}: another process of this training has ended; go on with --resume\n"
    assert err.endswith(ending)
    assert not (killed_run / "run.lock").exists()
    assert (killed_run / "checkpoint.pt").exists()
