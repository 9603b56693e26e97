from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.photos.preprocessing import empty_pixels, preprocess
from pipeline.photos.views import parse_views
from tests.pipeline.test_decoding import BLUE, GREEN, QUADRANTS, RED, WHITE, corners, saved


def test_resizing_is_pillows_antialiased_bilinear_to_one_level() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (123, 217, 3), np.uint8)
    image = Image.fromarray(noise)
    expected = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    pixels = preprocess(saved(image, "PNG"), 64)[0].permute(1, 2, 0).numpy().astype(int)
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
