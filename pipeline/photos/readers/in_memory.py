"""Photos that a program holds in memory, in any mixture with files.

A photo is the path of a file, the bytes of a file, a PIL image, or an array of pixels; or where it
lies in a tar, a Parquet file or a store. Whatever it is, its pixels are those of its file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cache.store import DIGEST_BYTES
from pipeline.photos.decoding import MAX_PIXELS, ImageError, decode_picture
from pipeline.photos.photo_file import (
    MAX_FILE_BYTES,
    ReadPhoto,
    photo_of,
    read_photo,
    reading_fails,
)
from pipeline.photos.preprocessing import BILINEAR, preprocess_pixels
from pipeline.photos.sources.places import Cell, Part, Place, StoredObject, shown

# A path, a file's bytes, a PIL image, or an array of (H, W, 3) RGB or (H, W) gray uint8, upright.
Photo: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | Image.Image | NDArray[np.uint8] | Place
)

LYING = (Part, StoredObject, Cell)
_ONE = (str, os.PathLike, bytes, bytearray, Image.Image, *LYING)


def as_photos(photos: Photo | Iterable[Photo]) -> list[Photo]:
    """One photo or many as a list. An array (N, H, W, 3) is N photos.

    Raises TypeError for anything that is no photo.
    """
    if isinstance(photos, _ONE):
        return [photos]
    if isinstance(photos, np.ndarray):
        return [_checked(photo) for photo in (photos if photos.ndim == 4 else [photos])]
    if not isinstance(photos, Iterable):
        raise TypeError(_what_it_is_not(photos))
    return [_checked(photo) for photo in photos]


def _checked(photo: Any) -> Photo:
    if isinstance(photo, _ONE):
        return photo
    pixels = isinstance(photo, np.ndarray) and photo.dtype == np.uint8
    if pixels and (photo.ndim == 2 or (photo.ndim == 3 and photo.shape[2] == 3)):
        return cast(Photo, photo)
    raise TypeError(_what_it_is_not(photo))


def _what_it_is_not(photo: Any) -> str:
    kind = type(photo).__name__
    if isinstance(photo, np.ndarray):
        kind = f"array of {photo.dtype} with shape {photo.shape}"
    return (
        f"a photo is a path, bytes, a PIL image, or an array (H, W, 3) of uint8; this is of "
        f"another kind: {kind}"
    )


def name_of(photo: Photo, number: int) -> str:
    """The path of a photo, or `photo N` for one that has none. number: of the photo, from 1."""
    if isinstance(photo, (Part, StoredObject, Cell)):
        return shown(photo)
    return os.fspath(photo) if isinstance(photo, (str, os.PathLike)) else f"photo {number}"


def read_any(photo: Photo, size: int, views: tuple[str, ...], filter: str = BILINEAR) -> ReadPhoto:
    """`read_photo` of a photo of any kind. The digest is that of bytes, or else zeros."""
    if isinstance(photo, (str, os.PathLike)):
        return read_photo(Path(photo), size, views, filter=filter)
    if isinstance(photo, (Part, StoredObject, Cell)):
        return read_photo(photo, size, views, filter=filter)
    nowhere = Path()
    if isinstance(photo, (bytes, bytearray)):
        if len(photo) > MAX_FILE_BYTES:
            return reading_fails(nowhere, ImageError(f"too large ({len(photo) / 1e6:.0f} MB)"))
        return photo_of(nowhere, bytes(photo), size, views, filter=filter)
    try:
        pixels = decode_picture(photo) if isinstance(photo, Image.Image) else _rgb(photo)
        digest = np.zeros(DIGEST_BYTES, np.uint8)
        return ReadPhoto(preprocess_pixels(pixels, size, views, filter=filter), digest)
    except Exception as error:
        return reading_fails(nowhere, error)


def _rgb(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W) or (H, W, 3) → (H, W, 3), contiguous. Raises ImageError."""
    height, width = array.shape[:2]
    if not height or not width:
        raise ImageError("an array without pixels")
    if height * width > MAX_PIXELS:
        raise ImageError(f"too large ({width}×{height} pixels)")
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    array = np.ascontiguousarray(array)
    return array if array.flags.writeable else array.copy()  # torch warns of read-only memory
