from __future__ import annotations

import resource

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

from pipeline.photos.preprocessing import (
    BICUBIC,
    BILINEAR,
    IMAGENET,
    Preprocessing,
    empty_pixels,
    preprocess,
)
from pipeline.photos.views import parse_views
from tests.pipeline.test_decoding import BLUE, GREEN, QUADRANTS, RED, WHITE, corners, saved

FILTERS = BILINEAR, BICUBIC
HALF = (0.5, 0.5, 0.5)
CLIP = Preprocessing(
    BICUBIC, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)


def test_the_text_of_a_preprocessing_is_what_caches_have_always_recorded() -> None:
    assert str(IMAGENET) == "rgb, bilinear antialiased, imagenet mean and std"
    assert str(Preprocessing(BICUBIC)) == "rgb, bicubic antialiased, imagenet mean and std"
    half = "rgb, bilinear antialiased, mean 0.5 0.5 0.5, std 0.5 0.5 0.5"
    assert str(Preprocessing(BILINEAR, HALF, HALF)) == half


@pytest.mark.parametrize(
    "made", [IMAGENET, Preprocessing(BICUBIC), Preprocessing(BICUBIC, HALF, HALF), CLIP]
)
def test_the_text_of_a_preprocessing_makes_the_same_again(made: Preprocessing) -> None:
    assert Preprocessing.parse(str(made)) == made


@pytest.mark.parametrize(
    "text",
    [
        *("", "none", "rgb, lanczos antialiased, imagenet mean and std"),
        "rgb, bilinear antialiased, mean 0.5 0.5 nan, std 1.0 1.0 1.0",
        "rgb, bilinear antialiased, mean 0.5 0.5 x, std 1.0 1.0 1.0",
        "rgb, bilinear antialiased, mean 0.5 0.5 0.5, std 1.0 0.0 1.0",
        "rgb, bilinear antialiased, mean 0.485 0.456 0.406, std 0.229 0.224 0.225",  # has a name
        "rgb, bilinear antialiased, mean .5 .5 .5, std 1 1 1",
        "rgb, bilinear antialiased, imagenet mean and std, cropped",
    ],
)
def test_another_text_is_no_preprocessing(text: str) -> None:
    assert Preprocessing.parse(text) is None


@pytest.mark.parametrize("filter", FILTERS)
def test_resizing_is_pillows_with_antialiasing_to_one_level(filter: str) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (123, 217, 3), np.uint8)
    image = Image.fromarray(noise)
    expected = np.asarray(image.resize((64, 64), Image.Resampling[filter.upper()])).astype(int)
    pixels = (
        preprocess(saved(image, "PNG"), 64, filter=filter)[0].permute(1, 2, 0).numpy().astype(int)
    )
    assert abs(pixels - expected).max() <= 1
    assert (pixels != expected).mean() < 0.02


def test_views_show_what_their_names_say() -> None:
    data = saved(Image.fromarray(QUADRANTS), "PNG")
    views = parse_views("full,flip,center,center-flip,corners")
    pixels = preprocess(data, 32, views)
    assert pixels.shape == (8, 3, 32, 32)
    assert pixels.dtype == torch.uint8
    shown = {
        name: corners(view.permute(1, 2, 0).numpy())
        for name, view in zip(views, pixels, strict=True)
    }
    assert shown["full"] == [RED, GREEN, WHITE, BLUE]
    assert shown["flip"] == [GREEN, RED, BLUE, WHITE]
    assert shown["center"] == [RED, GREEN, WHITE, BLUE]
    assert shown["center-flip"] == [GREEN, RED, BLUE, WHITE]
    assert shown["top-left"][0] == RED
    assert shown["bottom-right"][2] == WHITE
    assert torch.equal(preprocess(data, 32, ("full",))[0], pixels[0])


def test_unknown_views_are_named() -> None:
    with pytest.raises(ValueError, match="unknown view 'top'"):
        parse_views("full,top")
    with pytest.raises(ValueError, match="named twice"):
        parse_views("corners,top-left")


@pytest.mark.parametrize("size", [32, 48])  # 48: no resize, a view is the photo itself
def test_pixels_are_written_in_place_and_nowhere_else(size: int) -> None:
    picture = np.random.default_rng(3).integers(0, 256, (48, 48, 3), np.uint8)
    data = saved(Image.fromarray(picture), "PNG")
    for names in ("full", "flip", "corners", "flip,full,center"):
        views = parse_views(names)
        batch = empty_pixels(3 * len(views), size).unflatten(0, (3, len(views)))
        batch.fill_(7)
        preprocess(data, size, views, batch[1])
        assert torch.equal(batch[1], preprocess(data, size, views))
        assert batch[0].eq(7).all()
        assert batch[2].eq(7).all()
        assert batch.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def by_the_whole_photo(
    photo: NDArray[np.uint8], size: int, name: str, filter: str
) -> NDArray[np.int64]:
    """A crop as it is cut of an ordinary photo: the whole photo resized first."""
    height, width = photo.shape[:2]
    short = round(size * 256 / 224)
    scale = short / min(height, width)
    sizes = max(size, round(height * scale)), max(size, round(width * scale))
    pixels = torch.from_numpy(photo).permute(2, 0, 1)[None]
    scaled = interpolate(pixels, sizes, mode=filter, antialias=True)[0]
    rest = sizes[0] - size, sizes[1] - size
    top, left = {
        "center": (rest[0] // 2, rest[1] // 2),
        "top-right": (0, rest[1]),
        "bottom-left": (rest[0], 0),
        "bottom-right": rest,
    }[name]
    crop = scaled[:, top : top + size, left : left + size]
    return crop.permute(1, 2, 0).numpy().astype(np.int64)


CROPS = ("center", "top-right", "bottom-left", "bottom-right")


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("shape", [(60, 80), (9, 288), (288, 9), (2, 64), (64, 64)])
def test_crops_of_ordinary_photos_keep_their_bits(shape: tuple[int, int], filter: str) -> None:
    photo = np.random.default_rng(5).integers(0, 256, (*shape, 3), np.uint8)
    pixels = preprocess(saved(Image.fromarray(photo), "PNG"), 32, CROPS, filter=filter)
    for name, view in zip(CROPS, pixels, strict=True):
        assert np.array_equal(view.permute(1, 2, 0), by_the_whole_photo(photo, 32, name, filter))


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("shape", [(9, 300), (300, 9), (1, 200), (200, 1), (61, 2001), (2500, 70)])
def test_crops_of_thin_photos_are_the_same_to_a_level(shape: tuple[int, int], filter: str) -> None:
    photo = np.random.default_rng(5).integers(0, 256, (*shape, 3), np.uint8)
    pixels = preprocess(saved(Image.fromarray(photo), "PNG"), 32, CROPS, filter=filter)
    for name, view in zip(CROPS, pixels, strict=True):
        differ = abs(view.permute(1, 2, 0).numpy() - by_the_whole_photo(photo, 32, name, filter))
        assert differ.max() <= 1, name
    center, flipped = preprocess(
        saved(Image.fromarray(photo), "PNG"), 32, ("center", "center-flip")
    )
    assert torch.equal(center.flip(2), flipped)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("shape", [(300, 9), (9, 300), (200, 1)])
def test_full_views_of_thin_photos_are_the_same_to_a_level_or_three(
    shape: tuple[int, int], filter: str
) -> None:
    photo = np.random.default_rng(5).integers(0, 256, (*shape, 3), np.uint8)
    data = saved(Image.fromarray(photo), "PNG")
    full, flipped = preprocess(data, 32, ("full", "flip"), filter=filter)
    pixels = torch.from_numpy(photo).permute(2, 0, 1)[None]
    expected = interpolate(pixels, (32, 32), mode=filter, antialias=True)[0]
    # Of tall ones the rows come first. Between the two, bicubic values beyond 0 and 255 are cut.
    assert (full.int() - expected.int()).abs().max() <= (1 if filter == BILINEAR else 3)
    assert torch.equal(full.flip(2), flipped)


@pytest.mark.parametrize("size", [(3_000_000, 1), (1, 3_000_000)])
def test_the_thinnest_photos_take_little(size: tuple[int, int]) -> None:
    """Resized whole, their crops would take 589 GB, and the full view of the tall one 2 GB."""
    data = saved(Image.new("RGB", size, (200, 0, 0)), "PNG")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pixels = preprocess(data, 224, ("full", *CROPS))
    assert pixels.permute(0, 2, 3, 1).eq(torch.tensor([200, 0, 0], dtype=torch.uint8)).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes
