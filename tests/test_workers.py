"""Several devices at once, here several CPUs: the code path is that of several GPUs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from pipeline.encoder import load_backbone
from pipeline.extract import Progress, extract
from pipeline.workers import WorkerError
from tests.test_extract import config, run
from train.device import DeviceError, resolve_devices


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
                for child in multiprocessing.active_children():
                    assert child.pid is not None
                    os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(WorkerError, match=r"cpu: its process ended \(exit code -9\); what is done"):
        extract_and_kill()
    assert not multiprocessing.active_children()
    last, _ = run(photos, tmp_path / "x.h5")
    assert (last.done, last.unreadable) == (11, 1)
    assert last.new < 12


def test_closing_ends_the_processes_at_once(photos: Path, tmp_path: Path) -> None:
    reports = extract(config(photos, tmp_path / "x.h5", device="cpu,cpu", batch_size=1))
    for report in reports:
        if isinstance(report, Progress) and report.new:
            break
    reports.close()
    deadline = time.monotonic() + 30
    while multiprocessing.active_children():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_a_worker_cannot_do_is_its_one_line(photos: Path, tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    torch.save(load_backbone("resnet18", "random").network.state_dict(), weights)
    reports = extract(config(photos, tmp_path / "x.h5", weights=str(weights), device="cpu,cpu"))
    next(reports)
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
