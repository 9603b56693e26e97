"""The GPU's resize, run on the CPU thread by thread, gives the pixels of `preprocess`."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

from pipeline.photos.gpu.resize import ALIGNMENT, KERNELS, SOURCE, BatchResize, can_resize
from pipeline.photos.gpu.resize_tables import ResizeTable, resize_table
from pipeline.photos.preprocessing import BICUBIC, BILINEAR, preprocess
from pipeline.photos.views import VIEWS
from tests.gpu_stand_in import resize_kernels
from train.step.cuda.launch import Function, KernelError, compile_source

CPU = torch.device("cpu")
FILTERS = BILINEAR, BICUBIC
SIZES = [
    *[(1, 1), (1, 9), (9, 1), (2, 3), (17, 5), (31, 32), (33, 32), (64, 64), (97, 211)],
    *[(63, 65), (224, 224), (224, 300), (480, 640), (427, 640), (640, 359), (288, 32), (1000, 40)],
    *[(40, 1250)],
]


def photo(height: int, width: int) -> NDArray[np.uint8]:
    """Noise with flat and extreme parts, where rounding and clamping would show."""
    random = np.random.default_rng(height * 10_000 + width)
    pixels = random.integers(0, 256, (height, width, 3), np.uint8)
    pixels[: height // 3] = 255
    pixels[:, : width // 4] = 0
    pixels[height // 2 :, width // 2 :] |= 254
    return pixels


def applied(table: ResizeTable, rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Resize the first axis."""
    places = table.first[:, None] + np.arange(table.weights.shape[1])
    weights = table.weights.astype(np.int64)
    sums = np.einsum("nk,nk...->n...", weights, rows[places].astype(np.int64))
    half = 1 << (table.precision - 1)
    return np.asarray((sums + half) >> table.precision).clip(0, 255).astype(np.uint8)


def by_torch(pixels: NDArray[np.uint8], height: int, width: int, filter: str) -> NDArray[np.uint8]:
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    if batch.shape[2:] == (height, width):
        return pixels
    resized: torch.Tensor = interpolate(batch, (height, width), mode=filter, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def by_kernels(
    photos: list[NDArray[np.uint8]], size: int, views: tuple[str, ...], resize: BatchResize
) -> torch.Tensor:
    heights, widths = np.array([pixels.shape[:2] for pixels in photos]).T
    layout = resize.layout(heights, widths)
    assert (layout.kinds >= 0).all()
    memory = np.full(int(layout.photo_bytes.sum()) + 2 * ALIGNMENT, 77, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    starts = first + np.cumsum(layout.photo_bytes) - layout.photo_bytes
    for pixels, start, pitch in zip(photos, starts, layout.pitches, strict=True):
        rows = np.lib.stride_tricks.as_strided(memory[start:], pixels.shape, (pitch, 3, 1))
        rows[...] = pixels
    columns = torch.full((int(layout.column_bytes.sum()),), 99, dtype=torch.uint8)
    out = torch.full((len(photos), len(views), size, size, 3), 55, dtype=torch.uint8)
    places = out.data_ptr() + np.arange(len(photos)) * out[0].nbytes
    resize.resize(layout, starts + memory.ctypes.data, places, columns)
    return out.permute(0, 1, 4, 2, 3)


def by_preprocess(
    pixels: NDArray[np.uint8], size: int, views: tuple[str, ...], filter: str = BILINEAR
) -> torch.Tensor:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    return preprocess(file.getvalue(), size, views, filter=filter)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("out_length", [1, 2, 32, 224, 256])
@pytest.mark.parametrize("length", [1, 2, 3, 31, 32, 33, 100, 223, 224, 225, 640, 1999, 4001])
def test_tables_resize_an_axis_as_torch_does(length: int, out_length: int, filter: str) -> None:
    pixels = photo(length, 8)
    table = resize_table(length, out_length, filter)
    assert (table.first >= 0).all()
    assert (table.first + table.weights.shape[1] <= length).all()
    assert np.array_equal(applied(table, pixels), by_torch(pixels, out_length, 8, filter))


def test_an_axis_of_the_same_length_stays_as_it_is() -> None:
    table = resize_table(300, 300)
    assert table.first.tolist() == list(range(300))
    assert table.weights.shape == (300, 1)
    assert np.array_equal(applied(table, photo(300, 2)), photo(300, 2))


def test_the_bicubic_filter_is_pillows() -> None:
    """It has negative weights; Pillow's have more bits."""
    pixels = np.repeat(photo(90, 1), 40, axis=1)
    table = resize_table(90, 40, BICUBIC)
    assert (table.weights < 0).any()
    expected = np.asarray(Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC))
    assert np.abs(applied(table, pixels).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("size", [32, 64, 224, 288])
def test_a_batch_of_every_size_has_the_pixels_of_preprocess(size: int, filter: str) -> None:
    views = ("full",)
    photos = [photo(*shape) for shape in SIZES if can_resize(*shape, views)]
    assert len(photos) > 14
    resize = BatchResize(CPU, size, views, resize_kernels(), filter)
    for given, result in zip(photos, by_kernels(photos, size, views, resize), strict=True):
        assert torch.equal(result, by_preprocess(given, size, views, filter)), given.shape


@pytest.mark.parametrize("size", [33, 64, 75])
@pytest.mark.parametrize(
    "views", [VIEWS, VIEWS[::-1], ("flip",), ("center",), ("center-flip", "full"), ("top-right",)]
)
def test_every_view_has_the_pixels_of_preprocess(views: tuple[str, ...], size: int) -> None:
    photos = [photo(*shape) for shape in SIZES if can_resize(*shape, views)]
    assert len(photos) > 12
    pixels = by_kernels(photos, size, views, BatchResize(CPU, size, views, resize_kernels()))
    for given, result in zip(photos, pixels, strict=True):
        assert torch.equal(result, by_preprocess(given, size, views)), given.shape


@pytest.mark.parametrize("filter", FILTERS)
def test_all_views_of_the_usual_size(filter: str) -> None:
    photos = [photo(480, 640), photo(640, 427)]
    pixels = by_kernels(photos, 224, VIEWS, BatchResize(CPU, 224, VIEWS, resize_kernels(), filter))
    for given, result in zip(photos, pixels, strict=True):
        assert torch.equal(result, by_preprocess(given, 224, VIEWS, filter))


def test_a_gpus_way_of_launching_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    kernels = {
        name: Function(kernel.driver, name.encode(), CPU)
        for name, kernel in resize_kernels().items()
    }
    (pixels,) = by_kernels([photo(97, 211)], 64, VIEWS, BatchResize(CPU, 64, VIEWS, kernels))
    assert torch.equal(pixels, by_preprocess(photo(97, 211), 64, VIEWS))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_the_kernels_compile_for_a_gpu(architecture: str) -> None:
    if torch.version.cuda is None:
        pytest.skip("PyTorch without CUDA")
    pytest.importorskip("cuda.bindings.nvrtc")
    try:
        code = compile_source(SOURCE.read_text(encoding="utf-8"), architecture)
    except KernelError as error:
        if "nvrtcCreateProgram" in str(error):
            pytest.skip(f"no NVRTC: {error}")
        raise
    assert code.startswith(b"\x7fELF")
    assert all(name.encode() in code for name in KERNELS)


def test_sizes_are_forgotten_when_their_tables_fill_the_memory() -> None:
    """Also the sizes of a batch that needs more than there is."""
    views = ("full", "center")
    resize = BatchResize(CPU, 32, views, resize_kernels(), table_bytes=4096)
    random = np.random.default_rng(0)
    for _ in range(8):
        photos = [photo(*shape) for shape in random.integers(20, 60, (3, 2)).tolist()]
        pixels = by_kernels(photos, 32, views, resize)
        for given, result in zip(photos, pixels, strict=True):
            assert torch.equal(result, by_preprocess(given, 32, views))


def test_thin_photos_are_left_to_the_cpu() -> None:
    assert can_resize(32, 1024, VIEWS)
    assert can_resize(1024, 32, VIEWS)
    assert not can_resize(1025, 32, ("full",))
    assert can_resize(32, 1025, ("full", "flip"))
    assert not can_resize(32, 1025, ("full", "center"))
    resize = BatchResize(CPU, 32, ("full",), resize_kernels())
    layout = resize.layout(np.array([40, 2000]), np.array([40, 40]))
    assert (layout.kinds >= 0).tolist() == [True, False]
