from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.photos.drive.shortages import ShortageError
from pipeline.photos.drive.silence import StalledError
from pipeline.photos.photo_file import file_digest, read_photo
from pipeline.photos.photo_loader import BatchRequest, LoadedBatch, PhotoLoader
from pipeline.photos.readers import start as starting
from pipeline.photos.readers.memory import Layout
from pipeline.photos.readers.processes import ReaderError
from pipeline.photos.readers.task import FileInMemory
from tests.conftest import ROOT, write_photo

VIEWS = ("full", "flip")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 photos: JPEGs, PNGs, one that is missing, one that is no photo and one that is huge."""
    for row in range(24):
        write_photo(tmp_path / f"{row:03d}.jpg", row, (40 + row, 30))
        with Image.open(tmp_path / f"{row:03d}.jpg") as photo:
            photo.save(tmp_path / f"{row:03d}.jpg", quality=90, subsampling=0)
    Image.new("RGB", (50, 40), "red").save(tmp_path / "003.jpg", "PNG")
    Image.new("RGB", (50, 40), "green").save(tmp_path / "002.jpg", subsampling=2)
    Image.new("RGB", (50, 40), "blue").save(tmp_path / "004.jpg", progressive=True)
    (tmp_path / "005.jpg").unlink()
    (tmp_path / "006.jpg").write_bytes(b"no photo")
    return tmp_path


def loader(folder: Path, count: int = 24, **options: object) -> PhotoLoader:
    rows = range(count)
    settings: dict[str, object] = {
        "batch_rows": 8, "image_size": 32, "views": VIEWS, "readers": 2, "processes": True,
    }  # fmt: skip
    return PhotoLoader(
        [BatchRequest(first, rows[first : first + 8]) for first in rows[::8]],
        lambda row: f"{folder}/{row % 24:03d}.jpg",
        **(settings | options),  # type: ignore[arg-type]
    )


def children(process: int) -> list[int]:
    try:
        names = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return list(map(int, names))


def servers() -> list[int]:
    """The processes that this process's readers are forked from."""
    found = []
    for process in children(os.getpid()):
        with contextlib.suppress(OSError):
            if b"readers.server" in Path(f"/proc/{process}/cmdline").read_bytes():
                found.append(process)
    return found


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def copied(photos: PhotoLoader) -> Iterator[LoadedBatch]:
    for batch in photos:
        yield replace(batch, pixels=batch.pixels.clone())
        photos.release(batch)


def load_all(photos: PhotoLoader, batches: Iterator[LoadedBatch]) -> list[int]:
    firsts = []
    for batch in batches:
        firsts.append(batch.first)
        photos.release(batch)
    return firsts


def test_processes_load_what_threads_do(folder: Path) -> None:
    with loader(folder, processes=False) as photos:
        expected = list(copied(photos))
    with loader(folder) as photos:
        found = list(copied(photos))
    wait_until(lambda: not servers())
    assert len(found) == 3
    for one, other in zip(found, expected, strict=True):
        assert one.first == other.first
        assert one.decoded == other.decoded
        assert torch.equal(one.pixels, other.pixels)
        assert one.pixels.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        assert one.errors == other.errors
        assert np.array_equal(one.digests, other.digests)
    assert expected[0].errors == {
        5: "file not found",
        6: "not an image, or of an unknown format",
    }


def test_rows_that_are_not_wanted_are_black(folder: Path) -> None:
    with PhotoLoader(
        [BatchRequest(0, [1, 2]), BatchRequest(8, [9]), BatchRequest(16, [16, 23])] * 3,
        lambda row: f"{folder}/{row:03d}.jpg",
        batch_rows=8, image_size=32, views=("full",), readers=2, processes=True, filter="bicubic",
    ) as photos:  # fmt: skip
        for batch in copied(photos):
            for place in range(8):
                path = folder / f"{batch.first + place:03d}.jpg"
                pixels = read_photo(path, 32, ("full",), filter="bicubic").pixels
                if batch.first + place in batch.decoded:
                    assert pixels is not None
                    assert torch.equal(batch.pixels[place], pixels)
                else:
                    assert not batch.pixels[place].any()


def test_files_that_a_gpu_can_decode_are_left_in_memory(folder: Path) -> None:
    with loader(folder, files=True) as photos:
        for batch in photos:
            for row in set(range(batch.first, batch.first + 8)) - {5}:
                path = folder / f"{row:03d}.jpg"
                digest = file_digest(path.read_bytes())
                assert np.array_equal(batch.digests[row - batch.first], digest)
                assert (row in batch.files) == (row not in (2, 3, 4, 5, 6))
                assert (row in batch.decoded) == (row in (2, 3, 4))
                if row in batch.files:
                    file = batch.files[row]
                    assert ctypes.string_at(file.address, file.length) == path.read_bytes()
                    assert (file.height, file.width) == (30, 40 + row)
            # A GPU may refuse them. Readers then decode them as ever.
            refused = sorted(batch.files)[::2]
            photos.decode(batch, refused)
            for row in refused:
                assert row not in batch.files
                assert row in batch.decoded
                pixels = read_photo(folder / f"{row:03d}.jpg", 32, VIEWS).pixels
                assert pixels is not None
                assert torch.equal(batch.pixels[row - batch.first], pixels)
            photos.release(batch)


def test_files_of_the_first_batch_may_be_decoded_as_well(folder: Path) -> None:
    with loader(folder, files=True, both=1) as photos:
        first, *others = [(set(batch.files), set(batch.decoded)) for batch in photos]
    assert first == ({0, 1, 7}, {0, 1, 2, 3, 4, 7})
    assert all(files and not decoded for files, decoded in others)


def test_a_file_that_is_too_large_for_its_slot_is_decoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout.of(8, VIEWS, 32, files=True, filter="bilinear")
    assert layout.slot_bytes >= layout.room_bytes >= 1 << 18
    small = Layout(8, VIEWS, 32, room_bytes=1024, slot_bytes=1 << 15, filter="bilinear")
    monkeypatch.setattr(Layout, "of", lambda *_, **__: small)
    large, larger = folder / "010.jpg", folder / "012.jpg"
    Image.effect_noise((140, 140), 90).save(large, quality=90)
    Image.effect_noise((300, 300), 90).save(larger, quality=95)
    assert 8 * 1024 < large.stat().st_size < 1 << 15 < larger.stat().st_size
    files: dict[int, FileInMemory] = {}
    with loader(folder, files=True) as photos:
        for batch in photos:
            files |= batch.files
            for row, file in batch.files.items():
                data = (folder / f"{row:03d}.jpg").read_bytes()
                assert ctypes.string_at(file.address, file.length) == data
            assert (12 in batch.decoded) == (batch.first == 8)
    assert 12 not in files
    # 010 is in its slot, the others beside one another.
    assert files[10].address > min(files[row].address for row in (8, 9, 11, 13))


def test_a_killed_reader_is_one_line(folder: Path) -> None:
    message = (
        r"^a process that reads photos ended \(killed, perhaps because memory ran out\)( while it "
        r"read /.*jpg or one of the next)?; what is done is kept, run the same command again"
    )
    with loader(folder, 2400) as photos:
        batches = iter(photos)
        photos.release(next(batches))
        server = servers()[0]
        os.kill(children(server)[0], signal.SIGKILL)
        with pytest.raises(ReaderError, match=message):
            load_all(photos, batches)
    wait_until(lambda: not is_running(server))


def test_readers_end_with_their_parent(folder: Path) -> None:
    code = """
import sys
from tests.pipeline.test_readers import loader, children, servers
from pathlib import Path
photos = loader(Path(sys.argv[1]), files=True).__enter__()
next(iter(photos))
print(*servers(), *children(servers()[0]), flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    ) as parent:
        assert parent.stdout is not None
        processes = list(map(int, parent.stdout.readline().split()))
        assert len(processes) == 3
        os.kill(processes[1], signal.SIGSTOP)  # as if it hung in a dead drive
        parent.kill()
    wait_until(lambda: not any(map(is_running, processes)))


def test_readers_that_hang_are_a_stall_and_are_ended(folder: Path) -> None:
    with loader(folder, stall_s=0.5) as photos:
        batches = iter(photos)
        server = servers()[0]
        wait_until(lambda: len(children(server)) == 2)
        hanging = children(server)
        for reader in hanging:
            os.kill(reader, signal.SIGSTOP)
        with pytest.raises(StalledError, match=r"\d\d\d.jpg: nothing came from the disk for"):
            load_all(photos, batches)
    wait_until(lambda: not any(map(is_running, [server, *hanging])))


def test_a_shortage_in_a_reader_is_told(folder: Path) -> None:
    (folder / "012.jpg").unlink()
    (folder / "012.jpg").symlink_to("/proc/self/mem")  # reading it is an input/output error
    with loader(folder) as photos, pytest.raises(ShortageError, match=r"012\.jpg: cannot read \("):
        load_all(photos, iter(photos))


def test_ctrl_c_does_not_reach_readers(folder: Path) -> None:
    with loader(folder) as photos:
        batches = iter(photos)
        photos.release(next(batches))
        server = servers()[0]
        assert os.getpgid(server) != os.getpgid(0)
        for process in (server, *children(server)):
            os.kill(process, signal.SIGINT)
        assert len(load_all(photos, batches)) == 2


def test_readers_that_were_started_early_are_used(folder: Path) -> None:
    starting.start_early(2, "cpu")
    assert not starting._spare  # so few are threads
    starting.start_early(5, "cpu")
    wait_until(servers)  # its command line is seen a moment later
    server = servers()[0]
    with loader(folder, readers=5) as photos:
        assert servers() == [server]
        assert len(list(photos)) == 3
    wait_until(lambda: not servers())
    starting.start_early(6, "cpu")
    starting.end_spare_readers()
    wait_until(lambda: not servers())
    code = "import sys, pipeline.photos.readers.start; print({'torch', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, text=True)
    assert done.stdout == "set()\n"


def test_a_budget_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import os, time
from pipeline.photos import memory_budget
memory_budget._LEAST_BYTES, memory_budget._SHARE_OF_MEMORY = 100, 0
memory_budget._FREE_SHARE = 0
memory_budget.share_budgets()
budget = memory_budget.pixel_budget()
assert budget.size_bytes == 100
children = []
for _ in range(4):
    child = os.fork()
    if not child:
        for size in (10, 60, 35, 100, 5, 300) * 20:
            with budget.reservation() as reservation:
                reservation.change(size)
                assert budget.used_bytes <= max(100, size)
        os._exit(0)
    children.append(child)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
assert (budget.used_bytes, budget.waiting) == (0, 0)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, text=True)
    assert done.stdout == "done\n", done.stderr
