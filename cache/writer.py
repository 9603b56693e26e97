"""Fills a cache: one writer at a time, finished rows are safe, and interruptions can be resumed."""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cache.atomic import follow_link, remove_leftovers
from cache.create import create_file
from cache.derived.rows import runs
from cache.derived.shards import FILLS_NO_CATALOGUE, is_catalogue
from cache.place import folder_above, lock_existing, new_file, publish
from cache.record import (
    CacheError,
    Shard,
    Skeleton,
    join_versions,
    pack_versions,
    unpack_versions,
)
from cache.store import (
    DONE,
    ERROR_BYTES,
    PENDING,
    UNREADABLE,
    FeatureCache,
)

_GO_ON = "what is done is kept, run the same command again to go on"
_NO_ERROR = np.zeros(ERROR_BYTES, np.uint8)


class CacheWriter:
    """Writes rows to a cache file and keeps track of their status. Open one with `open_writer`.

    Rows are written to the file at once. `flush` writes their status when the rows themselves are
    on the disk, so a row marked "done" is done even after a power cut. The lock on the file belongs
    to the descriptor and ends with the process.
    """

    def __init__(
        self, path: Path, fd: int, library_versions: Mapping[str, str], advice: str = _GO_ON
    ) -> None:
        self.path = path
        self._advice = advice  # for the user, in case the disk fails
        self.cache = FeatureCache(path)
        self._fd = fd
        self._status = np.array(self.cache.status)  # as it will be after the next flush
        self._dirty: list[NDArray[np.int64]] = []
        self._failed: CacheError | None = None  # why nothing more can be written
        self._session_versions = library_versions
        self._versions = self.cache.library_versions  # behind all rows so far

    @property
    def status(self) -> NDArray[np.uint8]:
        """(N,) the status of all rows, including those not flushed yet. Do not write to it."""
        return self._status

    def write(
        self, rows: NDArray[np.int64], features: NDArray[np.float16], digests: NDArray[np.uint8]
    ) -> None:
        """Store rows as done. features: (B, V, D) float16; digests: (B, 16) uint8.

        Raises CacheError if the disk is full or gone. Rows that were flushed before stay valid.
        """
        self._record(self._session_versions)
        features = features.astype("<f2", copy=False)
        checksums = np.array(
            [
                self.cache.checksum(row, digest, _NO_ERROR, values)
                for row, digest, values in zip(rows.tolist(), digests, features, strict=True)
            ],
            np.uint32,
        )
        for run in runs(rows):
            first = int(rows[run.start])
            self._put("features", first, features[run])
            self._put("digests", first, digests[run])
            self._put("checksums", first, checksums[run])
            self._put("errors", first, np.zeros((run.stop - run.start, ERROR_BYTES), np.uint8))
        self._mark(rows, DONE)

    def set_unreadable(self, row: int, reason: str, digest: NDArray[np.uint8]) -> None:
        """Mark a photo as unreadable. reason: one line, cut to what the file can store."""
        error = np.zeros(ERROR_BYTES, np.uint8)
        text = " ".join(reason.split()).encode("utf-8", "replace")[:ERROR_BYTES]
        text = text.decode("utf-8", "ignore").encode()  # drop a character that the cut split
        error[: len(text)] = np.frombuffer(text, np.uint8)
        self._record(self._session_versions)
        self._put("errors", row, error)
        self._put("digests", row, digest)
        self._put("checksums", row, np.uint32(self.cache.checksum(row, digest, error, None)))
        self._mark(np.array([row]), UNREADABLE)

    def copy(
        self, rows: NDArray[np.int64], source: FeatureCache, source_rows: NDArray[np.int64]
    ) -> None:
        """Copy finished rows (B,) of another cache of the same encoder to these rows (B,).

        Raises CacheError if one of them is damaged or pending, or the disk is full.
        """
        self._record(source.library_versions)
        status = source.status[source_rows]
        features = source.read_rows(source_rows)
        if (status == PENDING).any():
            raise CacheError(f"{source.path}: another process is writing it")
        intact = source.intact(source_rows, features)
        if not all(intact):
            source_row = int(source_rows[intact.index(False)])
            if (source.status[source_rows] != status).any():
                raise CacheError(f"{source.path}: another process is writing it")
            raise CacheError(
                f"{source.path}: row {source_row} ({source.paths[source_row]}) "
                "does not match its checksum"
            )
        if not (status == DONE).all():
            features[status != DONE] = 0  # they were never written and may have any content
        digests, errors = source.digests[source_rows], source.error_bytes[source_rows]
        checksums = source.checksums[source_rows]
        if self._paths_matter(rows, source, source_rows):
            contents = zip(rows.tolist(), digests, errors, features, status, strict=True)
            for place, (row, digest, error, values, state) in enumerate(contents):
                kept = values if state == DONE else None
                checksums[place] = self.cache.checksum(row, digest, error, kept)
        for run in runs(rows):
            first = int(rows[run.start])
            self._put("features", first, features[run])
            self._put("digests", first, digests[run])
            self._put("errors", first, errors[run])
            self._put("checksums", first, checksums[run])
        for kind in (DONE, UNREADABLE):
            self._mark(rows[status == kind], kind)

    def _paths_matter(
        self, rows: NDArray[np.int64], source: FeatureCache, source_rows: NDArray[np.int64]
    ) -> bool:
        """Whether the checksums of these rows differ from those of the source's."""
        covered = self.cache.format_version > 2
        if covered != (source.format_version > 2):
            return True
        return covered and self.cache.paths.raws(rows) != source.paths.raws(source_rows)

    def retry_unreadable(self) -> int:
        """Make all unreadable rows pending again. Returns how many there were."""
        rows = np.flatnonzero(self._status == UNREADABLE)
        self._mark(rows, PENDING)
        self.flush()
        return len(rows)

    def flush(self) -> None:
        """Sync everything written so far to the disk, then write the status of these rows.

        Raises CacheError if the disk fails, or if another program has cut the file off or written
        over it. Rows written since the last flush then stay pending,
        and the writer refuses all further work: the system reports a lost write only once, so a
        second sync would succeed without these rows.
        """
        self._check_usable()
        if not self._dirty:
            return
        self.cache.check_unchanged()
        self._sync(os.fdatasync)
        rows = np.unique(np.concatenate(self._dirty))
        for run in runs(rows):
            self._put("status", int(rows[run.start]), self._status[rows[run]])
        self._dirty.clear()

    def close(self) -> None:
        """Flush, and release the file. Raises CacheError if the disk fails or has failed."""
        if self._fd < 0:
            return
        try:
            self.flush()
            self._sync(os.fsync)
        finally:
            os.close(self._fd)
            self._fd = -1

    def _sync(self, sync: Callable[[int], None]) -> None:
        try:
            sync(self._fd)
        except OSError as error:
            self._failed = self._failure(error)
            unsynced = np.concatenate([np.zeros(0, np.int64), *self._dirty])
            self._status[unsynced] = self.cache.status[unsynced]
            self._dirty.clear()
            raise self._failed from None

    def _check_usable(self) -> None:
        if self._failed is not None:
            raise self._failed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except CacheError:
            if error is None:  # otherwise the first error is the one to report
                raise

    def _record(self, versions: Mapping[str, str]) -> None:
        """Note the library versions behind rows that are about to be written, where they are new.

        Caches of format version 2 have no place for that. A note that does not fit is left out.
        """
        joined = join_versions([self._versions, versions])
        if joined == self._versions or not len(self.cache.later_versions):
            return
        new = {name: v for name, v in versions.items() if joined[name] != self._versions.get(name)}
        line = np.frombuffer(pack_versions(new), np.uint8)
        _, length = unpack_versions(self.cache.later_versions.tobytes())
        if length + len(line) <= len(self.cache.later_versions):
            self._put("later_versions", length, line)
        self._versions = joined

    def _mark(self, rows: NDArray[np.int64], status: int) -> None:
        self._status[rows] = status
        self._dirty.append(rows)

    def _put(self, name: str, row: int, values: NDArray[Any] | np.generic) -> None:
        self._check_usable()
        region = self.cache.region(name)
        stride = math.prod(region.shape[1:]) * region.dtype.itemsize
        data = np.ascontiguousarray(values, region.dtype).reshape(-1).view(np.uint8).data
        position = region.offset + row * stride
        try:
            while data:
                written = os.pwrite(self._fd, data, position)
                data, position = data[written:], position + written
        except OSError as error:
            raise self._failure(error) from None

    def _failure(self, error: OSError) -> CacheError:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        return CacheError(f"{self.path}: cannot write ({reason}); {self._advice}")


def open_writer(
    path: str | Path,
    skeleton: Skeleton,
    *,
    library_versions: Mapping[str, str],
    overwrite: bool = False,
) -> CacheWriter:
    """Start a cache at `path`, or continue the one there if it was made from the same skeleton.

    A continued file keeps its own `batch_rows`, whatever the skeleton says: see `Skeleton`. A
    symbolic link is followed.

    Raises CacheError if another process is writing it, if the file there is no cache, or differs
    (naming the field) and `overwrite` is off, or if the folder cannot be written to.
    """
    path = followed(Path(path))
    while True:
        existing = lock_existing(path)
        try:
            if existing is not None and not overwrite:
                _check_same(path, skeleton)
                remove_leftovers(path)
                writer = CacheWriter(path, existing, library_versions)
                existing = None  # the writer closes it now
                return writer
            with new_file(path) as temporary:
                fd = create_file(temporary, skeleton, library_versions)
                try:
                    if publish(temporary, fd, path, replace=existing is not None):
                        return CacheWriter(path, os.dup(fd), library_versions)
                finally:
                    os.close(fd)
        finally:
            if existing is not None:
                os.close(existing)


@contextlib.contextmanager
def new_cache(
    path: Path, skeleton: Skeleton, *, library_versions: Mapping[str, str], overwrite: bool = False
) -> Iterator[CacheWriter]:
    """A writer for a cache that appears at `path` when the block ends without an error.

    Raises CacheError as `open_writer` does, and if a file is there and `overwrite` is off.
    """
    path = followed(path)
    existing = lock_existing(path)
    there = CacheError(f"{path}: already exists; name another --out, or --overwrite it")
    try:
        if existing is not None and not overwrite:
            raise there
        with new_file(path) as temporary:
            fd = create_file(temporary, skeleton, library_versions)
            try:
                with CacheWriter(
                    temporary, os.dup(fd), library_versions, "no file was made"
                ) as writer:
                    yield writer
                if not publish(temporary, fd, path, replace=existing is not None):
                    raise there
            finally:
                os.close(fd)
    finally:
        if existing is not None:
            os.close(existing)


def followed(path: Path) -> Path:
    """The file that `path` leads to.

    Raises CacheError if it is a link into a folder that is missing. That may be a disk that is not
    there now, so the folder is not made.
    """
    target = follow_link(path)
    if target != path and not os.path.isdir(target.parent):
        raise CacheError(f"{target.parent}: no such folder, where the link {path} leads")
    return target


def check_place(path: Path) -> None:
    """Raise CacheError before any work is done if `open_writer` could not start at `path`, or if
    a catalogue is there.
    """
    if is_catalogue(path):
        raise CacheError(f"{path}: {FILLS_NO_CATALOGUE}")
    path = followed(path)
    fd = lock_existing(path)
    if fd is not None:
        os.close(fd)
    if not os.access(folder_above(path), os.W_OK):
        raise CacheError(f"{path}: cannot write (the folder is read-only)")


def _share(shard: Shard | None) -> str:
    return "all photos" if shard is None else f"--shard {shard}"


def _check_same(path: Path, skeleton: Skeleton) -> None:
    there = FeatureCache(path)
    if there.shards is not None:
        raise CacheError(f"{path}: {FILLS_NO_CATALOGUE}")
    advice = "Use another --out, or --overwrite."
    difference = there.encoder.difference(skeleton.encoder)
    if difference is None and str(there.shard) != str(skeleton.shard):
        difference = f"{_share(there.shard)}, not {_share(skeleton.shard)}"
    if difference is None:
        advice = "Use --update, which keeps its features, another --out, or --overwrite."
    if difference is None and there.photos_sha256 != skeleton.photos_sha256():
        if len(there) == len(skeleton.paths):
            difference = "other photos (names, ids or order), not those asked for"
        else:
            difference = f"{len(there):,} photos, not {len(skeleton.paths):,}"
    if difference is None:
        difference = there.captions.other_tokenizer(skeleton.captions)
    if difference is None and there.captions_sha256 != skeleton.captions.sha256():
        difference = "other captions, not those asked for"
    if difference is None and there.shard is not None and skeleton.shard is not None:
        # `cap merge` would refuse the shard, after the hours that the others take.
        if there.shard.all_photos_sha256 != skeleton.shard.all_photos_sha256:
            difference = "other photos in the other shards, not those asked for"
        elif there.shard.all_captions_sha256 != skeleton.shard.all_captions_sha256:
            difference = "other captions in the other shards, not those asked for"
    if (
        difference is None
        and there.numbered is not None
        and skeleton.numbered is not None
        and not np.array_equal(there.numbered, skeleton.numbered)
    ):
        difference = "other kinds of image ids (numbers or text), not those asked for"
    if difference is not None:
        raise CacheError(f"{path}: written with {difference}. {advice}")
