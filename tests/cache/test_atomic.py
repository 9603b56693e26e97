from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache.atomic import WriteError, write_atomically, write_text


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

    (tmp_path / ".y.tmp").touch(0o400)  # left by a process that was killed
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
