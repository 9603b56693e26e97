"""What a JPEG's segments say before its pixels: size, kind, colours, orientation. Without Pillow,
which takes many times as long and holds Python's lock, which all decoding threads share.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

# Markers of segments.
_BASELINE, _HUFFMAN, _JPG, _ARITHMETIC, _END, _PIXELS = 0xC0, 0xC4, 0xC8, 0xCC, 0xD9, 0xDA
_QUANTIZATION, _APP0, _APP1, _APP2, _APP13, _APP14, _APP15 = (
    0xDB,
    0xE0,
    0xE1,
    0xE2,
    0xED,
    0xEE,
    0xEF,
)
_SKIPPED = frozenset((_ARITHMETIC, 0xDC, 0xDD, 0xDF, 0xFE))  # lines, restarts, comments, …
_FRAMES = frozenset(range(0xC0, 0xD0)) - {_HUFFMAN, _JPG, _ARITHMETIC}
_PROGRESSIVE = frozenset((0xC2, 0xC6, 0xCA, 0xCE))

_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_ORIENTATION, _X_RESOLUTION = 0x0112, 0x011A  # tags of TIFF
_SHORT, _RATIONAL = 3, 5  # types of TIFF
# Bytes of one value of each of TIFF's types.
_BYTES_OF_TYPE = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4)

# Decoders in hardware have a smallest and a largest size. Photos beyond are rare.
_SIDES, _MOST_PIXELS = range(16, 8193), 1 << 26

_YCBCR_IDS = (1, 2, 3)
_NOT_SUBSAMPLED, _TWO_BY_TWO = ((1, 1),) * 3, ((2, 2), (1, 1), (1, 1))

_SEGMENT, _FRAME = struct.Struct(">BBH"), struct.Struct(">BHHB")


class JpegHeader(NamedTuple):
    """What the segments of a JPEG say.

    marker: of the frame, 0xC0 for a baseline JPEG. components: (id, horizontal, vertical sampling
    factor) of each. adobe_transform: None without Adobe's segment. orientation: what
    `getexif().get(0x0112, 1)` of Pillow gives, or None if only Pillow can tell. usual: one frame,
    whose pixels are in one scan, with tables of its own that a baseline JPEG may have.
    complete: the data ends with an end-of-image marker.
    """

    height: int
    width: int
    marker: int
    precision: int
    components: tuple[tuple[int, int, int], ...]
    adobe_transform: int | None
    orientation: int | None
    usual: bool
    complete: bool

    @property
    def progressive(self) -> bool:
        return self.marker in _PROGRESSIVE


def read_header(data: bytes | memoryview) -> JpegHeader | None:
    """Read the segments up to the pixels. None if this is no JPEG, or if they are out of order."""
    frame, marker, adobe = None, 0, -1
    exif, xmp = b"", None  # the contents of the segments of their names, joined as Pillow does
    described = strange = tables = deep = False
    frames = 0
    position = 2
    read = _SEGMENT.unpack_from
    try:
        if data[0] != 0xFF or data[1] != 0xD8:
            return None
        while True:
            start, kind, length = read(data, position)
            if start != 0xFF:
                return None
            if kind == _PIXELS:
                break
            if kind == _HUFFMAN:
                tables = True
            elif kind == _QUANTIZATION:
                if length == 67:  # one table of 8 bits, as nearly always
                    deep |= data[position + 4] > 15
                else:
                    deep |= _has_deep_table(data, position + 4, position + 2 + length)
            elif kind in _FRAMES:
                frame, marker = position + 4, kind
                frames += 1
                strange |= length != 8 + 3 * data[position + 9]
            elif kind == _APP1:
                described = True
                content = bytes(data[position + 4 : position + 2 + length])
                if content.startswith(_EXIF):
                    exif += content[6:] if exif else content
                elif content.startswith(_XMP):
                    xmp = content[len(_XMP) :]
            elif _APP0 <= kind <= _APP15:
                content = bytes(data[position + 4 : position + 2 + min(length, 16)])
                if kind == _APP14 and content.startswith(b"Adobe") and length >= 14:
                    adobe = content[11]
                strange |= _breaks_pillow(kind, content, length - 2)
                if kind == _APP13 and content.startswith(b"Photoshop 3.0\0"):
                    strange |= _photoshop_breaks_pillow(
                        bytes(data[position + 4 : position + 2 + length])
                    )
            elif kind not in _SKIPPED:
                strange = True
            position += 2 + length
        if frame is None:
            return None
        precision, height, width, count = _FRAME.unpack_from(data, frame)
        components = tuple(
            (data[at], data[at + 1] >> 4, data[at + 1] & 15)
            for at in range(frame + 6, frame + 6 + 3 * count, 3)
        )
        scanned = data[position + 4]
        complete = data[-2] == 0xFF and data[-1] == _END
    except (IndexError, struct.error):  # it ends before its pixels
        return None
    orientation: int | None = 1
    if described:
        strange |= frames != 1 or count not in (1, 3) or precision != 8
        orientation = None if strange else _orientation(exif, xmp)
    usual = frames == 1 and scanned == count and tables and not deep and not strange
    transform = None if adobe < 0 else adobe
    return JpegHeader(
        height, width, marker, precision, components, transform, orientation, usual, complete
    )


def gpu_size(header: JpegHeader | None) -> tuple[int, int] | None:
    """(height, width) of a photo that the decoder of a GPU turns into the CPU's very pixels.

    Those are baseline JPEGs of 8 bits, gray or YCbCr, with all colours or those of 2×2 pixels in
    one, upright and complete. Where chroma has half the columns alone, decoders differ by a level.
    None for other files, and for very small and very large ones.
    """
    if (
        header is None
        or header.marker != _BASELINE
        or header.precision != 8
        or header.orientation != 1
        or header.adobe_transform not in (None, 1)
        or not header.usual
        or not header.complete
        or header.height not in _SIDES
        or header.width not in _SIDES
        or header.height * header.width > _MOST_PIXELS
    ):
        return None
    sampling = tuple((across, down) for _, across, down in header.components)
    if len(sampling) == 3:
        ids = tuple(name for name, _, _ in header.components)
        if ids != _YCBCR_IDS or sampling not in (_NOT_SUBSAMPLED, _TWO_BY_TWO):
            return None
    elif sampling != ((1, 1),):
        return None
    return header.height, header.width


def _has_deep_table(data: bytes | memoryview, position: int, end: int) -> bool:
    """Whether a quantization table has 16 bits, or the segment is damaged."""
    while position < end and data[position] < 16:
        position += 65
    return position != end


def _breaks_pillow(kind: int, start: bytes, size: int) -> bool:
    """Whether Pillow cannot open a file with this segment, or does not call it a JPEG.

    start: the segment's first bytes; size: of all its bytes.
    """
    if kind == _APP0:
        return size < 7 and start.startswith(b"JFIF")
    if kind == _APP2:
        return start.startswith(b"MPF\0") or (size < 14 and start.startswith(b"ICC_PROFILE\0"))
    return kind == _APP14 and size < 7 and start.startswith(b"Adobe")


def _photoshop_breaks_pillow(content: bytes) -> bool:
    """Whether Photoshop's segment ends where Pillow expects the length of a name."""
    position = 14
    while content[position : position + 4] == b"8BIM" and position + 6 <= len(content):
        position += 6
        if position >= len(content):
            return True
        position += 1 + content[position]
        position += position & 1
        if position + 4 > len(content):
            return False
        position += 4 + int.from_bytes(content[position : position + 4], "big")
        position += position & 1
    return False


def _orientation(exif: bytes, xmp: bytes | None) -> int | None:
    """What Pillow makes of the contents of the segments; None where that is less than plain."""
    if exif:
        tags = exif[6:]
        found = _orientation_of_tiff(tags.removeprefix(_EXIF)) if tags else 0
        if found is None or found > 0:
            return found
    match = _XMP_ORIENTATION.search(xmp) if xmp else None
    return 1 if match is None or match[1] == b"1" else None  # not all versions of Pillow obey it


def _orientation_of_tiff(data: bytes) -> int | None:
    """The tag in TIFF's first directory; 0 without it, None if a reader might stop before it."""
    if data.startswith(b"II*\0"):
        order = "<"
    elif data.startswith(b"MM\0*"):
        order = ">"
    else:
        return None
    try:
        (start,) = struct.unpack_from(order + "L", data, 4)
        (count,) = struct.unpack_from(order + "H", data, start)
        end = start + 2 + 12 * count
        if end + 4 > len(data):
            return None
        found = 0
        for tag, kind, values, value in struct.iter_unpack(order + "HHL4s", data[start + 2 : end]):
            if not 0 < kind < len(_BYTES_OF_TYPE):
                return None
            size = values * _BYTES_OF_TYPE[kind]
            if size > 4:
                (offset,) = struct.unpack(order + "L", value)
                if offset + size > len(data):
                    return None
            if tag == _ORIENTATION:
                (found_here,) = struct.unpack_from(order + "H", value)
                if found or kind != _SHORT or values != 1 or not found_here:
                    return None
                found = found_here
            elif tag == _X_RESOLUTION and (kind != _RATIONAL or values != 1):
                return None  # Pillow computes with it
    except struct.error:
        return None
    return found
