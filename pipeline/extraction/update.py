"""`--update`: gives a cache other captions and other photos without encoding known ones again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.derived.update import update_cache
from cache.record import CacheError, Skeleton
from cache.store import DONE, PENDING, FeatureCache
from cache.verify import damaged_rows
from pipeline.extraction.digests import digest_or_none, look_at
from pipeline.extraction.reuse import KnownPhotos
from pipeline.photos.sources.source import Source


@dataclass(frozen=True)
class Update:
    """What an update has done, before anything is encoded."""

    kept: int  # photos whose rows are kept, under the same name or another
    changed: int  # photos of the same name with other bytes, or whose row is damaged
    new: int  # photos with names and bytes that the cache did not have
    gone: int  # photos of the cache that are not asked for any more
    unread: int  # photos that cannot be read now; they keep the rows that they have
    captions: bool  # whether there are other captions

    def __str__(self) -> str:
        counts = (
            (self.changed, "changed"),
            (self.new, "new"),
            (self.gone, "gone"),
            (self.unread, "cannot be read now and stay as they are"),
        )
        parts = [f"{count:,} {word}" for count, word in counts if count]
        return ", ".join([f"{self.kept:,} photos kept", *parts]) + (
            "; other captions" if self.captions else ""
        )


def check_encoder(old: FeatureCache, skeleton: Skeleton) -> None:
    """Raise CacheError if the rows of a cache cannot be kept, because another encoder made them."""
    difference = old.encoder.difference(skeleton.encoder)
    if difference is not None:
        raise CacheError(
            f"{old.path}: written with {difference}; nothing of it can be kept. Use another --out, "
            "or --overwrite."
        )


def bring_up_to_date(
    path: Path, skeleton: Skeleton, source: Source, threads: int
) -> Iterator[int | Update]:
    """Make the cache at `path` one of this skeleton, in one step.

    Reads and digests all photos, and yields how many are read, now and then; at the end an
    `Update`. Photos that the cache does not know are pending afterwards. Raises StalledError,
    SourceError or CacheError; the cache is then as it was.
    """
    old = FeatureCache(path)
    check_encoder(old, skeleton)
    every = np.arange(len(skeleton.paths))
    same_photos = old.photos_sha256 == skeleton.photos_sha256()
    if same_photos:  # also their order, so that also the batches stay what they are
        same_name = every
        skeleton = replace(skeleton, batch_rows=old.batch_rows)
    else:
        by_path = {name: row for row, name in enumerate(old.paths)}
        same_name = np.array([by_path.get(name, -1) for name in skeleton.paths], np.int64)
    damaged = {row for row, _ in damaged_rows(old, np.flatnonzero(old.status != PENDING))}
    known = KnownPhotos(old)
    old_rows = np.full(len(same_name), -1, np.int64)
    unread = 0
    for count, (row, digest) in enumerate(
        look_at(source, skeleton.paths, every, threads, digest_or_none), 1
    ):
        yield count
        old_row = int(same_name[row])
        finished = old_row >= 0 and old.status[old_row] != PENDING and old_row not in damaged
        if digest is None:
            unread += finished
            old_rows[row] = old_row if finished else -1
        elif finished and np.array_equal(old.digests[old_row], digest):
            old_rows[row] = old_row
        else:
            known_row = known.row(digest)
            old_rows[row] = -1 if known_row is None else known_row
    captions = old.captions_sha256 != skeleton.captions.sha256()
    finished_rows = old.status != PENDING
    # Rows that were pending stay pending without being a change.
    same_rows = same_photos and np.array_equal(old_rows[finished_rows], every[finished_rows])
    same_ids = (
        old.numbered is None
        or skeleton.numbered is None
        or np.array_equal(old.numbered, skeleton.numbered)
    )
    if captions or not same_rows or not same_ids or old.shard != skeleton.shard:
        update_cache(path, skeleton, old_rows)
    yield _summary(old, same_name, old_rows, unread, captions)


def _summary(
    old: FeatureCache,
    same_name: NDArray[np.int64],
    old_rows: NDArray[np.int64],
    unread: int,
    captions: bool,
) -> Update:
    lost = old_rows < 0
    had_row = np.zeros(len(same_name), bool)
    named = same_name >= 0
    had_row[named] = old.status[same_name[named]] != PENDING
    used = np.zeros(len(old), bool)
    used[same_name[named]] = True
    used[old_rows[~lost]] = True
    return Update(
        kept=int((~lost).sum()) - unread,
        changed=int((lost & had_row).sum()),
        new=int((lost & ~named).sum()),
        gone=int((~used & (old.status == DONE)).sum()),
        unread=unread,
        captions=captions,
    )
