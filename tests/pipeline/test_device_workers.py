"""Extraction on several devices, here on several CPUs: the same code as for several GPUs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

from cache.store import open_cache
from pipeline.encoder.weights import load_backbone
from pipeline.extraction import device_workers
from pipeline.extraction.device_workers import WorkerError, encode_on_devices
from pipeline.extraction.encode_batches import pending_batches
from pipeline.extraction.extract import extract
from pipeline.extraction.fill import Progress
from pipeline.photos.sources.source import Folder
from tests.conftest import ROOT, MakeCache, write_photo
from tests.pipeline.test_extract import config, run
from train.device import DeviceError, resolve_devices


def workers_of(pid: int) -> list[int]:
    """The living worker processes that this process has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    lines = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    return [int(child) for child, line in lines.items() if b"device_workers" in line]


def test_two_processes_make_the_bytes_of_one(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "whole.h5")
    last, _ = run(photos, tmp_path / "x.h5", device="cpu,cpu")
    assert (last.done, last.unreadable, last.new) == (11, 1, 12)
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_a_killed_worker_is_one_line_and_the_run_goes_on_later(
    photos: Path, tmp_path: Path
) -> None:
    def extract_and_kill() -> None:
        for report in extract(config(photos, tmp_path / "x.h5", device="cpu,cpu", batch_size=1)):
            if isinstance(report, Progress) and report.new == 1:
                for worker in workers_of(os.getpid()):
                    os.kill(worker, signal.SIGKILL)

    with pytest.raises(WorkerError, match=r"cpu: its process ended \(exit code -9\); what is done"):
        extract_and_kill()
    assert not workers_of(os.getpid())
    last, _ = run(photos, tmp_path / "x.h5")
    assert (last.done, last.unreadable) == (11, 1)
    assert last.new < 12


def test_a_worker_that_dies_at_its_start_is_one_line(
    tmp_path: Path, make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more photos than the pipe to the worker holds. All are started before one is waited for:
    each takes seconds to import what it needs."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    events: list[str] = []
    start, send = device_workers._start, Connection.send

    def noted_start(pipe: Connection) -> subprocess.Popen[bytes]:
        events.append("start")
        return start(pipe)

    def noted_send(pipe: Connection, item: object) -> None:
        events.append("send")
        send(pipe, item)

    monkeypatch.setattr(device_workers, "_start", noted_start)
    monkeypatch.setattr(Connection, "send", noted_send)
    order = np.arange(100_000)
    batches = pending_batches(order, np.zeros(100_000, np.uint8), 16)
    with pytest.raises(
        WorkerError, match=r"cpu: its process ended \(exit code 1\); what is done is"
    ):
        list(
            encode_on_devices(
                make_cache([["a"]]), order, batches, [torch.device("cpu")] * 2,
                source=Folder(tmp_path), weights="random", readers=2,
            )
        )  # fmt: skip
    assert events == ["start", "start", "send"]


def test_closing_ends_the_processes_at_once(photos: Path, tmp_path: Path) -> None:
    reports = extract(config(photos, tmp_path / "x.h5", device="cpu,cpu", batch_size=1))
    for report in reports:
        if isinstance(report, Progress) and report.new:
            break
    assert len(workers_of(os.getpid())) == 2
    reports.close()
    assert not workers_of(os.getpid())


@pytest.mark.slow
def test_workers_do_not_import_from_the_working_folder(photos: Path, tmp_path: Path) -> None:
    for floor in ("cache", "train", "pipeline"):
        (tmp_path / f"{floor}.py").write_text("raise SystemExit('imported')")
    command = [
        sys.executable, "-P", "-c", "from pipeline.cli.app import app; app()", "extract-features",
        "--images", photos, "--out", tmp_path / "x.h5", "--backbone", "resnet18",
        "--weights", "random", "--image-size", 64, "--batch-size", 4, "--device", "cpu,cpu",
    ]  # fmt: skip
    done = subprocess.run(
        [str(part) for part in command],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr


def start_command(folder: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """Start an extraction on two devices in a process group of its own.

    Returns it and its workers once the first rows are written.
    """
    for seed in range(1000):
        write_photo(folder / "photos" / f"{seed}.jpg", seed)
    command = [
        sys.executable, "-c", "from pipeline.cli.app import app; app()", "extract-features",
        "--images", folder / "photos", "--out", folder / "x.h5", "--backbone", "resnet18",
        "--weights", "random", "--image-size", 64, "--batch-size", 1, "--device", "cpu,cpu",
    ]  # fmt: skip
    process = subprocess.Popen(
        [str(part) for part in command],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    while (
        not (folder / "x.h5").exists()
        or not open_cache(folder / "x.h5", allow_pending=True).status.any()
    ):
        assert process.poll() is None
        time.sleep(0.05)
    return process, workers_of(process.pid)


def wait_for_their_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/task").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ctrl_c_in_the_terminal_ends_all_processes_with_one_line(tmp_path: Path) -> None:
    process, children = start_command(tmp_path)
    assert len(children) == 2
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line for line in err.splitlines() if not line.startswith("extracting: ")] == [
        f"interrupted; what is done is kept in {tmp_path}/x.h5; run the same command to go on"
    ]
    wait_for_their_end(children)


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    process, children = start_command(tmp_path)
    process.kill()
    process.wait()
    wait_for_their_end(children)


def test_what_a_worker_cannot_do_is_its_one_line(photos: Path, tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    torch.save(load_backbone("resnet18", "random").network.state_dict(), weights)
    reports = extract(config(photos, tmp_path / "x.h5", weights=str(weights), device="cpu,cpu"))
    next(report for report in reports if isinstance(report, Progress))
    weights.unlink()  # before the workers start
    with pytest.raises(WorkerError, match=r"w\.pth: no such weights file"):
        list(reports)


def test_devices_are_named_singly_or_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_devices("cpu") == [torch.device("cpu")]
    assert resolve_devices("cpu, cpu") == [torch.device("cpu")] * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    every = [torch.device("cuda", index) for index in range(3)]
    assert resolve_devices("auto") == resolve_devices("cuda") == every
    assert resolve_devices("cuda:1") == every[1:2]
    assert resolve_devices("cuda:2,cuda:0") == [every[2], every[0]]
    with pytest.raises(DeviceError, match="no device cuda:3; this machine has 3 GPUs"):
        resolve_devices("cuda:0,cuda:3")
    with pytest.raises(DeviceError, match="of two kinds"):
        resolve_devices("cuda:0,cpu")
