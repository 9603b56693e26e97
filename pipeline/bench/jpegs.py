"""JPEGs to measure with: noise with the spectrum of photographs, in COCO's sizes and bytes."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# COCO's photos have full colour resolution (4:4:4) and half a byte per pixel: 163 kB at 640×480.
_BYTES_PER_PIXEL = 0.53
_FIELD_PIXELS = 1024
_DISTINCT = 64


def write_bench_photos(folder: Path, count: int, width: int, height: int) -> float:
    """Write `count` JPEGs, `00000000.jpg` …, into `folder`; returns their mean size in bytes.

    Only the first 64 are files of their own, the others are hard links to them. Decoding a link
    takes as long, and the files take a few megabytes; the speed of the disk is not measured.
    """
    random = np.random.default_rng(0)
    field = _photo_like(random, max(_FIELD_PIXELS, 2 * max(width, height)))
    quality = _quality_for(field[:height, :width], round(_BYTES_PER_PIXEL * width * height))
    total = 0
    for number in range(count):
        path = folder / f"{number:08d}.jpg"
        source = folder / f"{number % _DISTINCT:08d}.jpg"
        if number < _DISTINCT:
            top = random.integers(field.shape[0] - height + 1)
            left = random.integers(field.shape[1] - width + 1)
            path.write_bytes(_jpeg(field[top : top + height, left : left + width], quality))
        else:
            os.link(source, path)
        total += source.stat().st_size
    return total / count


def _photo_like(random: np.random.Generator, size: int) -> NDArray[np.uint8]:
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


def _quality_for(pixels: NDArray[np.uint8], size_bytes: int) -> int:
    """The lowest JPEG quality at which these pixels take at least `size_bytes`; at most 98."""
    low, high = 10, 98
    while low < high:
        middle = (low + high) // 2
        if len(_jpeg(pixels, middle)) < size_bytes:
            low = middle + 1
        else:
            high = middle
    return low


def _jpeg(pixels: NDArray[np.uint8], quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
