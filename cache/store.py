"""The feature cache: one HDF5 file per split, safe against any kill, readable at memory speed.

Format, version 1. N photos, V views, D features, M captions, K tokens, W words.

- Bytes 0–4095: the seal (`cache.seal`). From byte 4096: an ordinary HDF5 file.
- Every dataset is contiguous, little-endian, allocated in full when the file is made. The file is
  built as `NAME.tmp`, synced and renamed; afterwards only the bytes of the five mutable arrays ever
  change, so a kill at any moment leaves a valid file.
- Mutable, written row by row:
  - `features`  (N, V, D) float16
  - `status`    (N,) uint8: 0 pending, 1 done, 2 unreadable. Written after the row it speaks of.
  - `digests`   (N, 16) uint8: BLAKE2b-128 of the photo's file, zeros where it could not be read
  - `errors`    (N, 96) uint8: why a row is unreadable, UTF-8 padded with zeros
  - `checksums` (N,) uint32: CRC-32 of the row's digest, then its error, then (done rows only) its
    features
- Fixed. A list of strings is a group of `text` (uint8, UTF-8, one after the other) and `offsets`
  (int64, one more than there are strings):
  - `image_ids/…`, `paths/…`: N each; paths are relative to the image folder
  - `captions/text`, `captions/offsets`: M raw captions
  - `captions/rows` (M,) int32: the photo of each caption, ascending
  - `captions/tokens` (K,) int32 and `captions/token_offsets` (M + 1,) int64: tokens as indices into
  - `words/…`: W distinct tokens by descending frequency, ties alphabetical; `words/counts` (W,)
    int64. A vocabulary for any minimum count is a prefix of `words`.
- Root attributes: `format_version`, `backbone`, `weights`, `weights_sha256`, `feature_dim`,
  `image_size`, `views` (comma-separated), `preprocessing`, `precision`, `batch_rows`,
  `photos_sha256`, `captions_sha256`, `library_versions` (JSON).

There are no timestamps: the same photos through the same encoder give the same bytes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from cache.record import CacheError, CaptionTable, EncoderRecord, Skeleton, Strings
from cache.seal import FORMAT_VERSION, SEAL_BYTES, check_seal, write_seal

PENDING, DONE, UNREADABLE = 0, 1, 2
DIGEST_BYTES = 16
ERROR_BYTES = 96
MUTABLE = ("features", "status", "digests", "errors", "checksums")

_READ_BYTES = 1 << 24  # at once
# Large arrays start on a page, so that mapping them costs nothing extra.
_ALIGNMENT = {"alignment_threshold": 4096, "alignment_interval": 4096}


def row_checksum(
    digest: NDArray[np.uint8],
    error: NDArray[np.uint8],
    features: NDArray[np.float16] | None,
) -> int:
    """CRC-32 of a row: its digest, its error bytes and, if it is done, its features."""
    crc = zlib.crc32(error.tobytes(), zlib.crc32(digest.tobytes()))
    return crc if features is None else zlib.crc32(features.tobytes(), crc)


def create_file(
    path: Path, fd: int, skeleton: Skeleton, library_versions: Mapping[str, str]
) -> None:
    """Write a sealed cache with every row pending into `path`, whose open descriptor is `fd`.

    Raises CacheError where the disk cannot hold the finished file.
    """
    rows, encoder, captions = len(skeleton.paths), skeleton.encoder, skeleton.captions
    views, dim = len(encoder.views), encoder.feature_dim
    needed = rows * (2 * views * dim + DIGEST_BYTES + ERROR_BYTES + 5) + captions.texts.text.nbytes
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise CacheError(_disk_full(needed, free))
    attributes = {
        "format_version": FORMAT_VERSION,
        "backbone": encoder.backbone,
        "weights": encoder.weights,
        "weights_sha256": encoder.weights_sha256,
        "feature_dim": dim,
        "image_size": encoder.image_size,
        "views": ",".join(encoder.views),
        "preprocessing": encoder.preprocessing,
        "precision": encoder.precision,
        "batch_rows": skeleton.batch_rows,
        "photos_sha256": skeleton.photos_sha256(),
        "captions_sha256": captions.sha256(),
        "library_versions": json.dumps(dict(library_versions), sort_keys=True),
    }
    # HDF5's own lock would clash with the writer's, which is on the same file.
    with h5py.File(path, "w", userblock_size=SEAL_BYTES, locking=False, **_ALIGNMENT) as file:
        for name, value in attributes.items():
            file.attrs[name] = value
        mutable = [
            _allocate(file, "status", (rows,), "u1"),
            _allocate(file, "digests", (rows, DIGEST_BYTES), "u1"),
            _allocate(file, "checksums", (rows,), "<u4"),
            _allocate(file, "errors", (rows, ERROR_BYTES), "u1"),
            _allocate(file, "features", (rows, views, dim), "<f2"),
        ]
        for name, strings in (
            ("image_ids", skeleton.image_ids),
            ("paths", skeleton.paths),
            ("captions", captions.texts),
            ("words", captions.words),
        ):
            _write(file, f"{name}/text", strings.text, "u1")
            _write(file, f"{name}/offsets", strings.offsets, "<i8")
        _write(file, "captions/rows", captions.rows, "<i4")
        _write(file, "captions/tokens", captions.tokens, "<i4")
        _write(file, "captions/token_offsets", captions.token_offsets, "<i8")
        _write(file, "words/counts", captions.counts, "<i8")
    write_seal(fd, [region for region in mutable if region[1]])
    try:
        # Claims the blocks behind the arrays now: a full disk shows here, not hours later.
        os.posix_fallocate(fd, 0, os.fstat(fd).st_size)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CacheError(_disk_full(needed, shutil.disk_usage(path.parent).free)) from None
        raise


def _disk_full(needed: int, free: int) -> str:
    return f"needs {needed / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free"


def _allocate(file: h5py.File, name: str, shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """Make a contiguous, allocated, unfilled dataset; returns its (offset, size) in the file."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    dataset = h5py.h5d.create(
        file.id,
        name.encode(),
        h5py.h5t.py_create(np.dtype(dtype), logical=True),
        h5py.h5s.create_simple(shape),
        dcpl=properties,
        lcpl=links,
    )
    size = dataset.get_storage_size()
    return (dataset.get_offset() if size else 0), size


def _write(file: h5py.File, name: str, values: NDArray[Any], dtype: str) -> None:
    _allocate(file, name, values.shape, dtype)
    if values.size:
        file[name][...] = values


class FeatureCache:
    """A cache open for reading; arrays are memory-mapped, strings are decoded when asked for.

    Rows are not copied: `cache.features[rows]` reads just those rows. Use `open_cache` to make one.
    """

    def __init__(self, path: Path) -> None:
        check_seal(path)
        self.path = path
        try:
            with h5py.File(path, "r", locking=False) as file:
                attributes = dict(file.attrs)
                self._regions = {name: _region(file[name]) for name in MUTABLE}
                self.image_ids = _strings(file["image_ids"])
                self.paths = _strings(file["paths"])
                self.captions = CaptionTable(
                    texts=_strings(file["captions"]),
                    rows=file["captions/rows"][...],
                    tokens=file["captions/tokens"][...],
                    token_offsets=file["captions/token_offsets"][...],
                    words=_strings(file["words"]),
                    counts=file["words/counts"][...],
                )
        except (OSError, KeyError) as error:
            raise CacheError(f"{path}: cannot read ({error})") from None
        self.encoder = EncoderRecord(
            backbone=str(attributes["backbone"]),
            weights=str(attributes["weights"]),
            weights_sha256=str(attributes["weights_sha256"]),
            feature_dim=int(attributes["feature_dim"]),
            image_size=int(attributes["image_size"]),
            views=tuple(str(attributes["views"]).split(",")),
            preprocessing=str(attributes["preprocessing"]),
            precision=str(attributes["precision"]),
        )
        self.batch_rows = int(attributes["batch_rows"])
        self.photos_sha256 = str(attributes["photos_sha256"])
        self.captions_sha256 = str(attributes["captions_sha256"])
        self.library_versions: dict[str, str] = json.loads(attributes["library_versions"])
        self.features: NDArray[np.float16] = self._map("features")  # (N, V, D)
        self.status: NDArray[np.uint8] = self._map("status")  # (N,)
        self.digests: NDArray[np.uint8] = self._map("digests")  # (N, 16)
        self.checksums: NDArray[np.uint32] = self._map("checksums")  # (N,)
        self._errors: NDArray[np.uint8] = self._map("errors")  # (N, 96)
        if self.status.size and int(self.status.max()) > UNREADABLE:
            raise CacheError(f"{path}: damaged (a row has an unknown status); extract again")

    def _map(self, name: str) -> NDArray[Any]:
        offset, shape, dtype = self._regions[name]
        if 0 in shape:
            return np.zeros(shape, dtype)
        return np.memmap(self.path, dtype, "r", offset, shape)

    def __len__(self) -> int:
        return len(self.status)

    def load_features(self) -> NDArray[np.float16]:
        """All features in memory of their own, (N, V, D): faster than copying the mapped file.

        Raises CacheError if the file cannot be read to its end.
        """
        offset, shape, dtype = self._regions["features"]
        features = np.empty(shape, dtype)
        left = features.reshape(-1).view(np.uint8).data
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(offset)
                while len(left):
                    count = file.readinto(left[:_READ_BYTES])
                    if not count:
                        raise CacheError(f"{self.path}: the file has become shorter")
                    left = left[count:]
        except OSError as error:
            raise CacheError(f"{self.path}: cannot read ({error.strerror})") from None
        return features

    def region(self, name: str) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
        """(byte offset in the file, shape, dtype) of a mutable array."""
        return self._regions[name]

    def rows_with(self, status: int) -> NDArray[np.int64]:
        """Row numbers with this status (PENDING, DONE or UNREADABLE), ascending."""
        return np.flatnonzero(self.status == status)

    def error(self, row: int) -> str:
        """Why a row is unreadable."""
        return str(self._errors[row].tobytes().rstrip(b"\0"), "utf-8", "replace")

    def errors(self) -> list[tuple[str, str]]:
        """(path, reason) of every unreadable photo."""
        return [(self.paths[row], self.error(row)) for row in self.rows_with(UNREADABLE).tolist()]

    def row_is_intact(self, row: int) -> bool:
        """Whether a done or unreadable row still has the checksum it was written with."""
        features = self.features[row] if self.status[row] == DONE else None
        expected = row_checksum(self.digests[row], self._errors[row], features)
        return expected == int(self.checksums[row])


def _region(dataset: h5py.Dataset) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
    offset = dataset.id.get_offset() if dataset.size else 0
    return offset, dataset.shape, dataset.dtype


def _strings(group: h5py.Group) -> Strings:
    return Strings(group["text"][...], group["offsets"][...])


def open_cache(path: str | Path, *, allow_pending: bool = False) -> FeatureCache:
    """Open a cache for reading, memory-mapped.

    Raises CacheError if the file is not a cache, is damaged or another version, or (unless
    `allow_pending`) its extraction has not finished.
    """
    cache = FeatureCache(Path(path))
    pending = len(cache.rows_with(PENDING))
    if pending and not allow_pending:
        raise CacheError(
            f"{path}: {pending:,} of {len(cache):,} photos are not extracted yet; "
            "run the same `cap extract-features` again to finish it"
        )
    return cache
