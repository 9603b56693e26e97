"""What a JPEG's segments say is what Pillow and libjpeg-turbo make of them."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipeline.photos import decoding
from pipeline.photos.decoding import ImageError, decode
from pipeline.photos.jpeg_header import gpu_size, read_header

ORIENTATION, MAKE, X_RESOLUTION, RESOLUTION_UNIT = 0x0112, 0x010F, 0x011A, 0x0128
SHORT, LONG, RATIONAL = 3, 4, 5
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)


def jpeg(pixels: np.ndarray = PIXELS, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def with_segments(*segments: bytes, jfif: bool = True) -> bytes:
    """A JPEG with these segments in front, after the usual first one or in its place."""
    data = jpeg()
    start = 2 + 2 + struct.unpack_from(">H", data, 4)[0]
    return (data[:start] if jfif else data[:2]) + b"".join(segments) + data[start:]


def exif(
    *entries: tuple[int, int, int, bytes], order: str = ">", count: int | None = None
) -> bytes:
    """APP1 with one directory. entries: (tag, type, count, four bytes)."""
    head = b"MM\0*\0\0\0\x08" if order == ">" else b"II*\0\x08\0\0\0"
    packed = b"".join(struct.pack(order + "HHL4s", *entry) for entry in entries)
    number = struct.pack(order + "H", len(entries) if count is None else count)
    return segment(0xE1, b"Exif\0\0" + head + number + packed + bytes(4))


def turned(value: int, order: str = ">") -> tuple[int, int, int, bytes]:
    return ORIENTATION, SHORT, 1, struct.pack(order + "H", value)


def xmp(text: bytes) -> bytes:
    return segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + text)


def pillows_orientation(data: bytes) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Image.open(io.BytesIO(data)).getexif().get(ORIENTATION, 1)
        except Exception as error:
            return error


def outcome(data: bytes) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return decode(data).tobytes()
        except ImageError as error:
            return str(error)


@pytest.fixture
def pillows_word(monkeypatch: pytest.MonkeyPatch) -> object:
    """What `decode` makes of a file where its header is not read, so that Pillow decides."""

    def word(data: bytes) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "read_header", lambda data: None)
            return outcome(data)

    return word


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("value", range(1, 9))
def test_the_orientation_is_read_where_cameras_write_it(value: int, order: str) -> None:
    make = (MAKE, 2, 4, b"Cam\0")
    rows = (0x0101, LONG, 1, struct.pack(order + "L", 24))
    for entries in ([turned(value, order)], [rows, make, turned(value, order)]):
        header = read_header(with_segments(exif(*entries, order=order)))
        assert header is not None
        assert header.orientation == value
    image = Image.fromarray(PIXELS)
    tags = Image.Exif()
    tags[ORIENTATION], tags[X_RESOLUTION], tags[MAKE] = value, 72.0, "A maker with a long name"
    file = io.BytesIO()
    image.save(file, "JPEG", exif=tags)
    header = read_header(file.getvalue())
    assert header is not None
    assert header.orientation == value == pillows_orientation(file.getvalue())


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        ((), 1),
        ((segment(0xE1, b"XMP\0: not the usual name"),), 1),
        ((segment(0xE1, b"Exif\0\0"),), 1),
        ((exif(),), 1),
        ((exif((MAKE, 2, 4, b"Cam\0")),), 1),
        ((xmp(b'<x tiff:Orientation="1"/>'),), 1),
        ((xmp(b"<tiff:Orientation>1</tiff:Orientation>"),), 1),
        ((xmp(b'tiff:Orientation="8"'), xmp(b"nothing")), 1),
        ((exif(turned(1)), xmp(b'tiff:Orientation="8"')), 1),
        ((xmp(b'tiff:Orientation="1"'), exif((MAKE, 2, 4, b"Cam\0"))), 1),
        ((segment(0xE1, exif(turned(5))[4:10] + exif(turned(5))[4:]),), 5),  # the name twice
        ((exif(turned(6))[:-4] + b"\0\0\0\0", segment(0xE1, b"Exif\0\0more")), 6),
        # Where Pillow alone can tell.
        ((xmp(b'<x tiff:Orientation="6"/>'),), None),
        ((xmp(b"<tiff:Orientation>3</tiff:Orientation>"),), None),
        ((xmp(b"nothing"), xmp(b'tiff:Orientation="8"')), None),
        ((xmp(b'tiff:Orientation="8"'), exif((MAKE, 2, 4, b"Cam\0"))), None),
        ((exif(turned(6), turned(3)),), None),
        ((exif(turned(0)),), None),
        ((exif((ORIENTATION, LONG, 1, b"\0\0\0\x06")),), None),
        ((exif((ORIENTATION, SHORT, 2, b"\0\x06\0\x06")),), None),
        ((exif((MAKE, 2, 900, b"\0\0\0\x08"), turned(6)),), None),
        ((exif((MAKE, 99, 1, bytes(4)), turned(6)),), None),
        ((exif(turned(6), count=9),), None),
        ((segment(0xE1, b"Exif\0\0no TIFF"),), None),
        ((exif(turned(1)), segment(0xE2, b"MPF\0")), None),
        ((exif(turned(1)), segment(0xEE, b"Adobe\0")), None),
        ((exif(turned(1)), segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04")), None),
        (
            (exif((X_RESOLUTION, 2, 1, b"5\0\0\0"), (RESOLUTION_UNIT, SHORT, 1, b"\0\x02\0\0")),),
            None,
        ),
    ],
)
def test_the_orientation_is_pillows_or_left_to_it(
    segments: tuple[bytes, ...], expected: int | None, pillows_word: object
) -> None:
    for jfif in (True, False):
        data = with_segments(*segments, jfif=jfif)
        header = read_header(data)
        assert header is not None
        assert header.orientation == expected
        if expected is not None:
            assert pillows_orientation(data) == expected
        assert outcome(data) == pillows_word(data)  # type: ignore[operator]
        if expected is not None and expected > 1:
            assert outcome(data) != outcome(jpeg())


def test_whatever_metadata_says_the_pixels_or_the_reason_are_pillows(pillows_word: object) -> None:
    """Damaged at random, and often where it matters."""
    random = np.random.default_rng(1)
    resolution = (
        (X_RESOLUTION, RATIONAL, 1, b"\0\0\0\x08"),
        (RESOLUTION_UNIT, SHORT, 1, b"\0\2\0\0"),
    )
    photoshop = segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\x038BI\0")
    upright = turned(1, "<")
    sources = [
        with_segments(exif(turned(6)), jfif=True),
        with_segments(exif(*resolution, turned(1)), jfif=False),
        with_segments(exif(upright, order="<"), xmp(b'tiff:Orientation="6"'), jfif=True),
        with_segments(exif((MAKE, 2, 9, b"\0\0\0\x0a")), xmp(b'tiff:Orientation="1"'), photoshop),
        with_segments(exif(turned(1)), exif(turned(3)), segment(0xE2, b"ICC_PROFILE\0\1\1")),
    ]
    known = seen = 0
    for source in sources:
        end = source.index(b"\xff\xda")
        for _ in range(400):
            data = bytearray(source)
            for place in random.integers(2, end, random.integers(1, 4)):
                data[place] = random.choice((0, 1, 2, 3, 6, 8, 255, int(random.integers(256))))
            header = read_header(bytes(data))
            expected = pillows_word(bytes(data))  # type: ignore[operator]
            if header is not None and header.orientation is not None:
                known += 1
                found = pillows_orientation(bytes(data))
                assert found == header.orientation or isinstance(found, UnidentifiedImageError)
            seen += 1
            assert outcome(bytes(data)) == expected, bytes(data[:end])
    assert seen / 4 < known < seen


def test_a_header_is_none_where_the_pixels_are_not_reached() -> None:
    data = with_segments(exif(turned(1)))
    whole = read_header(data)
    assert whole is not None
    end = data.index(b"\xff\xda")
    for length in range(len(data)):
        header = read_header(data[:length])
        if length <= end + 4:
            assert header is None
        else:
            assert header == whole._replace(complete=False)
    png = io.BytesIO()
    Image.fromarray(PIXELS).save(png, "PNG")
    assert read_header(png.getvalue()) is None
    assert read_header(data[:20] + b"\0" + data[20:]) is None
    assert read_header(memoryview(data)) == whole


def test_the_size_and_kind_are_those_of_the_frame() -> None:
    header = read_header(jpeg(subsampling=2))
    assert header is not None
    assert header[:5] == (24, 40, 0xC0, 8, ((1, 2, 2), (2, 1, 1), (3, 1, 1)))
    assert header.adobe_transform is None
    assert header.complete
    assert header.usual
    assert not header.progressive
    header = read_header(jpeg(progressive=True))
    assert header is not None
    assert header.progressive
    header = read_header(with_segments(segment(0xEE, b"Adobe\0d\0\0\0\0\1")))
    assert header is not None
    assert header.adobe_transform == 1


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize(
    "segments", [(), (exif(turned(1)),), (segment(0xE2, b"ICC_PROFILE\0\1\1"),)]
)
def test_usual_photos_may_go_to_the_gpu(segments: tuple[bytes, ...], subsampling: int) -> None:
    assert gpu_size(read_header(jpeg(subsampling=subsampling))) == (24, 40)
    assert gpu_size(read_header(with_segments(*segments))) == (24, 40)
    gray = jpeg(PIXELS[:, :, 0])
    assert gpu_size(read_header(gray)) == (24, 40)
    assert gpu_size(read_header(jpeg(restart_marker_blocks=2, optimize=True))) == (24, 40)


def not_for_the_gpu() -> dict[str, bytes]:
    plain = jpeg()
    frame = plain.index(b"\xff\xc0")
    colours = simplejpeg.encode_jpeg(np.ascontiguousarray(PIXELS), colorsubsampling="440")
    cmyk = io.BytesIO()
    Image.new("CMYK", (24, 40)).save(cmyk, "JPEG")
    table = plain.index(b"\xff\xdb")
    deep = segment(0xDB, b"\x10" + b"\0\1" * 64)
    return {
        "nothing": b"",
        "progressive": jpeg(progressive=True),
        "turned": with_segments(exif(turned(6))),
        "turned or not": with_segments(exif(turned(1), turned(6))),
        "cut": plain[:-2],
        "with more after its end": plain + b"\0",
        "4:2:2": jpeg(subsampling=1),
        "4:4:0": colours,
        "4:1:1": simplejpeg.encode_jpeg(np.ascontiguousarray(PIXELS), colorsubsampling="411"),
        "CMYK": cmyk.getvalue(),
        "RGB by Adobe": with_segments(segment(0xEE, b"Adobe\0d\0\0\0\0\0"), jfif=False),
        "RGB by its names": jpeg(keep_rgb=True),
        "extended": plain[: frame + 1] + b"\xc1" + plain[frame + 2 :],
        "of 12 bits": plain[: frame + 4] + b"\x0c" + plain[frame + 5 :],
        "without a height": plain[: frame + 5] + b"\0\0" + plain[frame + 7 :],
        "with tables of 16 bits": plain[:table] + deep + plain[table:],
        "tiny": jpeg(PIXELS[:15]),
        "long": jpeg(np.zeros((16, 8193), np.uint8)),
    }


@pytest.mark.parametrize("name", not_for_the_gpu())
def test_other_photos_stay_on_the_cpu(name: str) -> None:
    assert gpu_size(read_header(not_for_the_gpu()[name])) is None


def test_two_scans_or_no_tables_stay_on_the_cpu() -> None:
    header = read_header(jpeg())
    assert header is not None
    assert gpu_size(header._replace(usual=False)) is None
    data = jpeg()
    scan = data.index(b"\xff\xda")
    one_of_three = read_header(data[: scan + 4] + b"\1" + data[scan + 5 :])
    assert one_of_three is not None
    assert not one_of_three.usual
    tables = data.index(b"\xff\xc4")
    none = read_header(data[:tables] + data[scan:])
    assert none is not None
    assert not none.usual


def test_headers_of_sample_photos_are_pillows(sample_data: Path, pillows_word: object) -> None:
    photos = sorted((sample_data / "coco" / "val2017").iterdir())
    known = 0
    for path in [*photos, *sorted((sample_data / "odd").glob("*.jpg"))]:
        data = path.read_bytes()
        header = read_header(data)
        if header is None:
            continue
        assert header.orientation in (None, pillows_orientation(data)), path.name
        with Image.open(path) as image:
            assert (header.width, header.height) == image.size, path.name
        known += header.orientation is not None
        if header.orientation is None or b"\xff\xe1" in data[:65536]:
            assert outcome(data) == pillows_word(data), path.name  # type: ignore[operator]
    assert known > len(photos)
    assert all(gpu_size(read_header(path.read_bytes())) for path in photos)
