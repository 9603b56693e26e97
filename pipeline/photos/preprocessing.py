"""Preprocessing: the bytes of an image file to the pixels that the network sees.

    file → RGB at full size (`decoding`) → views → (V, 3, S, S) uint8 → floats (in the encoder)

This is the only copy of preprocessing: whatever feeds the network calls `preprocess`. The default
view is the whole photo resized to S×S. Nothing is cropped away, and training sees exactly what
prediction sees.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.photos.decoding import decode
from pipeline.photos.memory_budget import Reservation
from train import private_torch

BILINEAR, BICUBIC = "bilinear", "bicubic"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_IMAGENET = "imagenet mean and std"
_NUMBERS = r"(\S+) (\S+) (\S+)"
_TEXT = re.compile(
    rf"rgb, ({BILINEAR}|{BICUBIC}) antialiased, (?:{_IMAGENET}|mean {_NUMBERS}, std {_NUMBERS})"
)

# A photo whose sides differ more than this is thin. Resized as others are, it would take gigabytes:
# for a crop of 224 from 3,000,000×1 pixels, 589 GB.
_THIN = 32

# Crops are cut as in the usual evaluation on ImageNet: for a crop of 224, the short side has 256.
_CROP_MARGIN = 256 / 224

_REACH = {BILINEAR: 1.0, BICUBIC: 2.0}  # of a filter, in pixels of the smaller side


@dataclass(frozen=True)
class Preprocessing:
    """How a network wants its pixels, besides their size and what part of the photo they show.

    filter: `bilinear` or `bicubic`, both antialiased. mean, std: of red, green and blue between 0
    and 1; the network sees (pixel / 255 - mean) / std. Raises ValueError for other values.
    """

    filter: str = BILINEAR
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.filter not in (BILINEAR, BICUBIC):
            raise ValueError(f"filter {self.filter!r} is neither {BILINEAR} nor {BICUBIC}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(map(math.isfinite, values)):
                raise ValueError(f"{name} {values} is not three finite numbers")
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} is not positive")

    def __str__(self) -> str:
        """Its name in a cache's record, from which `parse` makes the same again. It stands for this
        module and `decoding`, too: change it whenever the pixels change.
        """
        imagenet = (self.mean, self.std) == (IMAGENET_MEAN, IMAGENET_STD)
        mean, std = (" ".join(map(repr, map(float, each))) for each in (self.mean, self.std))
        numbers = _IMAGENET if imagenet else f"mean {mean}, std {std}"
        return f"rgb, {self.filter} antialiased, {numbers}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The preprocessing of a record; None if this version does not know it."""
        if (found := _TEXT.fullmatch(text)) is None:
            return None
        filter, *numbers = found.groups()
        try:
            made = cls(filter)
            if numbers[0] is not None:
                red, green, blue, *std = map(float, numbers)
                made = cls(filter, (red, green, blue), (std[0], std[1], std[2]))
        except ValueError:
            return None
        return made if str(made) == text else None


IMAGENET = Preprocessing()  # of torchvision's networks; all caches and models of 0.1.0 have it


def preprocess(
    data: bytes,
    size: int,
    views: tuple[str, ...] = ("full",),
    out: Tensor | None = None,
    reservation: Reservation | None = None,
    filter: str = BILINEAR,
) -> Tensor:
    """A file's bytes as the network's input: (V, 3, size, size) uint8 RGB, channels last in memory.

    out: a tensor of this shape and layout to write into. reservation: as for `decode`. filter: of
    the `Preprocessing`, whose mean and std are the encoder's business. Raises
    ImageError, or MemoryError, OSError or RuntimeError if `is_shortage`.
    """
    return preprocess_pixels(decode(data, reservation), size, views, out, filter)


def preprocess_pixels(
    pixels: NDArray[np.uint8],
    size: int,
    views: tuple[str, ...] = ("full",),
    out: Tensor | None = None,
    filter: str = BILINEAR,
) -> Tensor:
    """`preprocess` of a photo that is decoded: (H, W, 3) uint8 RGB, upright."""
    if out is None:
        out = empty_pixels(len(views), size)
    photo = torch.from_numpy(pixels)
    photo = photo.permute(2, 0, 1).unsqueeze(0)  # (1, 3, H, W), channels last in memory
    full = scaled = photo
    if "full" in views:
        place = views.index("full")
        full = _resize(photo, size, size, filter, out[place : place + 1])
    elif "flip" in views:
        full = _resize(photo, size, size, filter)
    thin = is_thin(photo.shape[2], photo.shape[3])
    if any(view not in ("full", "flip") for view in views) and not thin:
        scaled = _resize_for_crops(photo, size, filter)
    if views == ("full",):
        return out
    # NumPy copies in this thread alone; torch would start a team of threads for each photo.
    places = out.permute(0, 2, 3, 1).numpy()  # (V, size, size, 3)
    for place, name in zip(places, views, strict=True):
        if thin and name not in ("full", "flip"):
            place[...] = _thin_crop(name, photo, size, filter)
        elif name != "full":
            place[...] = _view(name, full, scaled, size)[0].permute(1, 2, 0).numpy()
    return out


def empty_pixels(
    count: int, size: int, *, pin_memory: bool = False, device: torch.device | None = None
) -> Tensor:
    """(count, 3, size, size) uint8, channels last in memory, not initialized."""
    shape = count, size, size, 3
    # Other threads write to it, which torch forbids if a caller's inference mode has made it.
    with torch.inference_mode(False):
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=pin_memory, device=device)
    return pixels.permute(0, 3, 1, 2)


def _view(name: str, full: Tensor, scaled: Tensor, size: int) -> Tensor:
    """One view (1, 3, size, size), cut out of `scaled` (1, 3, H, W) or made of `full`."""
    if name == "flip":
        return full.flip(3)
    top, left = corner(name, scaled.shape[2], scaled.shape[3], size)
    crop = scaled[:, :, top : top + size, left : left + size]
    return crop.flip(3) if name == "center-flip" else crop


def is_thin(height: int, width: int) -> bool:
    """Whether crops are cut out of the photo before it is resized."""
    return max(height, width) > _THIN * min(height, width)


def corner(name: str, height: int, width: int, size: int) -> tuple[int, int]:
    """(top, left) of a crop of size×size."""
    if name.startswith("center"):
        return (height - size) // 2, (width - size) // 2
    return (
        0 if name.startswith("top") else height - size,
        0 if name.endswith("left") else width - size,
    )


def _resize_for_crops(photo: Tensor, size: int, filter: str) -> Tensor:
    height, width = photo.shape[2:]
    return _resize(photo, *size_for_crops(height, width, size), filter)


def size_for_crops(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) of the resized photo that crops of size×size are cut from."""
    scale = round(size * _CROP_MARGIN) / min(height, width)
    return max(size, round(height * scale)), max(size, round(width * scale))


def _thin_crop(name: str, photo: Tensor, size: int, filter: str) -> NDArray[np.uint8]:
    """The crop (size, size, 3) that `_view` would cut, of a photo (1, 3, H, W) that is resized only
    where the crop lies; to one level.
    """
    height, width = photo.shape[2:]
    scaled = size_for_crops(height, width, size)
    box: list[float] = []  # of the crop in the part: top, bottom, left, right
    cut: list[slice] = []  # the part of the photo that the crop's filter reads
    for start, length, whole in zip(
        corner(name, *scaled, size), scaled, (height, width), strict=True
    ):
        step = whole / length
        reach = math.ceil(_REACH[filter] * max(1.0, step)) + 1
        first = max(0, math.floor(start * step) - reach)
        last = min(whole, math.ceil((start + size) * step) + reach)
        cut.append(slice(first, last))
        box += [start * step - first, min((start + size) * step, whole) - first]
    part = Image.fromarray(photo[0].permute(1, 2, 0).numpy()[cut[0], cut[1]])
    top, bottom, left, right = box
    resampling = Image.Resampling[filter.upper()]
    crop = part.resize((size, size), resampling, (left, top, right, bottom))
    pixels = np.asarray(crop)
    return pixels[:, ::-1] if name == "center-flip" else pixels


def _resize(
    photo: Tensor, height: int, width: int, filter: str, out: Tensor | None = None
) -> Tensor:
    """Antialiased on uint8: Pillow's result to one level, ten times as fast (AVX2)."""
    if photo.shape[2] > _THIN * photo.shape[3]:
        # Rows first, because torch would widen all rows of a tall photo before it drops most. The
        # result is the same to a level, to three of a bicubic one.
        rows = torch.empty(1, height, photo.shape[3], 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        private_torch.resize_into(photo, rows, filter)
        photo = rows
    if out is None:
        if photo.shape[2:] == (height, width):
            return photo
        return interpolate(photo, (height, width), mode=filter, antialias=True)
    if photo.shape[2:] == (height, width):
        out.numpy()[...] = photo.numpy()
        return out
    private_torch.resize_into(photo, out, filter)
    return out
