"""Preprocessing: the bytes of an image file to the pixels that the network sees.

    file → RGB at full size (`decoding`) → views → (V, 3, S, S) uint8 → floats (in the encoder)

This is the only copy of preprocessing: whatever feeds the network calls `preprocess`. The default
view is the whole photo resized to S×S. Nothing is cropped away, and training sees exactly what
prediction sees.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.photos.decoding import decode
from train import private_torch

# Names this module and `decoding` in a cache's record. Change it whenever the pixels change.
PREPROCESSING = "rgb, bilinear antialiased, imagenet mean and std"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Crops are cut as in the usual evaluation on ImageNet: for a crop of 224, the short side has 256.
_CROP_MARGIN = 256 / 224


def preprocess(
    data: bytes, size: int, views: tuple[str, ...] = ("full",), out: Tensor | None = None
) -> Tensor:
    """A file's bytes as the network's input: (V, 3, size, size) uint8 RGB, channels last in memory.

    out: a tensor of this shape and layout to write into. Raises ImageError.
    """
    if out is None:
        out = empty_pixels(len(views), size)
    # `require` copies read-only arrays, because torch takes only writable ones without a warning.
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
    # NumPy copies in this thread alone; torch would start a team of threads for each photo.
    places = out.permute(0, 2, 3, 1).numpy()  # (V, size, size, 3)
    for place, name in zip(places, views, strict=True):
        if name != "full":
            place[...] = _view(name, full, scaled, size)[0].permute(1, 2, 0).numpy()
    return out


def empty_pixels(count: int, size: int, *, pin_memory: bool = False) -> Tensor:
    """(count, 3, size, size) uint8, channels last in memory, not initialized."""
    pixels = torch.empty(count, size, size, 3, dtype=torch.uint8, pin_memory=pin_memory)
    return pixels.permute(0, 3, 1, 2)


def _view(name: str, full: Tensor, scaled: Tensor, size: int) -> Tensor:
    """One view (1, 3, size, size), cut out of `scaled` (1, 3, H, W) or made of `full`."""
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
