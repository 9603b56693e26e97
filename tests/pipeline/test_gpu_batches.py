"""Batches that a GPU decodes, with the CPU standing in for it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.photos.gpu.batches import DecoderError, GpuBatches, gpu_decoder
from pipeline.photos.gpu.decoder import GpuDecoder
from pipeline.photos.gpu.nvjpeg import NoHardwareError, NvjpegError
from pipeline.photos.photo_loader import LoadedBatch, _Loading
from tests.conftest import write_photo
from tests.gpu_stand_in import StandInDecoder, resize_kernels
from tests.pipeline.test_readers import VIEWS, loader

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 photos; some are missing, damaged, or of kinds that the hardware does not decode."""
    for row in range(24):
        write_photo(tmp_path / f"{row:03d}.jpg", row, (40 + row, 30 + row))
        with Image.open(tmp_path / f"{row:03d}.jpg") as photo:
            photo.save(tmp_path / f"{row:03d}.jpg", quality=90, subsampling=0)
    Image.new("RGB", (50, 40), "red").save(tmp_path / "003.jpg", "PNG")
    Image.new("RGB", (50, 40), "green").save(tmp_path / "002.jpg", subsampling=2)
    Image.new("RGB", (50, 40), "blue").save(tmp_path / "011.jpg", progressive=True)
    (tmp_path / "005.jpg").unlink()
    (tmp_path / "006.jpg").write_bytes(b"no photo")
    noise = tmp_path / "013.jpg"
    Image.effect_noise((90, 80), 90).convert("RGB").save(noise, quality=90, subsampling=0)
    half = noise.read_bytes()[:2000]
    noise.write_bytes(half + b"\xff\xd9")  # half a file with an end, as the header promises
    (tmp_path / "020.jpg").write_bytes(half)
    return tmp_path


class Wrong(StandInDecoder):
    """A decoder whose pixels are one level off in one photo."""

    def decode(self, *given: Any) -> int:
        status = super().decode(*given)
        address = int(given[2][0])
        ctypes.memset(address, ctypes.string_at(address, 1)[0] ^ 128, 1)
        return status


def maker(hardware: StandInDecoder) -> Callable[[], GpuDecoder]:
    return lambda: GpuDecoder(
        CPU, 32, VIEWS, batch_decoder=hardware, kernels=resize_kernels(), scratch_bytes=3 << 20
    )


def on_gpu(
    folder: Path, make: Callable[[], GpuDecoder], *, required: bool = False
) -> tuple[list[LoadedBatch], list[str]]:
    batches = GpuBatches(
        loader(folder, files=True, both=1), make,
        device=CPU, batch_rows=8, image_size=32, views=VIEWS, required=required,
    )  # fmt: skip
    found = []
    with batches:
        for batch in batches:
            found.append(replace(batch, pixels=batch.pixels.clone()))
            batches.release(batch)
    return found, batches.notices


def by_readers(folder: Path) -> list[LoadedBatch]:
    found = []
    with loader(folder, processes=False) as photos:
        for batch in photos:
            found.append(replace(batch, pixels=batch.pixels.clone()))
            photos.release(batch)
    return found


def check_same(found: list[LoadedBatch], expected: list[LoadedBatch]) -> None:
    assert [batch.first for batch in found] == [batch.first for batch in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.decoded == other.decoded
        assert one.errors == other.errors
        assert np.array_equal(one.digests, other.digests)
        assert torch.equal(one.pixels, other.pixels)


def test_a_gpu_gives_what_readers_give(folder: Path) -> None:
    hardware = StandInDecoder()
    found, notices = on_gpu(folder, maker(hardware))
    expected = by_readers(folder)
    check_same(found, expected)
    assert notices == []
    assert hardware.closed
    assert sum(hardware.batches) >= 17
    assert set(expected[0].errors) == {5, 6}
    assert 20 in expected[2].errors  # its end is missing: no GPU was asked


@pytest.mark.parametrize("status", [3, 6])
def test_readers_decode_what_a_gpu_refuses(folder: Path, status: int) -> None:
    hardware = StandInDecoder()
    hardware.status = status
    found, notices = on_gpu(folder, maker(hardware))
    check_same(found, by_readers(folder))
    assert notices == []


def test_wrong_pixels_end_decoding_on_the_gpu(folder: Path) -> None:
    hardware = Wrong()
    found, notices = on_gpu(folder, maker(hardware))
    check_same(found, by_readers(folder))
    assert notices == ["cpu: decoding on the CPU (1 of 4 photos came out otherwise on the GPU)"]
    assert len(hardware.batches) == 1
    assert hardware.closed
    with pytest.raises(DecoderError, match=r"^--decoder gpu: 1 of 4 photos came out otherwise"):
        on_gpu(folder, maker(Wrong()), required=True)


@pytest.mark.parametrize(
    ("error", "notices"),
    [
        (NoHardwareError("cuda:0 has no decoder for JPEGs"), []),
        (NvjpegError("no memory\nand more"), ["cpu: decoding on the CPU (no memory)"]),
        (torch.OutOfMemoryError("CUDA out"), ["cpu: decoding on the CPU (CUDA out)"]),
    ],
)
def test_without_a_decoder_readers_decode(
    folder: Path, error: Exception, notices: list[str]
) -> None:
    def make() -> GpuDecoder:
        raise error

    found, said = on_gpu(folder, make)
    check_same(found, by_readers(folder))
    assert said == notices
    with pytest.raises(DecoderError, match=r"; use --decoder cpu or auto$"):
        on_gpu(folder, make, required=True)


def test_a_decoder_that_fails_later_hands_over(folder: Path) -> None:
    class Fails(StandInDecoder):
        def decode(self, *given: Any) -> int:
            if self.batches:
                raise NvjpegError("nvjpegDecodeBatched: no memory")
            return super().decode(*given)

    found, notices = on_gpu(folder, maker(Fails()))
    check_same(found, by_readers(folder))
    assert notices == ["cpu: decoding on the CPU (nvjpegDecodeBatched: no memory)"]


def test_a_defect_is_raised_where_batches_are_taken(folder: Path) -> None:
    def make() -> GpuDecoder:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        on_gpu(folder, make)


def test_leaving_early_ends_everything(folder: Path) -> None:
    hardware = StandInDecoder()
    batches = GpuBatches(
        loader(folder, 2400, files=True), maker(hardware),
        device=CPU, batch_rows=8, image_size=32, views=VIEWS,
    )  # fmt: skip
    with batches:
        batches.release(next(iter(batches)))
    assert hardware.closed
    for thread in batches._threads:
        thread.join(20)
        assert not thread.is_alive()


def test_a_cpu_has_no_decoder_for_jpegs() -> None:
    assert gpu_decoder("auto", CPU, 224, ("full",)) is None
    assert gpu_decoder("cpu", CPU, 224, ("full",)) is None
    message = r"^--decoder gpu: a CPU has none; use --decoder cpu or auto$"
    with pytest.raises(DecoderError, match=message):
        gpu_decoder("gpu", CPU, 224, ("full",))


def test_readers_take_over_a_share_while_the_gpu_is_behind(folder: Path) -> None:
    photos = loader(folder, files=True)
    shares = []
    for waiting in (2, 2, 2, 0, 0, 1):
        photos._ahead.clear()
        photos._ahead.extend(_loading(set()) for _ in range(waiting))
        photos._ahead.append(_loading({1}))
        photos._adjust_share()
        shares.append(round(photos._share, 2))
    assert shares == [0.02, 0.04, 0.06, 0.02, 0.0, 0.0]
    photos._share = 0.25
    assert [photos._is_due() for _ in range(8)] == [False, False, False, True] * 2


def _loading(left: set[int]) -> _Loading:
    digests = np.zeros((0, 16), np.uint8)
    return _Loading(LoadedBatch(0, torch.empty(0), digests), left)
