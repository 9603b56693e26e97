from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.photos import decoding
from pipeline.photos.decoding import ImageError, decode
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


def heic(image: Image.Image, **options: object) -> bytes:
    """Without loss of colour at edges. An orientation in `exif` becomes a turn of the HEIC."""
    pillow_heif.register_heif_opener()
    return saved(image, "HEIF", quality=95, chroma=444, **options)


def test_heic_is_decoded_in_every_mode() -> None:
    picture = Image.fromarray(QUADRANTS)
    assert corners(decode(heic(picture))) == [RED, GREEN, WHITE, BLUE]
    assert decode(heic(picture)).shape == (40, 60, 3)
    assert (decode(heic(Image.new("RGBA", (16, 16), (0, 0, 0, 0)))) == 255).all()
    gray = decode(heic(Image.new("L", (16, 16), 100)))
    assert (abs(gray.astype(int) - 100) <= 2).all()


def test_heic_of_ten_bits_is_scaled_to_eight() -> None:
    levels = np.full((16, 16, 3), (65535, 25700, 0), np.uint16)
    file = io.BytesIO()
    pillow_heif.encode("RGB;16", (16, 16), levels.tobytes(), file, quality=95, chroma=444)
    assert pillow_heif.open_heif(file, convert_hdr_to_8bit=False).info["bit_depth"] == 10
    pixels = decode(file.getvalue()).astype(int)
    assert (abs(pixels - (255, 100, 0)) <= 3).all()


@pytest.mark.parametrize("data", [heic(Image.fromarray(QUADRANTS))[:-200], b"\0\0\0\x18ftypheic"])
def test_a_damaged_heic_has_a_reason(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"cannot decode \(.+\)|not an image"):
        decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "HEIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
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
    write = heic if kind == "HEIF" else partial(saved, kind=kind, quality=95)
    pixels = decode(write(stored, exif=exif.tobytes()))
    assert pixels.shape == (40, 60, 3)
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


def test_what_pillow_opens_besides_pictures_is_none() -> None:
    drawing = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    with pytest.raises(ImageError, match="not a picture, but EPS"):  # no program draws it
        decode(drawing)


def test_decoding_leaves_the_filters_of_warnings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of the whole process, and threads that change them undo each other's work."""
    monkeypatch.setattr("warnings.catch_warnings", None)
    assert decode(saved(Image.new("RGB", (8, 8), "red"), "PNG")).shape == (8, 8, 3)


@pytest.mark.parametrize("orientation", [None, 1])
def test_pillow_sees_only_jpegs_whose_orientation_is_not_plain(
    orientation: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = Image.fromarray(QUADRANTS)
    exif = Image.Exif()
    exif[0x0112] = orientation or 6
    data = saved(picture, "JPEG", exif=exif, comment=b"\xff\xe1 in a comment is no segment")
    monkeypatch.setattr(decoding, "open_picture", None)
    if orientation == 1:
        assert decode(data).shape == (40, 60, 3)
    else:
        with pytest.raises(ImageError, match="NoneType"):
            decode(data)
