"""A cache is continued only over the photos, and in the precision, that it was begun with."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from cache.store import DONE, PENDING, open_cache
from pipeline.encoder.errors import PrecisionError
from pipeline.extraction import digests
from pipeline.extraction import extract as extraction
from pipeline.extraction.extract import extract
from pipeline.extraction.fill import ExtractError, Progress
from pipeline.photos.drive.shortages import ShortageError
from pipeline.photos.photo_file import MAX_FILE_BYTES
from tests.conftest import write_photo
from tests.pipeline.test_extract import config, run


def begin(folder: Path, out: Path, **changes: object) -> None:
    """Extract one batch of four photos, then stop."""
    reports = extract(config(folder, out, **({"captions": None} | changes)))
    for report in reports:
        if isinstance(report, Progress) and report.new >= 4:
            break
    reports.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed in range(12):
        write_photo(tmp_path / "a" / f"{seed:02d}.jpg", seed)
        write_photo(tmp_path / "b" / f"{seed:02d}.jpg", 100 + seed)
    return tmp_path / "a"


@pytest.mark.parametrize("whole", [True, False])
def test_other_photos_under_the_same_names_are_refused_by_name(
    whole: bool, folder: Path, tmp_path: Path
) -> None:
    (run if whole else begin)(folder, tmp_path / "x.h5", captions=None)
    before = (tmp_path / "x.h5").read_bytes()
    count = 12 if whole else 4
    with pytest.raises(
        ExtractError,
        match=rf"x\.h5: {count} of {count} photos looked at .*\(first: .*b/00\.jpg\); --update",
    ):
        run(tmp_path / "b", tmp_path / "x.h5", captions=None)
    assert (tmp_path / "x.h5").read_bytes() == before


def test_a_photo_replaced_since_is_noticed_by_its_date(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no sample would find it, and where its own date is an old one."""
    run(folder, tmp_path / "x.h5", captions=None)
    newest_ns = max(path.stat().st_ctime_ns for path in folder.iterdir())
    os.utime(tmp_path / "x.h5", ns=(newest_ns, newest_ns))
    write_photo(folder / "07.jpg", 99)
    os.utime(folder / "07.jpg", (0, 0))
    monkeypatch.setattr(digests, "_SAMPLE_PHOTOS", 0)
    with pytest.raises(ExtractError, match=r"1 of 1 photos looked at .*\(first: .*a/07\.jpg\)"):
        run(folder, tmp_path / "x.h5", captions=None)


def test_photos_that_cannot_be_read_now_do_not_stop_a_resumed_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_allowed(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    begin(folder, tmp_path / "x.h5")
    monkeypatch.setattr(digests, "read_file", not_allowed)
    last, _ = run(folder, tmp_path / "x.h5", captions=None)
    assert (last.done, last.new) == (12, 8)


def test_a_shortage_of_the_machine_is_not_another_photo(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_descriptor(path: Path) -> bytes:
        raise OSError(24, "Too many open files")

    begin(folder, tmp_path / "x.h5")
    monkeypatch.setattr(digests, "read_file", no_descriptor)
    for changes in ({}, {"update": True}):
        with pytest.raises(ShortageError, match=r"\d\.jpg: cannot read \(Too many open files\)"):
            run(folder, tmp_path / "x.h5", captions=None, **changes)
    with pytest.raises(ShortageError, match=r"\d\.jpg: cannot read \(Too many open files\)"):
        run(folder, tmp_path / "y.h5", captions=None, reuse=tmp_path / "x.h5")
    assert not (open_cache(tmp_path / "y.h5", allow_pending=True).status != PENDING).any()


def test_an_interrupted_overwrite_goes_on_by_the_same_command(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "whole.h5", captions=None)
    run(folder, tmp_path / "x.h5", captions=None, limit=3)
    begin(folder, tmp_path / "x.h5", overwrite=True)
    last, notices = run(folder, tmp_path / "x.h5", captions=None, overwrite=True)
    assert last.new == 8
    assert notices == [
        f"going on with {tmp_path}/x.h5, which this command has begun; remove it to start afresh"
    ]
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    last, _ = run(folder, tmp_path / "x.h5", captions=None, overwrite=True)
    assert last.new == 12  # it was finished, so this is another command


@pytest.mark.parametrize("changes", [{"batch_size": 3}, {"image_size": 96}, {"images": "b"}])
def test_overwriting_replaces_what_another_command_has_begun(
    changes: dict[str, object], folder: Path, tmp_path: Path
) -> None:
    begin(folder, tmp_path / "x.h5")
    if "images" in changes:
        changes = {"images": tmp_path / "b"}
    last, _ = run(folder, tmp_path / "x.h5", captions=None, overwrite=True, **changes)
    assert last.new == 12


def test_a_cpu_makes_no_float16_cache(folder: Path, tmp_path: Path) -> None:
    for devices in ("cpu", "cpu,cpu"):
        with pytest.raises(PrecisionError, match=r"cpu: a CPU has no float16 .*; go on with a GPU"):
            run(folder, tmp_path / "x.h5", captions=None, precision="float16", device=devices)
    assert not (tmp_path / "x.h5").exists()


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
def test_a_cpu_does_not_go_on_with_a_gpus_float16_cache(
    devices: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as gpu:
        gpu.setattr(extraction, "check_device", lambda *_: None)
        reports = extract(config(folder, tmp_path / "x.h5", captions=None, precision="float16"))
        next(reports)
        reports.close()
    with pytest.raises(PrecisionError, match=r"cpu: a CPU has no float16 convolutions"):
        run(folder, tmp_path / "x.h5", captions=None, device=devices)
    assert not open_cache(tmp_path / "x.h5", allow_pending=True).status.any()


def test_a_shard_says_which_precision_the_others_need(folder: Path, tmp_path: Path) -> None:
    _, notices = run(folder, tmp_path / "1.h5", captions=None, shard=(1, 2))
    precision = open_cache(tmp_path / "1.h5").encoder.precision
    assert notices == [
        f"shard 1/2 is in {precision}, which `auto` chose on this machine; give the other shards "
        f"--precision {precision}, or they cannot be merged"
    ]
    _, notices = run(folder, tmp_path / "2.h5", captions=None, shard=(2, 2), precision=precision)
    assert not notices


def test_a_photo_readable_only_later_does_not_shift_the_batches_of_reuse(
    folder: Path, tmp_path: Path
) -> None:
    """It is set aside when it is looked up, and keeps its place in the batches."""
    run(folder, tmp_path / "old.h5", captions=None, limit=3)
    good = (folder / "01.jpg").read_bytes()
    os.truncate(folder / "01.jpg", MAX_FILE_BYTES + 1)  # a hole, which takes no room
    captions = tmp_path / "captions.csv"
    captions.write_text("".join(f"{seed:02d}.jpg,A photo\n" for seed in range(12)))
    settings = {"captions": captions, "reuse": tmp_path / "old.h5"}
    run(folder, tmp_path / "whole.h5", **settings)
    reports = extract(config(folder, tmp_path / "x.h5", **settings))
    for report in reports:
        if isinstance(report, Progress) and report.stage == "extracting" and report.new >= 4:
            break
    reports.close()
    (folder / "01.jpg").write_bytes(good)
    run(folder, tmp_path / "x.h5", **settings)
    whole, x = open_cache(tmp_path / "whole.h5"), open_cache(tmp_path / "x.h5")
    assert whole.errors() == x.errors() == [("01.jpg", "too large (537 MB)")]
    assert np.array_equal(whole.features[whole.status == DONE], x.features[x.status == DONE])
