"""Decoding: the bytes of an image file to RGB pixels at full size, upright."""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

# Pillow's own threshold for a decompression bomb. Such an image takes half a gigabyte decoded.
MAX_PIXELS = 178_956_970

_ORIENTATION_TAG = 0x0112


class ImageError(Exception):
    """Raised when a file is not an image that can be decoded. The message is the reason alone."""


def decode(data: bytes) -> NDArray[np.uint8]:
    """The image in a file's bytes as (H, W, 3) uint8 RGB, upright; of several frames, the first.

    Transparent parts are shown on white, 16-bit gray is scaled to 8 bits. Raises ImageError.
    """
    if not data:
        raise ImageError("the file is empty")
    if not _needs_pillow(data):
        pixels = _decode_plain_jpeg(data)
        if pixels is not None:
            return pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata and large images: handled here
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ImageError(f"too large ({image.width}×{image.height} pixels)")
                upright = image.getexif().get(_ORIENTATION_TAG, 1) == 1
                if upright and image.format == "JPEG" and image.mode in ("RGB", "L"):
                    pixels = _decode_plain_jpeg(data)
                    if pixels is not None:
                        return pixels
                return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError("too large (a decompression bomb)") from None
    except UnidentifiedImageError:
        raise ImageError("not an image, or of an unknown format") from None
    except Exception as error:
        # Pillow's plugins raise nearly anything on hostile input: SyntaxError, struct.error, …
        raise ImageError(f"cannot decode ({error or type(error).__name__})") from None


def _needs_pillow(data: bytes) -> bool:
    """Whether this is no JPEG, or one whose metadata (an APP1 segment) may tell its orientation.

    Reads only the few segments before the pixels. Pillow would take five times as long for them
    and hold Python's lock, which all decoding threads share.
    """
    if not data.startswith(b"\xff\xd8"):
        return True
    position = 2
    while data[position : position + 1] == b"\xff":
        marker = data[position + 1 : position + 2]
        if marker == b"\xda":  # the pixels start
            return False
        if marker == b"\xe1":  # APP1
            return True
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return True


def _decode_plain_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """Decode by libjpeg-turbo without Pillow's copies, to the same pixels.

    Releases Python's lock, so several threads decode side by side. None if Pillow has to decode the
    file, or to say what is wrong with it.
    """
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > MAX_PIXELS:
            return None
        return simplejpeg.decode_jpeg(data, "RGB")  # type: ignore[no-any-return]
    except ValueError:  # damaged, or of an unusual kind
        return None


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
    return image.convert("RGB")
