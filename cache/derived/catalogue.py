"""Writes a catalogue: the names and captions of several caches, and where their features are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cache.create import create_file
from cache.derived.rows import read_into
from cache.derived.shards import Listed, ShardedFeatures
from cache.merge import Joined, MergeReport, join
from cache.place import lock_existing, new_file, publish
from cache.record import CacheError
from cache.seal import read_seal
from cache.store import FeatureCache
from cache.writer import followed

_COPIED = {  # the small arrays of rows, and the attributes that hold them
    "status": "status",
    "digests": "digests",
    "errors": "error_bytes",
    "checksums": "checksums",
}


def write_catalogue(paths: Sequence[Path], out: Path, *, overwrite: bool = False) -> MergeReport:
    """List finished caches of one encoder in the catalogue `out`, which appears when complete.

    `open_cache(out)` then has the rows, names, captions and words of what `merge` would make of
    them, but the features stay where they are. Paths are recorded relative to the folder of `out`,
    so a folder that holds both can be moved.

    The checks are those of `merge`, except that no features are read: `cap verify` checks them, and
    whoever uses rows checks those. Raises CacheError as `merge` does, also for duplicates, for a
    catalogue among the caches, for a cache of 0.1.0, and if `out` is one of the caches.
    """
    joined = join(paths)
    target = followed(out)
    folder = Path(os.path.realpath(target.parent))
    listed = [_listed(cache, folder) for cache in joined.caches]
    for cache in joined.caches:
        if os.path.exists(target) and os.path.samefile(target, cache.path):
            raise CacheError(f"{out}: is one of the caches to list; name another --out")
    existing = lock_existing(target)
    there = CacheError(f"{out}: already exists; name another --out, or --overwrite it")
    try:
        if existing is not None and not overwrite:
            raise there
        with new_file(target) as temporary:
            fd = create_file(temporary, joined.skeleton, joined.library_versions, listed)
            try:
                _fill(fd, joined)
                _check(fd, joined, listed, target, folder)
                if not publish(temporary, fd, target, replace=existing is not None):
                    raise there
            finally:
                os.close(fd)
    finally:
        if existing is not None:
            os.close(existing)
    return joined.report()


def _listed(cache: FeatureCache, folder: Path) -> Listed:
    if cache.shards is not None:
        raise CacheError(f"{cache.path}: is a catalogue itself; name the caches that it lists")
    if cache.format_version < 3:
        raise CacheError(
            f"{cache.path}: has format {cache.format_version}, which a catalogue cannot list; "
            f"`cap merge {cache.path} --out NEW.h5` makes a newer one of it"
        )
    # The file may be a link on purpose. The folder is resolved, so that `..` leads out of it.
    place = Path(os.path.realpath(cache.path.parent)) / cache.path.name
    size, digest = cache.identity()
    return Listed(os.path.relpath(place, folder), len(cache), size, digest)


def _fill(fd: int, joined: Joined) -> None:
    """Write the small arrays of the rows. Raises OSError."""
    arrays, first = read_seal(fd).arrays, 0
    for cache in joined.caches:
        cache.check_unchanged()  # reading beyond the end of a file kills the process
        for name, attribute in _COPIED.items():
            values = np.ascontiguousarray(getattr(cache, attribute))
            if len(values):
                data = values.reshape(-1).view(np.uint8).data
                position = arrays[name].offset + first * (values.nbytes // len(values))
                while data:
                    written = os.pwrite(fd, data, position)
                    data, position = data[written:], position + written
        first += len(cache)


def _check(
    fd: int, joined: Joined, listed: Sequence[Listed], catalogue: Path, folder: Path
) -> None:
    """Raise CacheError if a cache has changed since its rows were copied."""
    arrays, rows = read_seal(fd).arrays, len(joined.skeleton.paths)
    status, checksums = np.empty(rows, np.uint8), np.empty(rows, np.uint32)
    for name, array in (("status", status), ("checksums", checksums)):
        read_into(fd, array, arrays[name].offset)
    encoder = joined.skeleton.encoder
    try:
        ShardedFeatures(
            catalogue,
            folder,
            listed,
            row_shape=(len(encoder.views), encoder.feature_dim),
            status=status,
            checksums=checksums,
        )
    except CacheError as error:
        raise CacheError(f"{catalogue}: {error}") from None
