"""Decoding: the bytes of an image file to RGB pixels at full size, upright."""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.photos.drive.shortages import is_shortage
from pipeline.photos.jpeg_header import JpegHeader, read_header
from pipeline.photos.memory_budget import MemoryBudget, Reservation

# Pillow's own threshold for a decompression bomb. Such an image takes 0.7 to 4 GB to decode.
MAX_PIXELS = 178_956_970

# Bytes per pixel that decoding takes at its peak, measured: by libjpeg-turbo, which holds the
# coefficients of a progressive JPEG beside the pixels, and by Pillow, with its copies.
# Transparency, 16 bits and decoders that hold a picture of their own take more.
_JPEG_BYTES, _PROGRESSIVE_BYTES, _PILLOW_BYTES, _PILLOW_MOST_BYTES = 4, 10, 12, 24
_WITH_OWN_COPY = frozenset(("AVIF", "HEIF", "JPEG2000", "WEBP"))

_ORIENTATION_TAG = 0x0112

# What Pillow opens besides pictures: data of many kinds, videos, and programs that draw.
_NO_PICTURES = frozenset(("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"))
# Formats that their first bytes tell from any other file.
_SIGNED = (*("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "PSD", "QOI", "WEBP"),)


class ImageError(Exception):
    """Raised when a file is not an image that can be decoded. The message is the reason alone."""


def open_picture(file: IO[bytes]) -> Image.Image:
    """The image in a file as Pillow opens it, without its pixels yet; HEIC and HEIF too.

    Raises ImageError or what Pillow raises.
    """
    start = file.read(12)
    file.seek(0)
    if start[4:8] == b"ftyp":  # HEIF, AVIF, or a video
        _register_heif()
    image = Image.open(file)
    if image.format in _NO_PICTURES:
        raise ImageError(f"not a picture, but {image.format}")
    return image


@functools.cache
def _register_heif() -> None:
    import pillow_heif

    Image.init()  # Pillow's plugins first: an AVIF may call itself a HEIF as well
    pillow_heif.register_heif_opener()


def shows_picture(path: str) -> bool:
    """Whether the first bytes of a regular file are those of a picture.

    Formats without a signature of their own count if the file's suffix is theirs. A TIFF counts
    only with its own suffix or without any: the raw files of many cameras are TIFFs too, with a
    thumbnail where Pillow looks for the picture. Raises OSError.
    """
    _register_heif()
    suffix = PurePosixPath(path).suffix.lower()
    of_suffix = Image.registered_extensions().get(suffix, "" if suffix else "TIFF")
    formats = [name for name in (*_SIGNED, of_suffix) if name in Image.OPEN]  # some lack AVIF
    with open(path, "rb") as file:
        try:
            with Image.open(file, formats=formats) as image:
                return image.format not in _NO_PICTURES
        except Exception as error:  # nearly anything, as in `decode`
            if is_shortage(error):
                raise
            return False


def decode(data: bytes, reservation: Reservation | None = None) -> NDArray[np.uint8]:
    """The image in a file's bytes as (H, W, 3) uint8 RGB, upright; of several frames, the first.

    Transparent parts are shown on white, 16-bit gray is scaled to 8 bits. reservation: of the
    memory that decoding takes; it is made as soon as the size of the image is known. Raises
    ImageError, or MemoryError or OSError if `is_shortage`.
    """
    if not data:
        raise ImageError("the file is empty")
    if reservation is None:
        reservation = MemoryBudget(sys.maxsize).reservation()
    header = read_header(data)
    if header is not None and header.orientation == 1:
        pixels = _decode_plain_jpeg(data, header, reservation)
        if pixels is not None:
            return pixels
    with _reasons(), open_picture(io.BytesIO(data)) as image:
        _check_size(image)
        upright = image.getexif().get(_ORIENTATION_TAG, 1) == 1
        if upright and image.format == "JPEG" and image.mode in ("RGB", "L"):
            pixels = _decode_plain_jpeg(data, header, reservation)
            if pixels is not None:
                return pixels
        return _decode_picture(image, reservation)


def decode_picture(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels of an open image, as `decode` gives those of its file. The image stays as it is.

    Raises ImageError, or MemoryError or OSError if `is_shortage`.
    """
    with _reasons():
        _check_size(image)
        return _decode_picture(image.copy(), MemoryBudget(sys.maxsize).reservation())


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"too large ({image.width}×{image.height} pixels)")


def _decode_picture(image: Image.Image, reservation: Reservation) -> NDArray[np.uint8]:
    reservation.change(image.width * image.height * _bytes_per_pixel(image))
    ImageOps.exif_transpose(image, in_place=True)
    return np.array(_to_rgb(image))


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """Turns what Pillow raises on a file into an ImageError with the reason."""
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError("too large (a decompression bomb)") from None
    except UnidentifiedImageError:
        raise ImageError("not an image, or of an unknown format") from None
    except Exception as error:
        if is_shortage(error):
            raise
        # Pillow's plugins raise nearly anything on hostile input: SyntaxError, struct.error, …
        raise ImageError(f"cannot decode ({str(error) or type(error).__name__})") from None


def _decode_plain_jpeg(
    data: bytes, header: JpegHeader | None, reservation: Reservation
) -> NDArray[np.uint8] | None:
    """Decode by libjpeg-turbo without Pillow's copies, to the same pixels.

    Releases Python's lock, so several threads decode side by side. None if Pillow has to decode the
    file, or to say what is wrong with it.
    """
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > MAX_PIXELS:
            return None
        plain = header is not None and not header.progressive
        bytes_per_pixel = _JPEG_BYTES if plain else _PROGRESSIVE_BYTES
        reservation.change(height * width * bytes_per_pixel)
        return simplejpeg.decode_jpeg(data, "RGB")  # type: ignore[no-any-return]
    except ValueError:  # damaged, or of an unusual kind
        return None


def _bytes_per_pixel(image: Image.Image) -> int:
    costly = image.has_transparency_data or image.mode[0] in "IF" or image.format in _WITH_OWN_COPY
    return _PILLOW_MOST_BYTES if costly else _PILLOW_BYTES


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):  # 16-bit gray; Pillow's own conversion would clip it to white
        values = np.asarray(image).astype(np.int64)
        if image.mode != "I" or values.max(initial=0) > 255:
            values = values * 255 // 65535
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
