"""What the machine lacks stops a run, and is never recorded as the fault of a photo."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cache.store import open_cache
from pipeline.photos import decoding, photo_file, preprocessing
from pipeline.photos.decoding import ImageError, decode
from pipeline.photos.drive.shortages import ShortageError, is_shortage
from pipeline.photos.photo_file import read_photo
from tests.conftest import write_photo
from tests.pipeline.test_decoding import saved
from tests.pipeline.test_extract import run

PNG = saved(Image.new("RGB", (8, 6), "red"), "PNG")


def pillow_runs_out(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def to_rgb(image: Image.Image) -> Image.Image:
        raise error

    monkeypatch.setattr(decoding, "_to_rgb", to_rgb)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        OSError("out of memory when reading image file"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("Memory allocation error: Unspecified"),
    ],
)
def test_a_lack_of_memory_is_not_the_photos_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    pillow_runs_out(monkeypatch, error)
    with pytest.raises(ShortageError, match=r"a\.png: cannot read \(.*emory\), which is not the"):
        read_photo(tmp_path / "a.png", 32, ("full",))


def test_torch_without_memory_is_not_the_photos_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(PNG)

    def too_much(*_: object) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(preprocessing, "_resize", too_much)
    with pytest.raises(ShortageError, match=r"a\.png: cannot read \(out of memory\), which is not"):
        read_photo(tmp_path / "a.png", 32, ("full",))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError(), r"^cannot decode \(ValueError\)$"),
        (RuntimeError("Memory allocation error: Security limit exceeded"), "Security limit"),
        (OSError("broken data stream when reading image file"), "broken data stream"),
    ],
)
def test_errors_of_the_file_stay_reasons(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    pillow_runs_out(monkeypatch, error)
    with pytest.raises(ImageError, match=reason):
        decode(PNG)


@pytest.mark.parametrize(
    ("number", "help_"),
    [
        (errno.EMFILE, "ulimit -n"),
        (errno.ENFILE, "end other programs"),
        (errno.ENOMEM, "more memory"),
        (errno.EIO, "replace the file"),
        (errno.ESTALE, "drive is connected"),
        (errno.ENOTCONN, "drive is connected"),
    ],
)
def test_the_message_says_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, help_: str
) -> None:
    def read_file(path: Path, *_: object) -> bytes:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(photo_file, "read_file", read_file)
    with pytest.raises(ShortageError, match=rf"1\.jpg: cannot read \(.*{help_}") as caught:
        read_photo(tmp_path / "1.jpg", 32, ("full",))
    assert "\n" not in str(caught.value)


def test_a_shortage_stops_the_run_and_the_next_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    for seed in range(3):
        write_photo(folder / f"{seed}.jpg", seed)
    real = photo_file.read_file
    short = [True]

    def read_file(path: str | Path, *args: object) -> bytes:
        if os.path.basename(path) == "1.jpg" and short[0]:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return real(path)

    monkeypatch.setattr(photo_file, "read_file", read_file)
    with pytest.raises(ShortageError, match=r"1\.jpg: cannot read \(Too many open files\)"):
        run(folder, tmp_path / "x.h5", captions=None)
    short[0] = False
    run(folder, tmp_path / "x.h5", captions=None)
    cache = open_cache(tmp_path / "x.h5")
    assert not cache.errors()
    assert cache.status.tolist() == [1, 1, 1]


def test_what_a_file_lacks_is_no_shortage() -> None:
    assert not is_shortage(PermissionError(errno.EACCES, "Permission denied"))
    assert not is_shortage(OSError(errno.ENXIO, "No such device or address"))  # a socket's file
    assert not is_shortage(ValueError("broken"))


@pytest.mark.filterwarnings("ignore")
def test_mutated_pictures_never_ask_for_the_machines_memory() -> None:
    """A file that asks for absurd amounts would stop every run as a shortage does."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
    for kind in ("PNG", "TIFF", "GIF", "WEBP", "PPM", "BMP", "JPEG2000"):
        original = np.frombuffer(saved(picture, kind), np.uint8)
        for _ in range(60):
            data = original.copy()
            places = rng.integers(0, min(len(data), 120), 3)
            data[places] = rng.integers(0, 256, 3)
            with contextlib.suppress(ImageError):
                assert decode(data.tobytes()).ndim == 3
