"""`--dry-run` says what a command would do, and writes nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cache.record import CacheError
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.plan import plan
from tests.conftest import write_photo
from tests.pipeline.test_cli import cap
from tests.pipeline.test_extract import config, run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten photos; x.h5 has the first eight."""
    for seed in range(10):
        write_photo(tmp_path / "photos" / f"{seed}.jpg", seed)
    run(tmp_path / "photos", tmp_path / "x.h5", captions=None, limit=8)
    return tmp_path / "photos"


def asked(folder: Path, out: str, **changes: object) -> ExtractConfig:
    return config(folder, folder.parent / out, captions=None, **changes)


def test_it_says_what_would_be_done_and_does_nothing(folder: Path, tmp_path: Path) -> None:
    before = (tmp_path / "x.h5").stat()
    for changes, what, to_encode in (
        ({"out": "y.h5"}, "would be made", 10),
        ({"out": "x.h5", "limit": 8}, "is finished", 0),
        ({"out": "x.h5", "overwrite": True}, "would be replaced", 10),
        (
            {"out": "x.h5", "update": True},
            "would be updated; 8 photos are known by name, 0 gone",
            2,
        ),
        (
            {"out": "y.h5", "reuse": tmp_path / "x.h5"},
            "would be made; 8 photos are known by name",
            2,
        ),
    ):
        found = plan(asked(folder, **changes))
        assert (found.what, found.to_encode) == (what, to_encode)
        assert (found.seconds is None) == (to_encode == 0)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["photos", "x.h5"]
    after = (tmp_path / "x.h5").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_the_disk_it_names_is_the_size_of_the_file(folder: Path, tmp_path: Path) -> None:
    named = plan(asked(folder, "y.h5")).new_bytes
    run(folder, tmp_path / "y.h5", captions=None)
    assert 0 <= named - os.stat(tmp_path / "y.h5").st_size < 1 << 17
    assert plan(asked(folder, "y.h5")).new_bytes == 0


def test_it_refuses_what_the_command_would_refuse(folder: Path) -> None:
    with pytest.raises(CacheError, match=r"x\.h5: written with 8 photos, not 10\. Use --update"):
        plan(asked(folder, "x.h5"))


def test_the_command_prints_it(folder: Path, tmp_path: Path) -> None:
    command = [
        "extract-features", "--images", folder, "--out", tmp_path / "y.h5", "--backbone",
        "resnet18", "--weights", "random", "--image-size", 64, "--dry-run",
    ]  # fmt: skip
    out, _ = cap(*command)
    lines = out.splitlines()
    assert lines[:2] == [f"{tmp_path}/y.h5: would be made", "photos      10, with 0 captions"]
    assert [line.split()[0] for line in lines[2:]] == ["to", "time", "disk"]
    found = json.loads(cap(*command, "--json")[0])
    assert (found["to_encode"], found["cache"]) == (10, f"{tmp_path}/y.h5")
    assert not (tmp_path / "y.h5").exists()
