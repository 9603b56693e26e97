"""Where a cache is written: who may write there, what is replaced, and what is left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cache.atomic import draft
from cache.create import size_bytes, size_text
from cache.merge import merge
from cache.record import CacheError
from cache.seal import write_seal
from cache.store import DONE, PENDING, open_cache
from cache.writer import check_place, new_cache, open_writer
from tests.cache.test_store import CAPTIONS, DIGESTS, FEATURES, fill
from tests.conftest import ROOT, skeleton


def test_a_second_writer_is_refused_and_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with open_writer(path, skeleton(CAPTIONS), library_versions={}):
        for overwrite in (False, True):
            with pytest.raises(CacheError, match="another process is writing it"):
                open_writer(path, skeleton(CAPTIONS), library_versions={}, overwrite=overwrite)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl; f = open({str(path)!r}, 'rb+'); fcntl.flock(f, fcntl.LOCK_EX);"
            "print('locked', flush=True); import time; time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"locked\n"
    with pytest.raises(CacheError, match="another process is writing it"):
        open_writer(path, skeleton(CAPTIONS), library_versions={})
    holder.kill()
    holder.communicate()
    open_writer(path, skeleton(CAPTIONS), library_versions={}).close()


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "below" / "x.h5"
    check_place(path)
    assert not (tmp_path / "new").exists()
    fill(path)
    assert names(path.parent) == ["x.h5"]
    merge([path], tmp_path / "other" / "y.h5")
    assert names(tmp_path / "other") == ["y.h5"]


def test_a_place_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").touch()
    for below in ("x.h5", "new/x.h5"):
        path = tmp_path / "captions.csv" / below
        for begin in (
            check_place,
            lambda p: open_writer(p, skeleton(CAPTIONS), library_versions={}),
        ):
            with pytest.raises(
                CacheError, match=r"/captions\.csv: is no folder, so nothing can be"
            ):
                begin(path)
    with pytest.raises(CacheError, match="is a folder"):
        open_writer(tmp_path, skeleton(CAPTIONS), library_versions={})


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with open_writer(path, skeleton(CAPTIONS), library_versions={}) as writer:
        writer.write(np.array([0]), FEATURES[:1], DIGESTS[:1])
        writer.flush()
        real, full = writer._fd, os.open("/dev/full", os.O_WRONLY)
        writer._fd = full
        with pytest.raises(CacheError, match=r"the disk is full.*what is done is kept"):
            writer.write(np.array([2]), FEATURES[2:], DIGESTS[2:])
        writer._fd = real
        os.close(full)
    with pytest.raises(CacheError, match=r"y\.h5: needs 8\.80 TB of disk, .* GB are free; make"):
        open_writer(
            path.with_name("y.h5"), skeleton([[]] * 4, feature_dim=2**40), library_versions={}
        )
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5"]
    assert open_cache(path, allow_pending=True).status.tolist() == [DONE, PENDING, PENDING]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def leave_a_draft(path: Path) -> Path:
    """What a writer that is killed leaves; the folder."""
    code = """
import os, sys
from pathlib import Path
from cache.atomic import draft
with draft(Path(sys.argv[1])) as file:
    file.write_bytes(b"half a cache" * 1000)
    print(file.parent)
    sys.stdout.flush()
    os._exit(9)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return Path(run.stdout.strip())


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    left = leave_a_draft(tmp_path / "x.h5")
    assert names(left) == ["file", "lock"]
    other = leave_a_draft(tmp_path / "other.h5")
    fill(tmp_path / "x.h5")
    fill(tmp_path / "y.h5")
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "y.h5").read_bytes()
    assert names(tmp_path) == [other.name, "x.h5", "y.h5"]
    leave_a_draft(tmp_path / "x.h5")  # while it was to be replaced
    fill(tmp_path / "x.h5")
    assert names(tmp_path) == [other.name, "x.h5", "y.h5"]


def test_files_of_the_user_beside_the_cache_are_not_touched(tmp_path: Path) -> None:
    own = ["x.h5.tmp", ".x.h5.tmp", ".x.h5.cap-notes", ".x.h5.cap-mine/lock", ".x.h5.cap-b/file"]
    for name in own:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("my notes")
    fill(tmp_path / "x.h5")
    with new_cache(tmp_path / "x.h5", skeleton(CAPTIONS), library_versions={}, overwrite=True):
        pass
    assert [(tmp_path / name).read_text() for name in own] == ["my notes"] * 5
    assert len(names(tmp_path)) == 6


def test_a_draft_being_written_is_respected(tmp_path: Path) -> None:
    with draft(tmp_path / "x.h5") as file:
        file.write_text("of another writer")
        with pytest.raises(CacheError, match=r"x\.h5: another process is writing it"):
            open_writer(tmp_path / "x.h5", skeleton(CAPTIONS), library_versions={})
        assert file.read_text() == "of another writer"
    assert names(tmp_path) == []


@pytest.mark.parametrize("links", [True, False])
def test_of_two_that_make_the_same_cache_the_second_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """The first one gets its file while the second is still making its own."""
    made = skeleton(CAPTIONS)
    first = []

    def meanwhile(fd: int, *rest: object) -> None:
        write_seal(fd, *rest)  # type: ignore[arg-type]
        monkeypatch.setattr("cache.create.write_seal", write_seal)
        monkeypatch.setattr("cache.place.remove_leftovers", lambda path: False)
        first.append(open_writer(tmp_path / "x.h5", made, library_versions={}))

    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:  # as on FAT
        monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr("cache.create.write_seal", meanwhile)
    with pytest.raises(CacheError, match="another process is writing it"):
        open_writer(tmp_path / "x.h5", made, library_versions={})
    first[0].write(np.array([0]), FEATURES[:1], DIGESTS[:1])
    first[0].close()
    assert open_cache(tmp_path / "x.h5", allow_pending=True).status[0] == DONE
    assert names(tmp_path) == ["x.h5"]


def test_overwrite_replaces_nothing_but_caches(tmp_path: Path) -> None:
    captions = tmp_path / "captions.csv"
    captions.write_text("image,caption\na.jpg,A dog\n")
    fill(tmp_path / "a.h5")
    for path in (captions, tmp_path / "empty", Path("/dev/null")):
        if path.name == "empty":
            path.touch()
        found = f"{path.name}: not a "
        with pytest.raises(CacheError, match=found):
            open_writer(path, skeleton(CAPTIONS), library_versions={}, overwrite=True)
        with pytest.raises(CacheError, match=found):
            merge([tmp_path / "a.h5"], path, overwrite=True)
        with pytest.raises(CacheError, match=found):
            check_place(path)
    assert captions.read_text() == "image,caption\na.jpg,A dog\n"
    assert not Path("/dev/null").is_file()
    (tmp_path / "a.h5").write_bytes((tmp_path / "a.h5").read_bytes()[:20_000])  # damaged
    open_writer(tmp_path / "a.h5", skeleton(CAPTIONS), library_versions={}, overwrite=True).close()
    assert len(open_cache(tmp_path / "a.h5", allow_pending=True)) == 3


@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_is_followed(tmp_path: Path, there: bool) -> None:
    """To a folder that may be on another disk."""
    big, link = tmp_path / "big", tmp_path / "x.h5"
    big.mkdir()
    if there:
        fill(big / "y.h5")
    link.symlink_to(Path("big") / "y.h5")
    check_place(link)
    with open_writer(link, skeleton(CAPTIONS), library_versions={}, overwrite=True) as writer:
        writer.write(np.arange(3), FEATURES, DIGESTS)
    fill(tmp_path / "part.h5")
    merge([tmp_path / "part.h5"], link, overwrite=True)
    assert link.is_symlink()
    assert open_cache(link).errors() == [("0001.jpg", "cannot decode (é)")]
    assert names(big) == ["y.h5"]


def test_a_link_to_itself_or_into_no_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.h5").symlink_to("x.h5")
    (tmp_path / "y.h5").symlink_to("no/y.h5")
    for name, reason in (("x.h5", "Too many levels"), ("y.h5", "no such folder")):
        with pytest.raises(CacheError, match=reason):
            open_writer(tmp_path / name, skeleton(CAPTIONS), library_versions={})


def test_inode_numbers_that_change_keep_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some network drives, where a file's number is another at each look."""
    monkeypatch.setattr(os.path, "samestat", lambda one, other: False)
    fill(tmp_path / "x.h5")
    with open_writer(tmp_path / "x.h5", skeleton(CAPTIONS), library_versions={}) as writer:
        assert writer.status[0] == DONE
    open_cache(tmp_path / "x.h5").load_features()
    assert names(tmp_path) == ["x.h5"]


@pytest.mark.parametrize("setting", ["TRUE", "FALSE", "BEST_EFFORT"])
def test_a_cache_can_be_made_however_hdf5_is_told_to_lock(tmp_path: Path, setting: str) -> None:
    code = """
import sys
from pathlib import Path
from tests.cache.test_store import fill
fill(Path(sys.argv[1]))
"""
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x.h5"],
        cwd=ROOT,
        env={**os.environ, "HDF5_USE_FILE_LOCKING": setting},
        check=True,
    )
    assert open_cache(tmp_path / "x.h5").status[0] == DONE


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (41_250_000, "41.2 MB"),
        (3_210_000_000, "3.21 GB"),
        (8_796_093_022_208, "8.80 TB"),
    ],
)
def test_sizes_have_the_unit_that_fits(size: int, text: str) -> None:
    assert size_text(size) == text


def test_the_size_is_known_before_the_file_is_made(tmp_path: Path) -> None:
    for made in (skeleton(CAPTIONS * 50), skeleton([[]]), skeleton([["a b"]] * 9, feature_dim=999)):
        open_writer(tmp_path / "x.h5", made, library_versions={}, overwrite=True).close()
        size = (tmp_path / "x.h5").stat().st_size
        assert size <= size_bytes(made) < size + (1 << 17)


def test_a_disk_that_lacks_little_says_how_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = size_bytes(skeleton(CAPTIONS))
    usage = type("Usage", (), {"free": needed - 1})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = rf"x\.h5: needs {needed:,} bytes of disk, {needed - 1:,} bytes are free; make room"
    with pytest.raises(CacheError, match=message):
        open_writer(tmp_path / "x.h5", skeleton(CAPTIONS), library_versions={})
    assert names(tmp_path) == []


def failing_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make os.fsync or os.fdatasync fail once, as Linux reports a lost write, then succeed."""
    real, calls = getattr(os, name), []

    def sync(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            raise OSError(5, "Input/output error")
        real(fd)

    monkeypatch.setattr(os, name, sync)


def test_rows_before_a_failed_sync_are_never_called_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.h5"
    writer = open_writer(path, skeleton(CAPTIONS), library_versions={})
    writer.write(np.array([0]), FEATURES[:1], DIGESTS[:1])
    writer.flush()
    writer.write(np.array([2]), FEATURES[2:], DIGESTS[2:])
    failing_once(monkeypatch, "fdatasync")
    failure = r"x\.h5: cannot write \(Input/output error\); what is done is kept, run the same"
    for work in (
        writer.flush,
        writer.flush,
        lambda: writer.write(np.array([2]), FEATURES[2:], DIGESTS[2:]),
        lambda: writer.set_unreadable(1, "broken", DIGESTS[1]),
        writer.close,
    ):
        with pytest.raises(CacheError, match=failure):
            work()
        assert writer.status.tolist() == [DONE, PENDING, PENDING]
    assert open_cache(path, allow_pending=True).status.tolist() == [DONE, PENDING, PENDING]
    with open_writer(path, skeleton(CAPTIONS), library_versions={}) as writer:  # the lock is free
        writer.write(np.array([1, 2]), FEATURES[1:], DIGESTS[1:])
    assert open_cache(path).status.tolist() == [DONE] * 3


def test_a_failed_sync_at_the_end_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = open_writer(tmp_path / "x.h5", skeleton(CAPTIONS), library_versions={})
    failing_once(monkeypatch, "fsync")
    with pytest.raises(CacheError, match=r"x\.h5: cannot write \(Input/output error\)"):
        writer.close()
    failing_once(monkeypatch, "fsync")
    with pytest.raises(CacheError, match=r"y\.h5: cannot write \(Input/output error\)"):
        open_writer(tmp_path / "y.h5", skeleton(CAPTIONS), library_versions={})
    assert names(tmp_path) == ["x.h5"]


def test_rows_of_a_file_that_was_cut_off_are_not_called_done(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    writer = open_writer(path, skeleton(CAPTIONS), library_versions={})
    writer.write(np.array([0]), FEATURES[:1], DIGESTS[:1])
    os.truncate(path, 20_000)
    for work in (writer.flush, writer.close):
        with pytest.raises(CacheError, match=r"x\.h5: 20,000 bytes, but .* has cut it off"):
            work()
    assert path.stat().st_size == 20_000
