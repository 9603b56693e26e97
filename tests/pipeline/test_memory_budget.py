from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.photos import photo_file
from pipeline.photos.decoding import decode
from pipeline.photos.memory_budget import MemoryBudget, file_budget, pixel_budget
from pipeline.photos.photo_file import read_photo
from tests.conftest import ROOT, write_photo
from tests.pipeline.test_decoding import saved


class Watched(MemoryBudget):
    """A budget that remembers the most that was reserved, and what was asked for."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(size_bytes)
        self.most = 0
        self.asked: list[int] = []

    def take(self, size: int) -> None:
        self.asked.append(size)
        super().take(size)
        self.most = max(self.most, self.used_bytes)


def in_threads(*work: object) -> None:
    threads = [threading.Thread(target=each, daemon=True) for each in work]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)


def test_threads_never_hold_more_than_the_budget() -> None:
    budget = Watched(100)
    held, most = [0], [0]
    lock = threading.Lock()

    def work() -> None:
        for size in (10, 60, 35, 100, 5) * 20:
            with budget.reservation() as reservation:
                reservation.change(size)
                with lock:
                    held[0] += size
                    most[0] = max(most[0], held[0])
                with lock:
                    held[0] -= size

    in_threads(*[work] * 6)
    assert most[0] <= 100
    assert budget.used_bytes == 0


def test_more_than_the_budget_is_had_alone_and_blocks_nobody() -> None:
    budget = Watched(100)

    def work() -> None:
        for size in (1_000, 10, 2_000):
            with budget.reservation() as reservation:
                reservation.change(size)

    in_threads(*[work] * 6)
    assert budget.most == 2_000  # nothing beside it
    assert budget.used_bytes == 0


def test_a_large_reservation_is_not_overtaken_for_ever() -> None:
    budget = MemoryBudget(100)
    order: list[str] = []
    small, large = budget.reservation(), budget.reservation()
    small.change(60)

    def take_large() -> None:
        large.change(90)
        order.append("large")
        large.change(0)

    def take_late() -> None:
        budget.take(10)
        order.append("late")

    first = threading.Thread(target=take_large, daemon=True)
    first.start()
    while not budget.waiting:
        first.join(0.001)
    second = threading.Thread(target=take_late, daemon=True)
    second.start()
    while budget.waiting < 2:
        second.join(0.001)
    small.change(0)
    first.join(20)
    second.join(20)
    assert order == ["large", "late"]


def test_an_error_gives_the_bytes_back() -> None:
    budget = MemoryBudget(100)
    reservation = budget.reservation()
    reservation.change(70)
    with pytest.raises(KeyError), reservation:
        raise KeyError
    assert budget.used_bytes == 0


@pytest.mark.parametrize(
    ("kind", "options", "per_pixel"),
    [
        ("JPEG", {}, 4),
        ("JPEG", {"progressive": True}, 10),
        ("PNG", {}, 12),
        ("WEBP", {}, 24),
    ],
)
def test_photos_reserve_by_their_pixels(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    options: dict[str, object],
    per_pixel: int,
) -> None:
    pixels, files = Watched(1), Watched(1)
    monkeypatch.setattr(photo_file, "pixel_budget", lambda: pixels)
    monkeypatch.setattr(photo_file, "file_budget", lambda: files)
    data = saved(Image.new("RGB", (40, 30), "red"), kind, **options)
    (tmp_path / "a").write_bytes(data)
    assert not read_photo(tmp_path / "a", 32, ("full",)).error
    assert pixels.asked == [40 * 30 * per_pixel]
    assert files.asked == [len(data)]
    assert pixels.used_bytes == files.used_bytes == 0


def test_a_turned_jpeg_reserves_for_pillow() -> None:
    budget, exif = Watched(1), Image.Exif()
    exif[0x0112] = 6
    with budget.reservation() as reservation:
        decode(saved(Image.new("RGB", (40, 30)), "JPEG", exif=exif), reservation)
    assert budget.asked == [40 * 30 * 12]


def test_what_is_reserved_covers_what_decoding_takes(tmp_path: Path) -> None:
    """In a process of its own, whose highest memory is that of one photo."""
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
    picture = Image.fromarray(noise).resize((2000, 2000))
    picture.save(tmp_path / "a.jpg")
    picture.save(tmp_path / "b.jpg", progressive=True, subsampling=0)
    picture.save(tmp_path / "c.png", compress_level=1)
    picture.convert("RGBA").save(tmp_path / "d.png", compress_level=1)
    code = """
import ctypes, re, sys
from pathlib import Path
from pipeline.photos.decoding import decode
from pipeline.photos.memory_budget import MemoryBudget
def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
class Asked(MemoryBudget):
    def take(self, size):
        self.size = size
        super().take(size)
for path in sorted(Path(sys.argv[1]).iterdir()):
    for round in range(2):  # first load what the format needs
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before, budget = kilobytes("VmRSS"), Asked(1)
        with budget.reservation() as reservation:
            decode(path.read_bytes(), reservation)
    print((kilobytes("VmHWM") - before) * 1024 <= budget.size + (2 << 20))
"""
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=ROOT
    )
    if "clear_refs" in result.stderr:
        pytest.skip("may not reset the memory's highest value here")
    assert result.stdout.split() == ["True"] * 4, result.stderr


def test_a_process_has_one_budget_of_at_least_two_gigabytes(tmp_path: Path) -> None:
    assert pixel_budget() is pixel_budget()
    assert pixel_budget() is not file_budget()
    assert pixel_budget().size_bytes >= 2 << 30
    write_photo(tmp_path / "a.jpg", 0)
    read_photo(tmp_path / "a.jpg", 32, ("full",))
    assert pixel_budget().used_bytes == file_budget().used_bytes == 0
