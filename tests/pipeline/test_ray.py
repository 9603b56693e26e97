"""Extraction on a real cluster of Ray: one machine, two workers, processes that are killed."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cache.errors import CapError
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.distributed.config import RayOptions
from pipeline.extraction.distributed.job import folder_of
from pipeline.extraction.distributed.pool import ClusterError, RayPool
from pipeline.extraction.distributed.run import ClusterProgress, extract_on_cluster
from pipeline.extraction.extract import extract
from pipeline.extraction.fill import Notice
from tests.conftest import ROOT, write_photo

PHOTOS, SHARDS, BATCH = 240, 6, 8
WEIGHTS = ROOT / "pipeline" / "demo" / "demo_backbone.pth"  # quicker made than random ones
_STORE_BYTES = 100_000_000


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Ray with two CPUs, for all tests; its processes end with it."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    path = os.environ.get("PYTHONPATH")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [path])]))
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=_STORE_BYTES,
            log_to_driver=False,
            logging_level="CRITICAL",
        )
        yield ray
        ray.shutdown()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 drawn photos, one of them broken, with two captions each."""
    folder = tmp_path_factory.mktemp("many")
    lines = ["image,caption"]
    for seed in range(PHOTOS):
        write_photo(folder / f"{seed:03d}.jpg", seed)
        lines += [f"{seed:03d}.jpg,A photo of noise .", f"{seed:03d}.jpg,Noise {seed} ."]
    (folder / "017.jpg").write_bytes(b"this is no photo")
    (folder / "captions.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder


def config(many: Path, out: Path) -> ExtractConfig:
    return ExtractConfig(
        images=many,
        out=out,
        captions=many / "captions.csv",
        backbone="shufflenet_v2_x0_5",
        weights=str(WEIGHTS),
        image_size=32,
        batch_size=BATCH,
        device="cpu",
        precision="float32",
    )


OPTIONS = RayOptions(ray="auto", ray_workers=2, ray_shards=SHARDS)


@pytest.fixture(scope="module")
def alone(many: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The cache of one process."""
    out = tmp_path_factory.mktemp("alone") / "x.h5"
    for _ in extract(config(many, out)):
        pass
    return out.read_bytes()


def worker_of(notice: Notice) -> int | None:
    """The process of a worker that has started."""
    found = re.fullmatch(r"a worker on \S+, process (\d+)", notice.text)
    return int(found[1]) if found else None


def test_two_workers_make_the_bytes_of_one_process_though_one_is_killed(
    cluster: Any, many: Path, alone: bytes, tmp_path: Path
) -> None:
    workers: list[int] = []
    killed: list[int] = []
    notices: list[str] = []
    last = None
    for report in extract_on_cluster(config(many, tmp_path / "x.h5"), OPTIONS):
        if isinstance(report, Notice):
            notices.append(report.text)
            if (pid := worker_of(report)) is not None:
                workers.append(pid)
            continue
        last = report
        if report.workers == 2 and not killed:
            killed.append(workers[0])
            os.kill(workers[0], signal.SIGKILL)
    assert killed
    assert any(" died at shard " in notice and "which goes on: " in notice for notice in notices)
    assert last is not None
    assert (last.done, last.unreadable, last.shards_done) == (PHOTOS - 1, 1, SHARDS)
    assert (tmp_path / "x.h5").read_bytes() == alone
    assert os.listdir(tmp_path) == ["x.h5"]
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def command(many: Path, out: Path, address: str) -> subprocess.Popen[str]:
    """The command as a user types it, as a driver of its own."""
    told = [
        *("extract-features", "--images", many, "--captions", many / "captions.csv", "--out", out),
        *("--backbone", "shufflenet_v2_x0_5", "--weights", WEIGHTS, "--image-size", 32),
        *("--device", "cpu"),
        *("--batch-size", BATCH, "--precision", "float32", "--ray", address, "--verbose"),
        *("--ray-workers", 2, "--ray-shards", SHARDS),
    ]
    code = "from pipeline.cli.main import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, told)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_driver_goes_on_with_the_missing_shards_and_admits_no_second(
    cluster: Any, many: Path, alone: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "x.h5"
    folder = folder_of(out)
    driver = command(many, out, cluster.get_runtime_context().gcs_address)
    finished = f"[0-9]-of-{SHARDS}.h5"
    try:
        wait_until(lambda: list(folder.glob(finished)) or driver.poll() is not None)
        with pytest.raises(CapError, match=f"at work there .process {driver.pid} of "):
            next(extract_on_cluster(config(many, out), OPTIONS))
    finally:
        driver.kill()
        _, err = driver.communicate()
    assert driver.returncode == -signal.SIGKILL, err
    done = {path.name: path.stat().st_ino for path in folder.glob(finished)}
    assert 1 <= len(done) < SHARDS
    assert not out.exists()
    # Its workers live on for a moment, and may finish a shard.
    workers = [int(pid) for pid in re.findall(r"process (\d+)$", err, re.MULTILINE)]
    assert len(workers) == 2
    reports = list(extract_on_cluster(config(many, out), OPTIONS))
    (line,) = (r.text for r in reports if isinstance(r, Notice) and "checking them" in r.text)
    found = int(line.split(" of ")[0])
    assert len(done) <= found < SHARDS
    last = reports[-1]
    assert isinstance(last, ClusterProgress)
    assert last.new <= PHOTOS - found * PHOTOS // SHARDS
    assert out.read_bytes() == alone


@pytest.mark.slow
def test_a_worker_that_cannot_write_fails_no_shard_of_the_others(
    cluster: Any, many: Path, alone: bytes, tmp_path: Path
) -> None:
    notices: list[str] = []
    for attempt in range(4):  # until the other worker does not make all shards before this one
        limited: list[int] = []
        out = tmp_path / f"{attempt}.h5"
        for report in extract_on_cluster(config(many, out), OPTIONS):
            if isinstance(report, Notice):
                notices.append(report.text)
                if (pid := worker_of(report)) is not None and not limited:
                    limited.append(pid)  # as where the disk of one machine is full
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, 4096))
        assert out.read_bytes() == alone
        if any("File too large" in notice for notice in notices):
            return
    pytest.fail("the worker was never given a shard")


def test_a_cluster_that_lacks_what_is_asked_says_so(
    cluster: Any, many: Path, tmp_path: Path
) -> None:
    options = RayOptions(ray="auto", ray_workers=1, ray_cores=64, ray_wait=2)
    started: list[object] = []
    with pytest.raises(
        ClusterError,
        match=r"no worker could start within 2 s: asked for 1 worker of 64 CPUs; the cluster has "
        r"2 CPUs \(2 free\) and 0 GPUs \(0 free\) on 1 machine",
    ):
        started.extend(extract_on_cluster(config(many, tmp_path / "x.h5"), options))
    assert list(tmp_path.iterdir()) == []


def test_an_address_where_no_cluster_is_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    for address, what in (
        ("127.0.0.1:1", "nobody answers there"),
        ("cluster", "is neither auto nor HOST:PORT"),
        ("ray://127.0.0.1:10001", "run this command on a machine of the cluster"),
    ):
        with pytest.raises(ClusterError, match=f"--ray {address}: .*{what}"):
            RayPool(address).__enter__()
