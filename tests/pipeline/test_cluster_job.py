"""What becomes of shards on a cluster: done once, tried again, or named as failed."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from cache.errors import CapError
from cache.record import CacheError
from cache.store import open_cache
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.distributed import run as cluster_run
from pipeline.extraction.distributed.config import RayOptions
from pipeline.extraction.distributed.job import folder_of, shard_count
from pipeline.extraction.distributed.lock import LOCK_NAME, JobLock
from pipeline.extraction.distributed.messages import (
    Chosen,
    Died,
    Failed,
    Filled,
    Finished,
    Loaded,
    Message,
)
from pipeline.extraction.distributed.pool import Ask, Node, ask_for
from pipeline.extraction.distributed.run import ClusterProgress, extract_on_cluster
from pipeline.extraction.distributed.shards import ShardError
from pipeline.extraction.fill import Notice
from tests.conftest import write_photo
from tests.pipeline.local_pool import LocalPool
from tests.pipeline.making_sources import as_parquet, as_tars
from tests.pipeline.test_cli import SMALL, cap
from tests.pipeline.test_extract import config as extract_config
from tests.pipeline.test_extract import run as extract_alone
from train.option import SettingError


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> LocalPool:
    """The pool of every job of the test."""
    pool = LocalPool()
    monkeypatch.setattr(cluster_run, "RayPool", lambda address: pool)
    return pool


def on_cluster(
    photos: Path,
    out: Path,
    *,
    workers: int = 2,
    shards: int | None = 3,
    catalogue: bool = False,
    **changes: object,
) -> tuple[ClusterProgress, list[str]]:
    """(the final progress, all notices) of a job with three shards of four photos."""
    options = RayOptions(
        ray="auto",
        ray_workers=workers,
        ray_shards=shards,
        ray_wait=0.2,
        catalogue=catalogue,
        cost_per_hour=3.0,
    )
    config = extract_config(photos, out, **{"precision": "float32", "device": "cpu", **changes})
    return finish(config, options)


def finish(config: ExtractConfig, options: RayOptions) -> tuple[ClusterProgress, list[str]]:
    notices: list[str] = []
    last = None
    for report in extract_on_cluster(config, options):
        if isinstance(report, Notice):
            notices.append(report.text)
        else:
            last = report
    assert last is not None
    return last, notices


def failure_of(photos: Path, out: Path, **changes: object) -> tuple[str, list[str]]:
    """(the error, the notices before it) of a job that must fail."""
    notices: list[str] = []
    options = RayOptions(ray="auto", ray_workers=2, ray_shards=3, ray_wait=0.2)
    config = extract_config(photos, out, **{"precision": "float32", "device": "cpu", **changes})
    reports = extract_on_cluster(config, options)
    try:
        notices.extend(report.text for report in reports if isinstance(report, Notice))
    except CapError as error:
        return str(error), notices
    pytest.fail("the job has not failed")


def work_calls(pool: LocalPool) -> list[int]:
    """The shards that were worked on, in the order of the calls."""
    return [shard for _, method, shard in pool.calls if method == "work"]


def test_a_job_makes_the_bytes_of_one_extraction(
    photos: Path, tmp_path: Path, pool: LocalPool
) -> None:
    extract_alone(photos, tmp_path / "alone.h5", precision="float32")
    last, _ = on_cluster(photos, tmp_path / "x.h5")
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "alone.h5").read_bytes()
    assert (last.done, last.unreadable, last.total, last.new) == (11, 1, 12, 12)
    assert (last.shards_done, last.shards, last.cost) == (3, 3, 1.5)  # half an hour of a worker
    assert sorted(work_calls(pool)) == [1, 2, 3]
    assert not folder_of(tmp_path / "x.h5").exists()
    last, notices = on_cluster(photos, tmp_path / "x.h5")
    assert (last.done, last.unreadable, last.new) == (11, 1, 0)
    assert notices[-1] == f"{tmp_path}/x.h5 is made already"


def test_a_catalogue_keeps_the_shards_and_reads_like_the_whole(
    photos: Path, tmp_path: Path, pool: LocalPool
) -> None:
    extract_alone(photos, tmp_path / "alone.h5", precision="float32")
    for _ in range(2):  # the second time it is there
        on_cluster(photos, tmp_path / "x.catalogue", catalogue=True)
        alone, listed = open_cache(tmp_path / "alone.h5"), open_cache(tmp_path / "x.catalogue")
        assert listed.shards is not None
        assert np.array_equal(listed.load_features(), alone.load_features())
        assert list(listed.paths) == list(alone.paths)
        assert listed.captions.sha256() == alone.captions.sha256()
    assert sorted(work_calls(pool)) == [1, 2, 3]
    assert (folder_of(tmp_path / "x.catalogue") / "2-of-3.h5").is_file()


@pytest.mark.parametrize("kind", ["tars", "parquet"])
def test_photos_of_tars_and_parquet_files_are_read_as_by_one_process(
    photos: Path, tmp_path: Path, pool: LocalPool, kind: str
) -> None:
    """The command looks into them; workers get the places of their photos."""
    images: Path = (
        Path(as_tars(photos, tmp_path / "tars"))
        if kind == "tars"
        else as_parquet(photos, tmp_path / "photos.parquet")
    )
    extract_alone(images, tmp_path / "alone.h5", captions=None, precision="float32")
    last, _ = on_cluster(images, tmp_path / "x.h5", captions=None)
    assert (last.done, last.unreadable) == (11, 1)
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "alone.h5").read_bytes()
    assert len(open_cache(tmp_path / "x.h5").captions) == 24


def test_a_worker_loads_once_and_works_until_nothing_is_left(
    photos: Path, tmp_path: Path, pool: LocalPool
) -> None:
    on_cluster(photos, tmp_path / "x.h5", workers=1, batch_size=2, shards=6)
    assert [method for _, method, _ in pool.calls] == ["place", "load", *["work"] * 6]


def test_one_worker_chooses_the_precision_for_all(
    photos: Path, tmp_path: Path, pool: LocalPool
) -> None:
    def slow_arithmetic(worker: int, shard: int, message: Message) -> Message:
        return Chosen("bfloat16") if isinstance(message, Chosen) else message

    pool.fault = slow_arithmetic
    on_cluster(photos, tmp_path / "x.h5", precision="auto")
    assert [method for _, method, _ in pool.calls].count("choose") == 1
    assert open_cache(tmp_path / "x.h5").encoder.precision == "bfloat16"


def test_a_shard_whose_worker_dies_goes_on_where_it_was(
    photos: Path, tmp_path: Path, pool: LocalPool
) -> None:
    killed: list[int] = []

    def dies_once(worker: int, shard: int, message: Message) -> Message:
        if shard == 2 and isinstance(message, Finished) and not killed:
            killed.append(worker)
            (folder_of(tmp_path / "x.h5") / "2-of-3.h5").rename(
                folder_of(tmp_path / "x.h5") / "2-of-3.draft.h5"
            )
            return Died("killed")
        return message

    extract_alone(photos, tmp_path / "alone.h5", precision="float32")
    pool.fault = dies_once
    last, notices = on_cluster(photos, tmp_path / "x.h5")
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "alone.h5").read_bytes()
    assert sorted(work_calls(pool)) == [1, 2, 2, 3]
    assert last.new == 8  # all photos of shard 2 were in its draft
    assert any("died at shard 2/3, which goes on: killed" in notice for notice in notices)


def test_a_shard_that_kills_its_workers_fails_by_name_after_the_others(
    photos: Path, tmp_path: Path, pool: LocalPool
) -> None:
    def poison(worker: int, shard: int, message: Message) -> Message:
        return Died("killed by signal 11") if shard == 1 else message

    pool.fault = poison
    error, notices = failure_of(photos, tmp_path / "x.h5")
    assert error.startswith("1 of 3 shards failed: 1/3; the others are kept in ")
    assert "shard 1/3 failed: its worker died 3 times; last: killed by signal 11" in notices
    assert not (tmp_path / "x.h5").exists()
    made = {path.name for path in folder_of(tmp_path / "x.h5").iterdir()}
    assert {"2-of-3.h5", "3-of-3.h5"} <= made
    assert "1-of-3.h5" not in made
    pool.fault, pool.calls = lambda worker, shard, message: message, []
    last, _ = on_cluster(photos, tmp_path / "x.h5")
    assert work_calls(pool) == [1]
    assert last.done == 11


def test_deaths_at_other_photos_are_not_the_shards_fault(
    photos: Path, tmp_path: Path, pool: LocalPool
) -> None:
    """As on machines that are taken away every hour: each time the shard has advanced."""
    seen: list[int] = []

    def preempted(worker: int, shard: int, message: Message) -> Message:
        if shard == 1 and len(seen) < 8:
            if not seen or len(seen) % 2 == 0:
                seen.append(0)
                return Filled(len(seen) // 2, 0, 0)
            seen.append(1)
            return Died("taken away")
        return message

    pool.fault = preempted
    last, notices = on_cluster(photos, tmp_path / "x.h5")
    assert sum("taken away" in notice for notice in notices) == 4
    assert last.done == 11


def test_a_full_disk_fails_a_shard_by_name_and_a_rerun_finishes(
    photos: Path, tmp_path: Path, pool: LocalPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = os.posix_fallocate

    def full(fd: int, offset: int, length: int) -> None:
        if "2-of-3.draft" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(fd, offset, length)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        error, notices = failure_of(photos, tmp_path / "x.h5")
    assert error.startswith("1 of 3 shards failed: 2/3; ")
    assert notices[-1].startswith("shard 2/3 failed: ")
    assert "2-of-3.draft.h5: needs " in notices[-1]
    assert " of disk, " in notices[-1]
    again = [notice for notice in notices if "it is tried again at the end" in notice]
    assert len(again) == 1
    assert "2-of-3.draft.h5: " in again[0]
    extract_alone(photos, tmp_path / "alone.h5", precision="float32")
    pool.calls = []
    on_cluster(photos, tmp_path / "x.h5")
    assert work_calls(pool) == [2]
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "alone.h5").read_bytes()


def test_a_bug_in_a_shard_is_its_failure_and_is_told_in_full(
    photos: Path, tmp_path: Path, pool: LocalPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("pipeline.extraction.distributed.worker.skeleton_of", broken)
    error, notices = failure_of(photos, tmp_path / "x.h5")
    assert "3 of 3 shards failed: 1/3, 2/3, 3/3" in error
    assert "Traceback (most recent call last):" in notices
    assert any("failed: ZeroDivisionError: division by zero" in notice for notice in notices)


def test_a_machine_that_fails_every_shard_is_left_out(
    photos: Path, tmp_path: Path, pool: LocalPool
) -> None:
    """Else it would take shard after shard, since it is the first to be idle."""

    def no_disk(worker: int, shard: int, message: Message) -> Message:
        if worker == 0 and shard and isinstance(message, Filled | Finished):
            (folder_of(tmp_path / "x.h5") / f"{shard}-of-6.h5").unlink(missing_ok=True)
            return Failed("its disk is full")
        return message

    pool.fault = no_disk
    last, notices = on_cluster(photos, tmp_path / "x.h5", batch_size=2, shards=6)
    assert last.done == 11
    assert any(
        notice.startswith("a worker cannot work: ") and notice.endswith("its disk is full")
        for notice in notices
    )


def test_a_worker_with_other_weights_is_left_out(
    photos: Path, tmp_path: Path, pool: LocalPool
) -> None:
    def other_weights(worker: int, shard: int, message: Message) -> Message:
        if isinstance(message, Loaded) and worker == 1:
            return dataclasses.replace(
                message, record=dataclasses.replace(message.record, weights_sha256="00" * 32)
            )
        return message

    pool.fault = other_weights
    _, notices = on_cluster(photos, tmp_path / "x.h5")
    assert any("has weights 000000000000…, not " in notice for notice in notices)
    assert {worker for worker, method, _ in pool.calls if method == "work"} == {0}


def test_other_versions_of_libraries_are_told_once(
    photos: Path, tmp_path: Path, pool: LocalPool
) -> None:
    def older(worker: int, shard: int, message: Message) -> Message:
        if isinstance(message, Loaded) and worker > 0:
            return dataclasses.replace(message, versions=message.versions | {"torch": "2.11"})
        return message

    pool.fault = older
    _, notices = on_cluster(photos, tmp_path / "x.h5", workers=3)
    (line,) = (notice for notice in notices if "on other machines" in notice)
    assert line.startswith("here: torch 2.11, on other machines ")


def test_what_no_worker_can_load_is_the_jobs_error(
    photos: Path, tmp_path: Path, pool: LocalPool
) -> None:
    error, _ = failure_of(photos, tmp_path / "x.h5", weights=str(tmp_path / "none.pth"))
    assert "none.pth: no such weights file" in error
    assert work_calls(pool) == []
    assert not folder_of(tmp_path / "x.h5").exists()


def test_a_cluster_without_room_is_named_with_what_was_asked(
    photos: Path, tmp_path: Path, pool: LocalPool
) -> None:
    pool.starts = lambda worker: False
    error, notices = failure_of(photos, tmp_path / "x.h5")
    there = "asked for 2 workers of 1 CPU each; the cluster has 2 CPUs"
    assert error == f"no worker could start within 0.2 s: {there}"
    assert f"no worker has started yet: {there}" in notices


def test_the_only_worker_that_has_started_tries_a_shard_again(
    photos: Path, tmp_path: Path, pool: LocalPool
) -> None:
    """Another one, which never comes, is not waited for."""
    failed: list[int] = []

    def fails_once(worker: int, shard: int, message: Message) -> Message:
        if shard == 2 and not failed and isinstance(message, Filled):
            failed.append(shard)
            return Failed("a passing fault")
        return message

    pool.starts, pool.fault = (lambda worker: worker == 0), fails_once
    last, _ = on_cluster(photos, tmp_path / "x.h5")
    assert last.done == 11
    assert work_calls(pool) == [1, 2, 3, 2]


def test_workers_that_end_while_they_start_end_the_job(
    photos: Path, tmp_path: Path, pool: LocalPool
) -> None:
    pool.fault = lambda worker, shard, message: Died("No module named 'pipeline'")
    error, _ = failure_of(photos, tmp_path / "x.h5")
    assert error == "a worker ended while it started: No module named 'pipeline'"
    assert pool.added <= 5


def test_a_damaged_shard_is_found_and_made_again(
    photos: Path, tmp_path: Path, pool: LocalPool
) -> None:
    def poison(worker: int, shard: int, message: Message) -> Message:
        return Died("killed") if shard == 3 else message

    extract_alone(photos, tmp_path / "alone.h5", precision="float32")
    pool.fault = poison
    failure_of(photos, tmp_path / "x.h5")
    path = folder_of(tmp_path / "x.h5") / "1-of-3.h5"
    where = open_cache(path).region("features").offset
    with path.open("r+b") as file:
        file.seek(where)
        file.write(b"\x01\x02")
    pool.fault, pool.calls = lambda worker, shard, message: message, []
    _, notices = on_cluster(photos, tmp_path / "x.h5")
    assert sorted(work_calls(pool)) == [1, 3]
    assert f"shard 1/3 is made again: {path}: 1 rows are damaged" in notices
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "alone.h5").read_bytes()


def test_a_job_goes_on_as_itself_only(photos: Path, tmp_path: Path, pool: LocalPool) -> None:
    def poison(worker: int, shard: int, message: Message) -> Message:
        return Died("killed") if shard == 3 else message

    pool.fault = poison
    failure_of(photos, tmp_path / "x.h5")
    for changes, what in (
        ({"batch_size": 2}, "--batch-size 4, not 2"),
        ({"captions": None}, "other captions, not those asked for"),
        ({"limit": 10}, "12 photos, not 10"),
        ({"precision": "bfloat16"}, "precision float32, not bfloat16"),
    ):
        error, _ = failure_of(photos, tmp_path / "x.h5", **changes)
        assert f"x.h5.shards: was begun with {what}. Use another --out, or --overwrite." in error
    with pytest.raises(CacheError, match="was begun with --ray-shards 3, not 2"):
        on_cluster(photos, tmp_path / "x.h5", shards=2)
    pool.fault, pool.calls = lambda worker, shard, message: message, []
    on_cluster(photos, tmp_path / "x.h5", shards=None, batch_size=None)  # as it was begun
    assert work_calls(pool) == [3]
    error, _ = failure_of(photos, tmp_path / "x.h5", captions=None)
    assert "x.h5: written with other captions, not those asked for" in error
    pool.calls = []
    on_cluster(photos, tmp_path / "x.h5", captions=None, overwrite=True)
    assert sorted(work_calls(pool)) == [1, 2, 3]
    assert len(open_cache(tmp_path / "x.h5").captions) == 0


def test_photos_that_changed_under_a_job_are_refused_and_overwrite_mends_it(
    photos: Path, tmp_path: Path, pool: LocalPool
) -> None:
    def stopped(worker: int, shard: int, message: Message) -> Message:
        if shard == 3:
            return Died("killed")
        if shard == 2 and isinstance(message, Finished):
            (folder_of(tmp_path / "x.h5") / "2-of-3.h5").rename(
                folder_of(tmp_path / "x.h5") / "2-of-3.draft.h5"
            )
            return Died("killed")
        return message

    folder = tmp_path / "photos"
    for seed, letter in enumerate("abcdefghijkl"):
        write_photo(folder / f"{letter}.jpg", seed)
    pool.fault = stopped
    failure_of(folder, tmp_path / "x.h5", captions=None)
    write_photo(folder / "a.jpg", 98)  # of a finished shard
    write_photo(folder / "f.jpg", 99)  # of a draft
    pool.fault = lambda worker, shard, message: message
    error, notices = failure_of(folder, tmp_path / "x.h5", captions=None)
    assert "1 of 3 shards failed: 2/3" in error
    assert "have other bytes" in notices[-1]
    assert notices[-1].endswith("; --overwrite encodes the photos of such shards again")
    on_cluster(folder, tmp_path / "x.h5", captions=None, overwrite=True)
    extract_alone(folder, tmp_path / "alone.h5", captions=None, precision="float32")
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "alone.h5").read_bytes()


def test_a_second_job_in_the_same_place_is_refused(
    photos: Path, tmp_path: Path, pool: LocalPool
) -> None:
    with JobLock(folder_of(tmp_path / "x.h5")):
        error, _ = failure_of(photos, tmp_path / "x.h5")
    assert error.startswith(f"{tmp_path}/x.h5.shards: another `cap extract-features --ray` is at")
    assert f"(process {os.getpid()} of " in error
    assert not folder_of(tmp_path / "x.h5").exists()


def test_another_machines_lock_is_known_by_its_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where file locks do not reach from machine to machine."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    holder = JobLock(tmp_path, beat_s=0.1)
    with holder:
        assert LOCK_NAME in os.listdir(tmp_path)
        with pytest.raises(CacheError, match="another `cap extract-features --ray` is at work"):
            JobLock(tmp_path, beat_s=0.4, dead_s=5).__enter__()
        holder.check()
        # A machine that stood still for long finds that another one has taken over.
        record = json.loads((tmp_path / LOCK_NAME).read_text())
        (tmp_path / LOCK_NAME).write_text(json.dumps({**record, "token": "another"}))
        end = time.monotonic() + 10
        while not holder._lost and time.monotonic() < end:
            time.sleep(0.02)
        with pytest.raises(CacheError, match="another job has taken it over"):
            holder.check()
    assert (tmp_path / LOCK_NAME).exists()  # it is the other one's
    with JobLock(tmp_path, beat_s=0.02, dead_s=0.1):  # which is dead
        pass
    assert not tmp_path.exists()


def test_what_a_cluster_is_asked_for() -> None:
    small, large, gpus = Node(2, 0), Node(64, 0), Node(96, 8)
    for nodes, given, ask in (
        ([small], {}, Ask(1, 2, 0)),
        ([small], {"workers": 2}, Ask(2, 1, 0)),
        ([small], {"workers": 4}, Ask(4, 0.5, 0)),
        ([small], {"workers": 1000}, Ask(1000, 1, 0)),  # they do not fit, and will be told so
        ([large, large], {}, Ask(16, 8, 0)),
        ([small, large], {}, Ask(33, 2, 0)),
        ([large], {"workers": 3, "cpus": 5.0}, Ask(3, 5.0, 0)),
        ([gpus, gpus], {}, Ask(16, 12, 1)),
        ([Node(4, 0), gpus], {}, Ask(8, 12, 1)),  # a head without GPUs
        ([gpus], {"gpus": 0.5}, Ask(16, 6, 0.5)),
        ([gpus], {"gpus": 0.0}, Ask(12, 8, 0)),
        ([gpus], {"gpus": 16.0}, Ask(1, 1, 16.0)),
        ([], {}, Ask(1, 8, 0)),
    ):
        found = ask_for(nodes, **{"workers": None, "gpus": None, "cpus": None, **given})  # type: ignore[arg-type]
        assert found == ask, (nodes, given)
    assert str(Ask(2, 0.5, 0)) == "2 workers of 0.5 CPUs each"
    assert str(Ask(1, 12, 1)) == "1 worker of 1 GPU and 12 CPUs"


def test_shards_are_some_minutes_of_work_and_enough_for_all() -> None:
    assert shard_count(100_000_000, 256, 8, "cuda", None) == 200
    assert shard_count(100_000_000, 256, 64, "cuda", None) == 256
    assert shard_count(82_783, 16, 2, "cpu", None) == 9
    assert shard_count(300, 16, 2, "cpu", None) == 2
    assert shard_count(10, 16, 4, "cpu", None) == 1
    with pytest.raises(ShardError, match="--ray-shards 4: 33 photos are 3 batches of 16"):
        shard_count(33, 16, 2, "cpu", 4)


def test_options_of_a_cluster_need_one(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="--ray-workers needs --ray"):
        RayOptions(ray_workers=2)
    images = ["extract-features", "--images", photos, "--out", tmp_path / "x.h5"]
    _, err = cap(*images, "--cost-per-hour", "2", code=2)
    assert "--cost-per-hour needs --ray" in err
    for option in (["--update"], ["--shard", "1/2"], ["--dry-run"], ["--retry-unreadable"]):
        _, err = cap(*images, "--ray", "auto", *option, code=2)
        assert f"{option[0]} does not go with --ray" in err
    assert list(tmp_path.iterdir()) == []


def test_the_command_shows_shards_cost_and_json(
    photos: Path, tmp_path: Path, pool: LocalPool
) -> None:
    told = ["extract-features", "--images", photos, "--captions", photos / "captions.txt"]
    told += [*SMALL, "--batch-size", 4, "--ray", "auto", "--ray-shards", 3, "--cost-per-hour", 2]
    out, err = cap(*told, "--out", tmp_path / "x.h5")
    assert out.startswith(
        f"{tmp_path}/x.h5: 11 photos of 512 features x 1 views, 24 captions; 1 set aside; 12 new in"
    )
    assert out.endswith(", for 1.00\n")
    assert "3/3 shards, 1 set aside, cost so far 1.00" in err
    assert "e.jpg: not an image, or of an unknown format; set aside" in err
    found = json.loads(cap(*told, "--out", tmp_path / "y.h5", "--json")[0])
    assert (found["done"], found["new"], found["shards"], found["cost"]) == (11, 12, 3, 1.0)
    assert np.array_equal(
        open_cache(tmp_path / "x.h5").features, open_cache(tmp_path / "y.h5").features
    )
