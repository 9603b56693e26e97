"""Creates a cache file: all arrays at full size, names and captions written, all rows pending."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from cache.derived.shards import Listed, listed_arrays
from cache.place import lock_new
from cache.record import CacheError, Skeleton
from cache.seal import FORMAT_VERSION, SEAL_BYTES, Region, write_seal
from cache.store import DIGEST_BYTES, ERROR_BYTES, LATER_VERSIONS_BYTES

# Large arrays start at a page boundary, so that mapping them has no extra cost.
_ALIGNMENT = {"alignment_threshold": 4096, "alignment_interval": 4096}
_OVERHEAD_BYTES = 1 << 17  # more than the seal, HDF5's structures and padding take


def create_file(
    path: Path,
    skeleton: Skeleton,
    library_versions: Mapping[str, str],
    shards: Sequence[Listed] | None = None,
) -> int:
    """Write a sealed cache with all rows pending to `path`, which does not exist yet.

    shards: the caches that hold the features, which makes it a catalogue; None for a cache that
    holds them itself.
    Returns a locked descriptor. Raises CacheError if the disk has no room for the finished file,
    and OSError.
    """
    rows, encoder, captions = len(skeleton.paths), skeleton.encoder, skeleton.captions
    unfilled = {
        "status": ((rows,), "u1"),
        "digests": ((rows, DIGEST_BYTES), "u1"),
        "checksums": ((rows,), "<u4"),
        "errors": ((rows, ERROR_BYTES), "u1"),
    }
    if shards is None:
        unfilled["features"] = ((rows, len(encoder.views), encoder.feature_dim), "<f2")
    filled: dict[str, NDArray[Any]] = {
        "later_versions": np.zeros(LATER_VERSIONS_BYTES, np.uint8),
        "captions/rows": captions.rows.astype("<i4", copy=False),
        "captions/tokens": captions.tokens.astype("<i4", copy=False),
        "captions/token_offsets": captions.token_offsets.astype("<i8", copy=False),
        "words/counts": captions.counts.astype("<i8", copy=False),
    }
    for name, strings in (
        ("image_ids", skeleton.image_ids),
        ("paths", skeleton.paths),
        ("captions", captions.texts),
        ("words", captions.words),
    ):
        filled[f"{name}/text"] = strings.text
        filled[f"{name}/offsets"] = strings.offsets.astype("<i8", copy=False)
    if skeleton.numbered is not None:
        filled["image_ids/numbers"] = skeleton.numbered.astype("u1")
    if shards is not None:
        filled |= listed_arrays(shards)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _reserve(path, fd, size_bytes(skeleton, shards))
        attributes = _attributes(skeleton, library_versions)
        # The file is locked only afterwards. HDF5 would find that lock and refuse to write, if the
        # environment variable HDF5_USE_FILE_LOCKING makes it lock files itself.
        with h5py.File(path, "w", userblock_size=SEAL_BYTES, locking=False, **_ALIGNMENT) as file:
            for name, value in attributes.items():
                file.attrs[name] = value
            arrays = {n: _allocate(file, n, shape, kind) for n, (shape, kind) in unfilled.items()}
            for name, array in filled.items():
                arrays[name] = _allocate(file, name, array.shape, array.dtype.str)
                if array.size:
                    file[name][...] = array
        lock_new(fd, path)
        try:
            write_seal(fd, arrays, attributes)
        except CacheError as error:
            raise CacheError(f"{path}: {error}") from None
        # Reserve the arrays' disk blocks, so that a full disk shows now and not hours later.
        os.posix_fallocate(fd, 0, os.fstat(fd).st_size)
    except BaseException:
        os.close(fd)
        raise
    return fd


def size_bytes(skeleton: Skeleton, shards: Sequence[Listed] | None = None) -> int:
    """The size of a cache, finished or not, or of a catalogue of these caches: at most so much,
    and little less.
    """
    captions, encoder = skeleton.captions, skeleton.encoder
    strings = (skeleton.image_ids, skeleton.paths, captions.texts, captions.words)
    row_bytes = DIGEST_BYTES + ERROR_BYTES + 6
    if shards is None:
        row_bytes += 2 * len(encoder.views) * encoder.feature_dim
    return (
        len(skeleton.paths) * row_bytes
        + sum(part.text.nbytes + part.offsets.nbytes for part in strings)
        + 4 * (len(captions.rows) + len(captions.tokens))
        + 8 * (len(captions.token_offsets) + len(captions.counts))
        + LATER_VERSIONS_BYTES
        + sum(array.nbytes for array in listed_arrays(shards or []).values())
        + _OVERHEAD_BYTES
    )


def size_text(size: int) -> str:
    """1234567 → `1.23 MB`."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= one:
            return f"{size / one:.{2 - min(2, len(str(int(size / one))) - 1)}f} {unit}"
    return f"{size} bytes"


def _reserve(path: Path, fd: int, needed: int) -> None:
    """Raise CacheError if the disk or a quota is too small. HDF5's own message would be obscure."""
    free = shutil.disk_usage(path.parent).free
    try:
        if needed > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.posix_fallocate(fd, 0, needed)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = "" if error.errno == errno.ENOSPC else f" ({error.strerror})"
            texts = size_text(needed), size_text(free)
            if texts[0] == texts[1]:
                texts = f"{needed:,} bytes", f"{free:,} bytes"
            raise CacheError(
                f"{path}: needs {texts[0]} of disk, {texts[1]} are free{reason}; "
                "make room, or name an --out on another disk"
            ) from None
        raise


def _attributes(skeleton: Skeleton, library_versions: Mapping[str, str]) -> dict[str, str | int]:
    encoder, shard = skeleton.encoder, skeleton.shard
    attributes: dict[str, str | int] = {
        "format_version": FORMAT_VERSION,
        "backbone": encoder.backbone,
        "weights": encoder.weights,
        "weights_sha256": encoder.weights_sha256,
        "feature_dim": encoder.feature_dim,
        "image_size": encoder.image_size,
        "views": ",".join(encoder.views),
        "preprocessing": encoder.preprocessing,
        "precision": encoder.precision,
        "batch_rows": skeleton.batch_rows,
        "photos_sha256": skeleton.photos_sha256(),
        "captions_sha256": skeleton.captions.sha256(),
        "tokenizer": skeleton.captions.tokenizer,
        "library_versions": json.dumps(dict(library_versions), sort_keys=True),
    }
    if shard is not None:
        attributes |= {
            "shard": str(shard),
            "shard_first_row": shard.first_row,
            "all_rows": shard.all_rows,
            "all_photos_sha256": shard.all_photos_sha256,
            "all_captions_sha256": shard.all_captions_sha256,
        }
    return attributes


def _allocate(file: h5py.File, name: str, shape: tuple[int, ...], dtype: str) -> Region:
    """Make a contiguous dataset, allocated but not filled. Returns where it lies in the file."""
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
    offset = dataset.get_offset() if dataset.get_storage_size() else 0
    return Region(np.dtype(dtype), shape, offset)
