from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.photos import photo_file
from pipeline.photos.drive import silence
from pipeline.photos.drive.silence import Silence
from pipeline.photos.drive.witnesses import VanishedError, Witnesses
from pipeline.photos.memory_budget import MemoryBudget
from pipeline.photos.photo_loader import BatchRequest, PhotoLoader
from tests.conftest import write_photo


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(silence, "time", made)
    return made


def test_a_minute_without_a_photo_is_a_stall(clock: Clock) -> None:
    quiet = Silence(60.0)
    quiet.is_stall(7)
    for _ in range(60):
        clock.now += 1.0
        assert not quiet.is_stall(7)
    clock.now += 1.0
    assert quiet.is_stall(7)
    assert quiet.seconds == 61.0


def test_a_photo_ends_the_silence(clock: Clock) -> None:
    quiet = Silence(60.0)
    for photos in range(200):
        clock.now += 1.0
        assert not quiet.is_stall(photos // 50)


def test_time_while_suspended_is_no_silence(clock: Clock) -> None:
    quiet = Silence(60.0)
    for _ in range(29):
        clock.now += 3600.0
        assert not quiet.is_stall(0)
    assert quiet.seconds == 58.0


def loader(folder: Path, count: int, threads: int = 1) -> PhotoLoader:
    rows = range(count)
    return PhotoLoader(
        [BatchRequest(first, rows[first : first + 4]) for first in rows[::4]],
        lambda row: f"{folder}/{row:03d}.jpg",
        batch_rows=4,
        image_size=32,
        views=("full",),
        readers=threads,
    )


def test_photos_that_vanish_in_a_row_stop_the_run(tmp_path: Path) -> None:
    drive = tmp_path / "drive"
    drive.mkdir()
    for row in range(40):
        write_photo(drive / f"{row:03d}.jpg", row, (20, 20))
    seen: list[int] = []

    def load() -> None:
        for batch in photos:
            seen.append(batch.first)
            assert not batch.errors
            photos.release(batch)
            if batch.first == 4:  # at once, as when a drive is unmounted
                drive.rename(tmp_path / "elsewhere")

    with loader(drive, 40) as photos, pytest.raises(VanishedError, match=r"\d\.jpg: is gone,"):
        load()
    assert 4 in seen
    assert 36 not in seen


def test_photos_that_were_never_there_are_set_aside(tmp_path: Path) -> None:
    for row in (0, 1, 2, 30, 31):  # a share of the photos that a captions file names
        write_photo(tmp_path / f"{row:03d}.jpg", row, (20, 20))
    errors: dict[int, str] = {}
    with loader(tmp_path, 40, threads=3) as photos:
        for batch in photos:
            errors |= dict.fromkeys(range(batch.first, batch.first + 4), "") | batch.errors
            photos.release(batch)
    assert {row for row in errors if not errors[row]} == {0, 1, 2, 30, 31}
    assert {errors[row] for row in range(3, 30)} == {"file not found"}


def test_a_few_photos_may_be_removed_meanwhile(tmp_path: Path) -> None:
    for row in range(20):
        write_photo(tmp_path / f"{row:03d}.jpg", row, (20, 20))
    witnesses = Witnesses([range(20)], lambda row: f"{tmp_path}/{row:03d}.jpg")
    witnesses.look()
    for row in (0, 8, 9, 10, 19):
        (tmp_path / f"{row:03d}.jpg").unlink()
    for row in (0, 8, 9, 10, 19):
        witnesses.check(row)
    (tmp_path / "007.jpg").unlink()
    with pytest.raises(VanishedError, match=r"/009\.jpg: is gone, like the photos around it"):
        witnesses.check(9)


def test_a_large_run_has_few_witnesses(tmp_path: Path) -> None:
    asked = []

    def path_of(row: int) -> str:
        asked.append(row)
        return str(tmp_path)

    Witnesses([range(5_000), range(5_000, 10_000)], path_of).look()
    assert 256 <= len(asked) <= 512
    assert asked[0] == 0
    assert asked[-1] > 9_900


def test_threads_that_share_a_small_budget_load_every_photo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget below any photo, so that one is decoded at a time."""
    for row in range(24):
        write_photo(tmp_path / f"{row:03d}.jpg", row, (20, 20))
    budget = MemoryBudget(1)
    monkeypatch.setattr(photo_file, "pixel_budget", lambda: budget)
    with loader(tmp_path, 24, threads=4) as photos:
        decoded = {row for batch in photos for row in batch.decoded}
    assert decoded == set(range(24))
