from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache.atomic import WriteError, draft, write_atomically, write_text
from tests.cache.test_place import leave_a_draft


@pytest.fixture(params=[(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def expected_mode(request: pytest.FixtureRequest) -> Iterator[int]:
    """The mode of new files, under a umask."""
    umask, mode = request.param
    before = os.umask(umask)
    yield mode
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_gets_the_mode_of_new_files(tmp_path: Path, expected_mode: int) -> None:
    path = tmp_path / "x"
    write_text(path, "a")
    assert mode(path) == expected_mode

    def write_privately(temporary: Path) -> None:
        os.close(os.open(temporary.with_name("new"), os.O_CREAT | os.O_WRONLY, 0o600))
        temporary.with_name("new").replace(temporary)

    write_atomically(tmp_path / "y", write_privately)
    assert mode(tmp_path / "y") == expected_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_text(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(WriteError, match=r"x: cannot write \(No space left on device\)"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_a_killed_writer_left_is_removed_and_a_live_one_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x"
    left = leave_a_draft(path)
    assert left.is_dir()
    with draft(path) as live:
        live.write_text("of another writer")
        (tmp_path / ".x.cap-12345678").mkdir()  # killed before it had a lock
        write_text(path, "new")
        assert sorted(p.name for p in tmp_path.iterdir()) == [live.parent.name, "x"]
        assert live.read_text() == "of another writer"
        assert not left.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_temporary_names_are_nobody_elses(tmp_path: Path) -> None:
    for name in (".x.tmp", "x.tmp"):
        (tmp_path / name).write_text("my notes")
    write_text(tmp_path / "x", "new")
    assert [(tmp_path / name).read_text() for name in (".x.tmp", "x.tmp")] == ["my notes"] * 2


def test_many_writers_of_one_file_leave_a_whole_one(tmp_path: Path) -> None:
    path, errors = tmp_path / "x", []

    def write(letter: str) -> None:
        for _ in range(25):
            try:
                write_text(path, letter * 10_000)
                text = path.read_text()
                assert text == text[0] * 10_000
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "x").symlink_to(Path("disk") / "y")
    for text in ("new", "newer"):
        write_text(tmp_path / "x", text)
        assert (tmp_path / "x").is_symlink()
        assert (tmp_path / "disk" / "y").read_text() == text
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["y"]


def test_devices_and_folders_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("pipe", "null", "."):
        with pytest.raises(WriteError, match=r"cannot write \(not a regular file\)"):
            write_text(tmp_path / name, "x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_name_of_any_length_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)  # 254 bytes
    write_text(path, "x")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(WriteError, match=r"cannot write \(File name too long\)"):
        write_text(tmp_path / ("é" * 128), "x")
    assert len(list(tmp_path.iterdir())) == 1
