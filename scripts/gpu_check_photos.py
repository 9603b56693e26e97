"""JPEGs of every kind, made on the spot, to compare two ways of decoding them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageCms

from pipeline.bench.jpegs import exif_with_orientation, photo_like, segment

END = b"\xff\xd9"
_SIZES = ((1, 1), (3, 2), (8, 8), (15, 17), (16, 16), (33, 40), (99, 75), (250, 333), (640, 427))
_SMALL_SIZES = _SIZES[:7]
_MIDDLE = (99, 75)
_HEADER_BYTES = 700  # of a small JPEG, before its pixels


def photos_of_every_kind(small: bool = False) -> dict[str, list[bytes]]:
    """Files by kind. small: without the larger photos."""
    random = np.random.default_rng(1)
    field = photo_like(random, 256 if small else 704)
    sizes = _SMALL_SIZES if small else _SIZES

    def picture(width: int = _MIDDLE[0], height: int = _MIDDLE[1]) -> NDArray[np.uint8]:
        top = random.integers(len(field) - height + 1)
        left = random.integers(len(field) - width + 1)
        return np.ascontiguousarray(field[top : top + height, left : left + width])

    def of_all_sizes(**options: Any) -> list[bytes]:
        return [pillow_jpeg(picture(*size), **options) for size in sizes]

    kinds = {
        sampling: [
            simplejpeg.encode_jpeg(picture(*size), 90, colorsubsampling=sampling) for size in sizes
        ]
        for sampling in ("444", "422", "420", "440", "411")
    }
    kinds["410"] = [flat_blocks_jpeg(*size, (4, 2), random) for size in sizes]
    kinds["gray"] = [pillow_jpeg(picture(*size)[..., 1]) for size in sizes]
    kinds["progressive"] = of_all_sizes(progressive=True)
    kinds["optimized tables"] = of_all_sizes(optimize=True)
    kinds["restart markers"] = of_all_sizes(restart_marker_blocks=3)
    kinds["restart markers, 420"] = of_all_sizes(restart_marker_rows=1, subsampling=2)
    kinds["cmyk"] = [pillow_jpeg(picture(), mode="CMYK")]
    kinds["rgb"] = [pillow_jpeg(picture(), keep_rgb=True)]
    plain = pillow_jpeg(picture())
    # Adobe's segment with transform 0: the three components are red, green and blue.
    kinds["adobe rgb"] = [with_segments(plain, segment(0xEE, b"Adobe\0\x64\0\0\0\0\0"))]
    kinds["exif orientation"] = [
        with_segments(plain, segment(0xE1, b"Exif\0\0" + exif_with_orientation(number)))
        for number in range(1, 9)
    ]
    kinds["xmp orientation"] = [
        with_segments(
            plain,
            segment(
                0xE1,
                b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/">'
                b'<rdf:Description tiff:Orientation="%d"/></x:xmpmeta>' % number,
            ),
        )
        for number in (1, 3, 6)
    ]
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    kinds["icc"] = of_all_sizes(icc_profile=profile)
    kinds["truncated"] = [data[: len(data) * k // 8] for data in (plain,) for k in range(4, 8)]
    kinds["truncated, with an end"] = [data + END for data in kinds["truncated"]]
    kinds["without an end"] = [plain[:-2]]
    kinds["more after the end"] = [plain + b"\0", plain + plain]
    kinds["a wrong size"] = list(_with_wrong_sizes(plain))
    return kinds


def corruptions(files: Sequence[bytes], count: int, seed: int = 2) -> list[bytes]:
    """`count` files with damage of one kind each, anywhere or in the header."""
    random = np.random.default_rng(seed)
    found: list[bytes] = []
    while len(found) < count:
        original = files[int(random.integers(len(files)))]
        data = np.frombuffer(original, np.uint8).copy()
        within = len(data) if random.random() < 0.5 else min(len(data), _HEADER_BYTES)
        start, length = int(random.integers(2, within)), int(random.integers(1, 64))
        damage = random.integers(6)
        if damage == 0:
            places = random.integers(2, within, random.integers(1, 9))
            data[places] = random.integers(0, 256, len(places))
        elif damage == 1:
            data[start] ^= 1 << random.integers(8)
        elif damage == 2:
            data[start : start + length] = 0
        elif damage == 3:
            data = np.delete(data, slice(start, start + length))
        elif damage == 4:
            data = np.insert(data, start, data[start : start + length])
        else:
            data = data[:start]
            if random.random() < 0.5:
                data = np.append(data, np.frombuffer(END, np.uint8))
        if (damaged := data.tobytes()) != original:
            found.append(damaged)
    return found


def pillow_jpeg(pixels: NDArray[np.uint8], mode: str = "", **options: Any) -> bytes:
    """pixels: (H, W, 3), or (H, W) for gray. options: of Pillow's JPEG writer."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(
        buffer, "JPEG", **{"quality": 90, "subsampling": 0, **options}
    )
    return buffer.getvalue()


def with_segments(data: bytes, segments: bytes) -> bytes:
    """A JPEG with more segments, behind its first, the JFIF segment."""
    return data[:20] + segments + data[20:]


def flat_blocks_jpeg(
    width: int, height: int, sampling: tuple[int, int], random: np.random.Generator
) -> bytes:
    """A JPEG of flat blocks with any sampling factors of luma, which encoders do not offer.

    Coefficients are steps of 16, of the first one only, between -8 and 8. Codes of the tables: of
    sizes 0 to 10 for differences, 4 bits each; of the end of a block, 1 bit. (ITU-T T.81, F.1.2)
    """
    across, down = sampling
    columns, rows = -(-width // (8 * across)), -(-height // (8 * down))
    bits: list[str] = []
    before = [0, 0, 0]
    for _ in range(columns * rows):
        for component in [0] * (across * down) + [1, 2]:
            value = int(random.integers(-8, 9))
            difference, before[component] = value - before[component], value
            size = abs(difference).bit_length()
            bits.append(f"{size:04b}")
            if size:
                shown = difference if difference > 0 else difference + (1 << size) - 1
                bits.append(f"{shown:0{size}b}")
            bits.append("0")
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    pixels = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")
    frame = b"\x08" + height.to_bytes(2, "big") + width.to_bytes(2, "big") + b"\x03"
    frame += bytes((1, across << 4 | down, 0, 2, 0x11, 0, 3, 0x11, 0))
    differences = bytes((0, 0, 0, 0, 11)[1:]) + bytes(12) + bytes(range(11))
    ends = bytes((1,)) + bytes(15) + b"\0"
    return b"".join(
        (
            b"\xff\xd8",
            segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0"),
            segment(0xDB, b"\0" + bytes((16,) * 64)),
            segment(0xC0, frame),
            segment(0xC4, b"\0" + differences),
            segment(0xC4, b"\x10" + ends),
            segment(0xDA, bytes((3, 1, 0, 2, 0, 3, 0, 0, 63, 0))),
            pixels,
            END,
        )
    )


def _with_wrong_sizes(data: bytes) -> Iterator[bytes]:
    """Headers that tell another height or width than was encoded."""
    frame = data.index(b"\xff\xc0") + 5
    for change in ((8, 0), (-8, 0), (0, 8), (0, -8), (1000, 0), (0, 1000)):
        changed = bytearray(data)
        for place, by in zip((frame, frame + 2), change, strict=True):
            told = int.from_bytes(data[place : place + 2], "big") + by
            changed[place : place + 2] = told.to_bytes(2, "big")
        yield bytes(changed)
