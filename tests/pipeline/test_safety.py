"""Trouble with disks, drives and other processes: one clear line, and nothing is lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.errors import CapError
from cache.merge import merge
from cache.record import CacheError
from cache.store import open_cache
from cache.verify import verify
from cache.writer import open_writer
from pipeline.extraction import digests, encode_batches, reuse
from pipeline.extraction import extract as extraction
from pipeline.extraction.extract import extract
from pipeline.extraction.fill import ExtractError, Progress
from pipeline.photos import photo_file
from pipeline.photos.decoding import MAX_PIXELS
from pipeline.photos.drive.silence import StalledError
from pipeline.photos.drive.witnesses import VanishedError, Witnesses
from pipeline.photos.photo_file import ReadPhoto, file_digest, read_file
from pipeline.photos.photo_loader import PhotoLoader
from pipeline.photos.readers import threads
from tests.cache.test_place import leave_a_draft
from tests.conftest import ROOT, MakeCache, skeleton, write_photo
from tests.pipeline.test_extract import config, run
from train.config import Recipe, TrainConfig
from train.fit.reports import EpochLog
from train.fit.run import train


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_shows_before_the_first_photo(small_disk: Path, make_cache: MakeCache) -> None:
    path = small_disk / "x.h5"
    with pytest.raises(CacheError, match=r"x\.h5: needs 1\.7. MB of disk, 1\.0. MB are free"):
        open_writer(path, skeleton([[]] * 40, feature_dim=20_000), library_versions={})
    parts = [make_cache([["a"]] * 40, feature_dim=20_000, name="a.h5").path]
    with pytest.raises(CacheError, match=r"x\.h5: needs .* are free"):
        merge(parts, path)
    assert not list(small_disk.iterdir())


def test_what_a_killed_extraction_left_takes_no_room(small_disk: Path) -> None:
    made = skeleton([[]] * 40, feature_dim=8_000)  # 0.8 MB
    left = leave_a_draft(small_disk / "x.h5")
    (left / "file").write_bytes(bytes(700_000))
    open_writer(small_disk / "x.h5", made, library_versions={}).close()
    assert [path.name for path in small_disk.iterdir()] == ["x.h5"]


def test_once_begun_an_extraction_has_its_disk(small_disk: Path) -> None:
    """The rows fit, whatever else is then written to the disk."""
    made = skeleton([[]] * 40, feature_dim=8_000)
    with open_writer(small_disk / "x.h5", made, library_versions={}) as writer:
        with pytest.raises(OSError, match="No space left"), (small_disk / "big").open("wb") as big:
            big.write(bytes(1 << 21))
        rows = np.ones((40, 1, 8_000), np.float16)
        writer.write(np.arange(40), rows, np.ones((40, 16), np.uint8))
    assert verify(open_cache(small_disk / "x.h5"))[0].ok


@pytest.mark.parametrize(
    ("share", "of"), [(0.0, "last.cap"), (0.5, "last.cap"), (0.9, "checkpoint.pt")]
)
def test_a_disk_that_fills_up_during_training_is_one_line(
    share: float,
    of: str,
    small_disk: Path,
    make_cache: MakeCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk has room for a share of a file. The run can be resumed from its last checkpoint."""
    monkeypatch.setattr("train.fit.run.SAVE_PAUSE_S", 0.0)  # a checkpoint after every epoch
    cache = make_cache([["a dog runs", "a cat"], ["the dog", "a bird"]] * 3, feature_dim=8)
    recipe = Recipe(embedding_size=8, hidden_size=16, batch_size=8, epochs=2, min_count=1)
    asked = TrainConfig(from_cache=cache.path, out=small_disk / "run", recipe=recipe, device="cpu")
    reports = train(asked)
    for report in reports:
        if isinstance(report, EpochLog):
            break
    run_folder = small_disk / "run"
    before = (run_folder / "checkpoint.pt").read_bytes()
    assert len(before) > 2 * (run_folder / "last.cap").stat().st_size
    room = int(share * (run_folder / of).stat().st_size)
    (small_disk / "big").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - room))
    name = "checkpoint.pt" if of == "checkpoint.pt" else r"(best|last)\.cap"
    with pytest.raises(CapError, match=rf"run/{name}: cannot write \(.*No space left on device"):
        list(reports)
    assert (run_folder / "checkpoint.pt").read_bytes() == before
    assert not list(run_folder.glob(".*"))


def test_a_read_only_folder_is_one_line(small_disk: Path, photos: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CacheError, match=r"x\.h5: cannot write \(the folder is read-only\)"):
        run(photos, small_disk / "x.h5", weights="not even looked for")


def test_a_write_that_fails_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    """A limit on file sizes stands for a quota: rows behind it cannot be written."""
    code = """
import resource, sys
import numpy as np
from pathlib import Path
from cache.record import CacheError
from cache.writer import open_writer
from tests.conftest import skeleton
path = Path(sys.argv[1])
made = skeleton([[]] * 8, feature_dim=4096)
keys = np.ones((8, 16), np.uint8)
writer = open_writer(path, made, library_versions={})
writer.write(np.arange(4), np.ones((4, 1, 4096), np.float16), keys[:4])
limit = writer.cache.region("features").offset + 5 * 8192
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    writer.write(np.arange(4, 8), np.ones((4, 1, 4096), np.float16), keys[4:])
except CacheError as error:
    print(error)
writer.close()
try:
    open_writer(path.with_name("y.h5"), skeleton([[]] * 99, feature_dim=4096), library_versions={})
except CacheError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x.h5"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    write, create = result.stdout.splitlines()
    assert write == (
        f"{tmp_path}/x.h5: cannot write (File too large); what is done is kept, run the same "
        "command again to go on"
    )
    assert re.match(rf"{tmp_path}/y\.h5: needs \d\d\d kB of disk", create)
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5"]
    cache = open_cache(tmp_path / "x.h5", allow_pending=True)
    assert cache.status.tolist() == [1] * 4 + [0] * 4
    assert verify(cache)[0].ok


def test_a_second_process_is_refused_before_it_loads_anything(photos: Path, tmp_path: Path) -> None:
    reports = extract(config(photos, tmp_path / "x.h5"))
    next(report for report in reports if isinstance(report, Progress))
    with pytest.raises(CacheError, match=r"x\.h5: another process is writing it"):
        run(photos, tmp_path / "x.h5", weights="not even looked for")
    reports.close()


def test_photos_removed_or_changed_meanwhile_are_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for seed in range(60):
        write_photo(folder / f"{seed:02d}.jpg", seed)
    for report in extract(config(folder, tmp_path / "x.h5", captions=None)):
        if isinstance(report, Progress) and report.new == 4:
            (folder / "58.jpg").unlink()
            write_photo(folder / "59.jpg", 99)
            write_photo(folder / "00.jpg", 98)  # after it was read
    cache = open_cache(tmp_path / "x.h5")
    assert cache.errors() == [("58.jpg", "file not found")]
    result, _ = verify(
        cache, lambda path: file_digest(read_file(folder / path)), str(folder), sample=100
    )
    assert result.changed == ["00.jpg: the photo has changed since its features were extracted"]


@pytest.mark.parametrize("witnesses", [True, False])
def test_a_folder_that_vanishes_is_not_the_fault_of_its_photos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, witnesses: bool
) -> None:
    error: type[CapError] = VanishedError
    message = r"\d\.jpg: is gone, .*; what is done is kept, connect"
    if not witnesses:  # as in a folder of one or two photos
        monkeypatch.setattr(Witnesses, "check", lambda *_: None)
        error, message = ExtractError, "photos: the folder is gone; what is done is kept"
    folder, moved = tmp_path / "photos", tmp_path / "elsewhere"
    for seed in range(60):
        write_photo(folder / f"{seed:02d}.jpg", seed)
    run(folder, tmp_path / "whole.h5", captions=None)

    def extract_and_move() -> None:
        for report in extract(config(folder, tmp_path / "x.h5", captions=None)):
            if isinstance(report, Progress) and report.new == 4:
                folder.rename(moved)

    with pytest.raises(error, match=message):
        extract_and_move()
    moved.rename(folder)
    assert not open_cache(tmp_path / "x.h5", allow_pending=True).errors()
    run(folder, tmp_path / "x.h5", captions=None)
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_a_drive_that_stalls_is_one_line_and_the_run_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    for seed in range(40):
        write_photo(folder / f"{seed:02d}.jpg", seed)
    run(folder, tmp_path / "whole.h5", captions=None)
    back, real = threading.Event(), photo_file.read_photo

    def read_photo(place: str, *rest: Any) -> ReadPhoto:
        if Path(place).name >= "20.jpg":
            back.wait()
        return real(place, *rest)

    monkeypatch.setattr(threads, "read_photo", read_photo)
    monkeypatch.setattr(encode_batches, "PhotoLoader", partial(PhotoLoader, stall_s=2.0))
    started = time.monotonic()
    with pytest.raises(StalledError, match=r"2\d\.jpg: nothing came from the disk for \d s; what"):
        run(folder, tmp_path / "x.h5", captions=None)
    assert time.monotonic() - started >= 2
    back.set()
    done = open_cache(tmp_path / "x.h5", allow_pending=True)
    assert done.status[:16].all()
    assert not done.errors()
    run(folder, tmp_path / "x.h5", captions=None)
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    # The same while photos are looked up in an older cache.
    back.clear()
    monkeypatch.setattr(reuse, "digest_or_none", lambda path: [None, back.wait()][0])
    monkeypatch.setattr(digests, "STALL_S", 0.2)
    with pytest.raises(StalledError, match=r"photos: nothing came from the disk for \d s; what"):
        run(folder, tmp_path / "y.h5", captions=None, reuse=tmp_path / "x.h5")
    back.set()


def test_a_drive_that_stalls_from_the_start_leaves_nothing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = threading.Event()
    monkeypatch.setattr(threads, "read_photo", lambda *_, **__: [None, back.wait()][0])
    monkeypatch.setattr(extraction, "PhotoLoader", partial(PhotoLoader, stall_s=0.2))
    monkeypatch.setattr(extraction, "fast_precisions", lambda device: ("bfloat16", "float32"))
    with pytest.raises(StalledError, match=r"a\.jpg: nothing came from the disk for"):
        run(photos, tmp_path / "x.h5")
    back.set()
    assert not list(tmp_path.iterdir())


def png_of(width: int, height: int) -> bytes:
    """The start of a PNG that declares this size. A bomb needs no more than this header."""
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

    rows = zlib.compress(bytes(1 << 24), 9)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows)


def test_decompression_bombs_are_refused_before_they_take_memory(tmp_path: Path) -> None:
    """In a process that may take 100 MB more; the pictures would take 537 MB or more."""
    side = int(MAX_PIXELS**0.5) + 1
    for name, size in (("a.png", (side, side)), ("b.png", (65_000, 65_000))):
        (tmp_path / name).write_bytes(png_of(*size))
    code = """
import resource, sys
from pathlib import Path
from pipeline.photos import photo_file
from pipeline.photos.photo_file import read_photo
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 100_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sorted(Path(sys.argv[1]).glob("*.png")):
    print(read_photo(path, 64, ("full",)).error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert result.stdout.splitlines() == ["too large (a decompression bomb)"] * 2
