from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.photos.decoding import ImageError, _needs_pillow, decode
from pipeline.photos.preprocessing import preprocess

QUADRANTS = np.zeros((40, 60, 3), np.uint8)  # red | green over blue | white
QUADRANTS[:20, :30] = (255, 0, 0)
QUADRANTS[:20, 30:] = (0, 255, 0)
QUADRANTS[20:, :30] = (0, 0, 255)
QUADRANTS[20:, 30:] = 255


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def corners(pixels: NDArray[np.uint8]) -> list[tuple[int, ...]]:
    """The four corner colours, rounded to 0 or 255, clockwise from the top left."""
    height, width = pixels.shape[:2]
    return [
        tuple((pixels[y, x] > 127) * 255)
        for y, x in ((4, 4), (4, width - 5), (height - 5, width - 5), (height - 5, 4))
    ]


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_every_format_gives_upright_rgb(kind: str) -> None:
    pixels = decode(saved(Image.fromarray(QUADRANTS), kind))
    assert pixels.shape == (40, 60, 3)
    assert pixels.dtype == np.uint8
    assert corners(pixels) == [RED, GREEN, WHITE, BLUE]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = Image.fromarray(QUADRANTS)
    if orientation > 1:
        stored = stored.transpose(turn[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(saved(stored, "JPEG", exif=exif, quality=95))
    assert corners(pixels) == [RED, GREEN, WHITE, BLUE]


def test_plain_jpegs_decode_to_pillows_pixels() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    for options in ({"quality": 75}, {"quality": 95, "subsampling": 0}, {"progressive": True}):
        data = saved(Image.fromarray(noise), "JPEG", **options)
        assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data))))


def test_sample_photos_decode_to_pillows_pixels(sample_data: Path) -> None:
    for path in sorted((sample_data / "coco" / "val2017").iterdir())[:40]:
        expected = np.asarray(Image.open(path).convert("RGB"))
        assert np.array_equal(decode(path.read_bytes()), expected), path.name


def test_gray_cmyk_palette_alpha_and_sixteen_bits_become_rgb() -> None:
    gray = Image.fromarray(np.full((8, 8), 100, np.uint8))
    assert (decode(saved(gray, "JPEG")) == 100).all()
    assert (decode(saved(gray, "PNG")) == 100).all()
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = decode(saved(cmyk, "JPEG"))
    assert red[4, 4, 0] > 200
    assert red[4, 4, 1:].max() < 60
    palette = Image.fromarray(QUADRANTS).convert("P")
    assert corners(decode(saved(palette, "PNG"))) == [RED, GREEN, WHITE, BLUE]
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (decode(saved(clear, "PNG")) == 255).all()
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert (abs(decode(saved(half, "PNG")).astype(int) - 127) <= 1).all()
    deep = Image.fromarray(np.full((8, 8), 25700, np.uint16))
    assert (decode(saved(deep, "PNG")) == 100).all()
    bits = Image.new("1", (8, 8), 1)
    assert (decode(saved(bits, "PNG")) == 255).all()


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert tuple(decode(data)[4, 4]) == RED, kind


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"no image at all", "not an image, or of an unknown format"),
        (saved(Image.fromarray(QUADRANTS), "JPEG")[:400], "cannot decode .*(?i:truncated)"),
        (saved(Image.fromarray(QUADRANTS), "PNG")[:60], "cannot decode"),
        (saved(Image.new("1", (20_000, 20_000)), "PNG"), "too large"),
        (saved(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "floating-point"),
    ],
)
def test_what_is_no_picture_has_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode(data)


def test_odd_files_end_as_a_correct_picture_or_a_reason(sample_data: Path) -> None:
    reasons = {}
    for path in sorted((sample_data / "odd").iterdir()):
        try:
            assert preprocess(path.read_bytes(), 64).shape == (1, 3, 64, 64)
        except ImageError as error:
            reasons[path.name] = str(error)
    assert reasons.keys() == {
        "broken.png",
        "decompression_bomb.gif",
        "truncated.jpg",
        "zero_bytes.jpg",
    }
    upright = [
        decode((sample_data / "odd" / f"hopper_orientation_{n}.jpg").read_bytes()) for n in (3, 6)
    ]
    # The same portrait, stored in two orientations.
    assert abs(upright[0].astype(int) - upright[1].astype(int)).mean() < 12


def test_a_jpeg_says_by_its_segments_whether_pillow_must_look() -> None:
    picture = Image.fromarray(QUADRANTS)
    plain = saved(picture, "JPEG", comment=b"\xff\xe1 in a comment is no segment")
    exif = Image.Exif()
    exif[0x0112] = 6
    assert not _needs_pillow(plain)
    assert _needs_pillow(saved(picture, "JPEG", exif=exif))
    assert _needs_pillow(saved(picture, "PNG"))
    for length in range(600):  # cut anywhere, it ends, and Pillow has the word or the decoder fails
        _needs_pillow(plain[:length])
    assert _needs_pillow(plain[:200])
