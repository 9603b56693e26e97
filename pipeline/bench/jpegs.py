"""JPEGs to measure with: noise with the spectrum of photographs, in files like COCO's.

The shares and sizes below were counted in 199 photos of COCO val2017. The files repeat after as
many: 79 sizes, 163 kB on average, all with full colour resolution (4:4:4). COCO has no progressive
files, no 4:2:0 and, in this sample, none that has to be turned. People's own photos do, so a few
files of each kind are mixed in.
"""

from __future__ import annotations

import io
import shutil
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from cache.create import size_text
from cache.errors import CapError
from cache.share import cores

PERIOD = 199  # files after which the pictures repeat

# (width, height) of the photos, and how many of the 199 have it; the others differ from all.
_COMMON_SIZES = {
    (640, 480): 49,
    (640, 427): 16,
    (640, 426): 9,
    (500, 375): 9,
    (480, 640): 8,
    (640, 425): 7,
    (427, 640): 7,
    (375, 500): 6,
    (640, 428): 4,
    (500, 333): 4,
    (612, 612): 4,
    (428, 640): 3,
    (478, 640): 3,
    (640, 361): 2,
    (640, 464): 2,
    (640, 360): 2,
    (500, 400): 2,
}
_RARE_SIZES = (
    *((640, 303 + 9 * k) for k in range(38)),
    *((351 + 17 * k, 640) for k in range(16)),
    *((500, 303 + 25 * k) for k in range(8)),
)
# Bytes per pixel: the smallest, the nine deciles, the largest. 0.53 makes 163 kB of 640×480.
# Independent of the size, COCO's deciles would make 4% more; there, larger photos have fewer.
_BYTES_PER_PIXEL = (0.14, 0.33, 0.39, 0.44, 0.50, 0.56, 0.61, 0.67, 0.76, 0.85, 1.43)
MEAN_BYTES, BYTES_PER_PIXEL = 163_000, 0.53
# Colour profiles: lengths, and how many of the 199 photos have one of this length.
_ICC_BYTES = {3144: 57, 560: 15, 1320: 12, 8640: 2}
# Metadata (APP1): lengths from the least to the most. Nearly all are XMP.
_APP1_BYTES = (416, 800, 1088, 3175, 4867, 5531, 7878, 9066, 17443, 43729)
_APP1, _APP1_WITH_ICC = 23, 19
_GRAY = 1
_EXIF_ORIENTATIONS = (1, 6, 8)  # of the others; COCO's are all upright (1)
# Not from COCO: what people bring.
_SUBSAMPLED, _PROGRESSIVE = 10, 4

_FIELD_PIXELS = 1024
_DISTINCT = 64  # pictures of one size
_FREE_SHARE = 0.95  # of the disk's free bytes that may be used
_HEAD_BYTES = 20  # a JPEG's start and its JFIF segment, which has to come first
_DIGITS = 8


class BenchError(CapError):
    """Raised when something cannot be measured. The message is one line."""


@dataclass(frozen=True)
class _Kind:
    """What one picture's file is like."""

    width: int
    height: int
    bytes_per_pixel: float
    icc_bytes: int = 0
    xmp_bytes: int = 0
    orientation: int = 0  # EXIF's; 0 for a file without EXIF
    gray: bool = False
    subsampled: bool = False  # 4:2:0
    progressive: bool = False


def write_bench_photos(folder: Path, count: int, width: int, height: int) -> float:
    """Write `count` JPEGs of one size, `00000000.jpg` …, into `folder`; their mean size in bytes.

    They show 64 different pictures without metadata, but no two files have the same bytes. Raises
    BenchError if the disk is too small.
    """
    kind = _Kind(width, height, BYTES_PER_PIXEL)
    return _write(folder, [kind] * min(count, _DISTINCT), count)


def write_coco_like_photos(folder: Path, count: int) -> float:
    """Like `write_bench_photos`, but with COCO's mix of sizes, bytes and metadata."""
    return _write(folder, _coco_like_kinds()[:count], count)


def _coco_like_kinds() -> list[_Kind]:
    """The kinds of 199 files, in a random order, so that a few of them are a fair mix, too."""
    random = np.random.default_rng(0)

    def order() -> list[int]:
        places: list[int] = random.permutation(PERIOD).tolist()
        return places

    sizes = [size for size, count in _COMMON_SIZES.items() for _ in range(count)]
    sizes += _RARE_SIZES
    assert len(sizes) == PERIOD
    deciles = np.linspace(0, 1, len(_BYTES_PER_PIXEL))
    densities = np.interp((np.arange(PERIOD) + 0.5) / PERIOD, deciles, _BYTES_PER_PIXEL).tolist()
    kinds = [_Kind(*sizes[i], densities[j]) for i, j in zip(order(), order(), strict=True)]
    with_icc = [length for length, count in _ICC_BYTES.items() for _ in range(count)]
    places = order()
    for place, length in zip(places, with_icc, strict=False):
        kinds[place] = replace(kinds[place], icc_bytes=length)
    chosen = places[:_APP1_WITH_ICC]
    chosen += places[len(with_icc) : len(with_icc) + _APP1 - _APP1_WITH_ICC]
    for number, place in enumerate(random.permutation(chosen).tolist()):
        if number < len(_EXIF_ORIENTATIONS):
            kinds[place] = replace(kinds[place], orientation=_EXIF_ORIENTATIONS[number])
        else:
            length = _APP1_BYTES[number % len(_APP1_BYTES)]
            kinds[place] = replace(kinds[place], xmp_bytes=length)
    rest = order()
    for place in rest[:_GRAY]:
        kinds[place] = replace(kinds[place], gray=True)
    for place in rest[_GRAY : _GRAY + _SUBSAMPLED]:
        kinds[place] = replace(kinds[place], subsampled=True)
    for place in rest[-_PROGRESSIVE:]:
        kinds[place] = replace(kinds[place], progressive=True)
    return kinds


def _write(folder: Path, kinds: Sequence[_Kind], count: int) -> float:
    """Write `count` files, which go round the kinds; their mean size in bytes."""
    files = [(data[:_HEAD_BYTES], data[_HEAD_BYTES:]) for data in _encoded(kinds)]
    lengths = [len(head) + len(_comment(0)) + len(rest) for head, rest in files]
    rounds, others = divmod(count, len(files))
    total = rounds * sum(lengths) + sum(lengths[:others])
    free = shutil.disk_usage(folder).free
    if total > _FREE_SHARE * free:
        raise BenchError(
            f"{folder}: {count:,} photos take {size_text(total)}, but {size_text(free)} are free; "
            "ask for fewer, or set TMPDIR to a folder on a larger disk"
        )

    def write(number: int) -> None:
        head, rest = files[number % len(files)]
        with open(f"{folder}/{number:0{_DIGITS}d}.jpg", "wb", buffering=0) as file:
            file.write(b"".join((head, _comment(number), rest)))

    with ThreadPoolExecutor(cores()) as threads:
        for _ in threads.map(write, range(count)):
            pass
    return total / count


def _comment(number: int) -> bytes:
    """A comment that makes the bytes of a file its own."""
    return segment(0xFE, f"{number:0{_DIGITS}d}".encode())


def _encoded(kinds: Sequence[_Kind]) -> Iterator[bytes]:
    random = np.random.default_rng(0)
    largest = max(max(kind.width, kind.height) for kind in kinds)
    field = photo_like(random, max(_FIELD_PIXELS, largest + 64))
    qualities = np.arange(5, 99, 6)
    side = min(len(field), 512)
    densities = [len(_jpeg(field[:side, :side], int(q))) / side**2 for q in qualities]
    for kind in kinds:
        top = random.integers(field.shape[0] - kind.height + 1)
        left = random.integers(field.shape[1] - kind.width + 1)
        pixels = field[top : top + kind.height, left : left + kind.width]
        quality = round(float(np.interp(kind.bytes_per_pixel, densities, qualities)))
        data = _jpeg(pixels[..., 1] if kind.gray else pixels, quality, kind)
        yield data[:_HEAD_BYTES] + _metadata(kind) + data[_HEAD_BYTES:]


def photo_like(random: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """(size, size, 3): amplitudes fall with the frequency as in photographs (Field, 1987)."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = 1.0

    def layer(contrast: float) -> NDArray[np.float64]:
        noise = np.fft.rfft2(random.standard_normal((size, size))) / frequency
        noise[0, 0] = 0.0
        values: NDArray[np.float64] = np.fft.irfft2(noise, s=(size, size))
        values *= contrast / values.std()
        return values

    gray = layer(55.0)
    colours = [gray + layer(18.0) + 118.0 for _ in range(3)]
    return np.stack(colours, axis=2).clip(0, 255).astype(np.uint8)


def _jpeg(pixels: NDArray[np.uint8], quality: int, kind: _Kind | None = None) -> bytes:
    """A JPEG without metadata. pixels: (H, W, 3), or (H, W) for gray."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(
        buffer,
        "JPEG",
        quality=quality,
        subsampling=2 if kind is not None and kind.subsampled else 0,
        progressive=kind is not None and kind.progressive,
    )
    return buffer.getvalue()


def _metadata(kind: _Kind) -> bytes:
    """The segments with a picture's EXIF, XMP and colour profile."""
    segments = b""
    if kind.orientation:
        segments += segment(0xE1, b"Exif\0\0" + exif_with_orientation(kind.orientation))
    if kind.xmp_bytes:
        packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"></x:xmpmeta>'
        packet = b"XMP\0://ns.adobe.com/xap/1.0/\0" + packet  # COCO's; in others it is http://
        segments += segment(0xE1, packet.ljust(kind.xmp_bytes - 2))  # editors pad with blanks, too
    if kind.icc_bytes:
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        # No decoder looks into a profile, but all have to pass it by.
        profile = struct.pack(">I", kind.icc_bytes) + profile[4:].ljust(kind.icc_bytes - 4, b"\0")
        segments += segment(0xE2, b"ICC_PROFILE\0\1\1" + profile[: kind.icc_bytes])
    return segments


def exif_with_orientation(orientation: int) -> bytes:
    """A TIFF header and a directory with this one tag, as EXIF has it."""
    return struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
