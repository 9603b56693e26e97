"""Bytes of an image file to the pixels a network sees: the only copy of preprocessing.

    file → RGB at full size → views → (V, 3, S, S) uint8 → normalized floats (in the encoder)

The default view is the whole photo resized to S×S: nothing is cropped away, and training sees
exactly what prediction sees.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from train import private_torch

# Names the code below in a cache's record; change it whenever the pixels change.
PREPROCESSING = "rgb, bilinear antialiased, imagenet mean and std"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Pillow's own threshold for a decompression bomb; decoded, such an image takes half a gigabyte.
MAX_PIXELS = 178_956_970

_ORIENTATION_TAG = 0x0112
# The classic evaluation crop: the short side at 256 for a 224 crop.
_CROP_MARGIN = 256 / 224
_CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")
VIEWS = ("full", "flip", "center", "center-flip", *_CORNERS)


class ImageError(Exception):
    """A file is not an image that can be decoded. The message is the reason alone."""


def parse_views(names: str) -> tuple[str, ...]:
    """`full,flip,corners` → the views' names; `corners` stands for its four.

    Raises ValueError naming an unknown or repeated view.
    """
    views: list[str] = []
    for name in (part.strip() for part in names.split(",")):
        if name != "corners" and name not in VIEWS:
            raise ValueError(f"unknown view {name!r}; there are {', '.join(VIEWS)} and corners")
        views.extend(_CORNERS if name == "corners" else (name,))
    if len(set(views)) != len(views):
        raise ValueError(f"a view is named twice in {names!r}")
    return tuple(views)


def decode(data: bytes) -> NDArray[np.uint8]:
    """The image in a file's bytes as (H, W, 3) uint8 RGB, upright, the first frame of several.

    Transparent parts are shown on white, 16-bit gray is scaled to 8. Raises ImageError.
    """
    if not data:
        raise ImageError("the file is empty")
    if not _needs_pillow(data):
        pixels = _decode_plain_jpeg(data)
        if pixels is not None:
            return pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata and near-bombs are our own business
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
    """Whether this is no JPEG, or one that may say which way is up (in an APP1 segment).

    Reads the few segments before the pixels: Pillow takes five times as long for them, and holds
    Python's lock, which sixteen decoding threads share.
    """
    if not data.startswith(b"\xff\xd8"):
        return True
    position = 2
    while data[position : position + 1] == b"\xff":
        marker = data[position + 1 : position + 2]
        if marker == b"\xda":  # the pixels start
            return False
        if marker == b"\xe1":
            return True
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return True


def _decode_plain_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """Decode by libjpeg-turbo without Pillow's copies; None where Pillow must have the word.

    The pixels are Pillow's; the GIL is released, so threads scale.
    """
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > MAX_PIXELS:
            return None
        return simplejpeg.decode_jpeg(data, "RGB")  # type: ignore[no-any-return]
    except ValueError:  # damaged, or of an unusual kind: Pillow decides, and words the reason
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


def preprocess(
    data: bytes, size: int, views: tuple[str, ...] = ("full",), out: Tensor | None = None
) -> Tensor:
    """A file's bytes as the network's input: (V, 3, size, size) uint8 RGB, channels last in memory.

    out: such a tensor to write into. Raises ImageError.
    """
    if out is None:
        out = empty_pixels(len(views), size)
    # A private copy where the array is read-only: torch insists.
    photo = torch.from_numpy(np.require(decode(data), requirements="W"))
    photo = photo.permute(2, 0, 1).unsqueeze(0)  # (1, 3, H, W), channels last in memory
    full = scaled = photo
    if "full" in views:
        place = views.index("full")
        full = _resize(photo, size, size, out[place : place + 1])
    elif "flip" in views:
        full = _resize(photo, size, size)
    if any(view not in ("full", "flip") for view in views):
        scaled = _resize_for_crops(photo, size)
    if views == ("full",):
        return out
    # NumPy copies in this thread alone, where torch would start a team of threads for each photo.
    places = out.permute(0, 2, 3, 1).numpy()  # (V, size, size, 3)
    for place, name in zip(places, views, strict=True):
        if name != "full":
            place[...] = _view(name, full, scaled, size)[0].permute(1, 2, 0).numpy()
    return out


def empty_pixels(count: int, size: int, *, pin_memory: bool = False) -> Tensor:
    """(count, 3, size, size) uint8, channels last in memory, not filled."""
    pixels = torch.empty(count, size, size, 3, dtype=torch.uint8, pin_memory=pin_memory)
    return pixels.permute(0, 3, 1, 2)


def _view(name: str, full: Tensor, scaled: Tensor, size: int) -> Tensor:
    if name == "flip":
        return full.flip(3)
    height, width = scaled.shape[2:]
    if name.startswith("center"):
        top, left = (height - size) // 2, (width - size) // 2
    else:
        top = 0 if name.startswith("top") else height - size
        left = 0 if name.endswith("left") else width - size
    crop = scaled[:, :, top : top + size, left : left + size]
    return crop.flip(3) if name == "center-flip" else crop


def _resize_for_crops(photo: Tensor, size: int) -> Tensor:
    height, width = photo.shape[2:]
    scale = round(size * _CROP_MARGIN) / min(height, width)
    return _resize(photo, max(size, round(height * scale)), max(size, round(width * scale)))


def _resize(photo: Tensor, height: int, width: int, out: Tensor | None = None) -> Tensor:
    """Antialiased bilinear on uint8: Pillow's result to one level, ten times as fast (AVX2)."""
    if out is None:
        if photo.shape[2:] == (height, width):
            return photo
        return interpolate(photo, (height, width), mode="bilinear", antialias=True)
    if photo.shape[2:] == (height, width):
        out.numpy()[...] = photo.numpy()
        return out
    private_torch.resize_into(photo, out)
    return out
