"""The feature cache: one HDF5 file per split. It survives a kill and is read at memory speed.

Format, version 3. N photos, V views, D features, M captions, K tokens, W words.

- Bytes 0–16383: the seal (`cache.seal`). From byte 16384: an ordinary HDF5 file, for other
  programs. This one reads the arrays at the places given in the seal.
- All datasets are contiguous, little-endian, and allocated in full when the file is made. The file
  gets its name when it is complete and synced. After that only the bytes of the mutable arrays
  change, so it is valid whenever the writer is killed.
- Mutable, written row by row:
  - `features`  (N, V, D) float16
  - `status`    (N,) uint8: 0 pending, 1 done, 2 unreadable. Written after the rest of the row.
  - `digests`   (N, 16) uint8: BLAKE2b-128 of the photo's file, zeros where it could not be read
  - `errors`    (N, 96) uint8: why a row is unreadable, UTF-8 padded with zeros
  - `checksums` (N,) uint32: CRC-32 of the row's path, then its digest, then its error, then (done
    rows only) its features. In version 2 without the path
  - `later_versions` (4096,) uint8: the library versions of later sessions that filled the cache, a
    line for each, then zeros. Not in version 2
- Fixed. A list of strings is a group of `text` (uint8, UTF-8, one after the other) and `offsets`
  (int64, one more than there are strings):
  - `image_ids/…`, `paths/…`: N each; paths are relative to the image folder
  - `image_ids/numbers` (N,) uint8: 1 if the id was a number in the captions file, 0 if it was text.
    Missing where that is unknown
  - `captions/text`, `captions/offsets`: M raw captions
  - `captions/rows` (M,) int32: the photo of each caption, ascending
  - `captions/tokens` (K,) int32 and `captions/token_offsets` (M + 1,) int64: tokens as indices into
  - `words/…`: W distinct tokens by descending frequency, ties alphabetical; `words/counts` (W,)
    int64. A vocabulary of all the captions is a prefix of `words` for any minimum count.
- Root attributes: `format_version`, `backbone`, `weights`, `weights_sha256`, `feature_dim`,
  `image_size`, `views` (comma-separated), `preprocessing`, `precision`, `batch_rows`,
  `photos_sha256`, `captions_sha256`, `tokenizer` (0.1.0 wrote none), `library_versions` (JSON). A
  shard of a larger set of photos has five more: `shard` (as in `2/8`), `shard_first_row`,
  `all_rows`, `all_photos_sha256`, `all_captions_sha256`.

A catalogue is such a file without `features`, which are in other caches; see
`cache.derived.shards`.

There are no timestamps, so the same photos and the same encoder give the same bytes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import mmap
import operator
import os
import stat
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, SupportsIndex, cast

import numpy as np
from numpy.typing import NDArray

from cache.derived.rows import read_into, runs
from cache.derived.shards import SEAL_DIGEST_BYTES, Listed, ShardedFeatures, seal_digest
from cache.record import (
    FIRST_TOKENIZER,
    CacheError,
    CaptionTable,
    Strings,
    join_versions,
    made_by,
    unpack_versions,
)
from cache.seal import SEAL_BYTES, Region, Seal, check_array, check_seal

PENDING, DONE, UNREADABLE = 0, 1, 2
DIGEST_BYTES = 16
ERROR_BYTES = 96
LATER_VERSIONS_BYTES = 4096
_DO_NOT_FIT = "damaged (its arrays do not fit together); extract again"


class FeatureCache:
    """A cache open for reading. Arrays are memory-mapped, and strings are decoded when asked for.

    Opening reads neither names nor captions, so it takes milliseconds for any number of photos.
    `image_ids`, `paths`, `numbered` and `captions` are checked when they are first used, and then
    raise CacheError if they are damaged. `check` checks them all.

    `cache.features[rows]` reads only those rows. Open one with `open_cache`. Pickling stores only
    the path, so a cache can be passed to other processes.

    A catalogue is read like any other cache, but its features are in other files. So `features` is
    no array then, but a `ShardedFeatures`, which is indexed like one.

    If another program cuts the file off, the system kills a process that then touches the mapping
    (SIGBUS), and Python cannot prevent that. So whatever reads many rows uses `read_rows`, which
    does not touch it, or calls `check_unchanged` before each part.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        self._rows: dict[str, int] | None = None  # by path and by image id
        self._fd = _open(path)  # kept, so that all reads are of the file that is mapped
        close = weakref.finalize(self, os.close, self._fd)
        opened = False
        try:
            with _naming(path):
                self._seal = check_seal(self._fd)
                status, size = os.fstat(self._fd), self._seal.size_bytes
                self._size, self._modified_ns = size, status.st_mtime_ns
                self._seal_block = os.pread(self._fd, SEAL_BYTES, 0)
                self._mapped = mmap.mmap(self._fd, size, prot=mmap.PROT_READ)
                self._take(self._seal)
            opened = True
        finally:
            if not opened:
                close()

    def _take(self, seal: Seal) -> None:
        """Set the attributes. Raises CacheError, KeyError or ValueError if the arrays are not those
        of a cache.

        The seal's checksums reveal accidents. The checks here and in `_strings`, `_offsets` and
        `captions` are against files made with intent: every number that is later used as an index
        is checked once.
        """
        self._regions = seal.arrays
        self.format_version = seal.version
        self.status: NDArray[np.uint8] = self._map("status", "|u1", 1)  # (N,)
        rows = len(self.status)
        self.digests: NDArray[np.uint8] = self._map("digests", "|u1", 2, rows)  # (N, 16)
        self.checksums: NDArray[np.uint32] = self._map("checksums", "<u4", 1, rows)  # (N,)
        self.error_bytes: NDArray[np.uint8] = self._map("errors", "|u1", 2, rows)  # (N, 96)
        self.encoder, self.batch_rows, self.shard = made_by(seal.attributes)
        self.photos_sha256 = str(seal.attributes["photos_sha256"])
        self.captions_sha256 = str(seal.attributes["captions_sha256"])
        self.tokenizer = str(seal.attributes.get("tokenizer", FIRST_TOKENIZER))
        first_versions = json.loads(str(seal.attributes["library_versions"]))
        self.later_versions: NDArray[np.uint8] = np.zeros(0, np.uint8)
        if "later_versions" in seal.arrays:
            self.later_versions = self._map("later_versions", "|u1", 1)
        # What the cache was made with; where parts of it differ, all versions: "2.13, 2.14".
        self.library_versions = join_versions(
            [
                {str(name): str(version) for name, version in first_versions.items()},
                *unpack_versions(self.later_versions.tobytes())[0],
            ]
        )
        for name in ("image_ids", "paths"):
            self._map(f"{name}/text", "|u1", 1)
            self._map(f"{name}/offsets", "<i8", 1, rows + 1)
        if "image_ids/numbers" in seal.arrays:
            self._map("image_ids/numbers", "|u1", 1, rows)
        self._map("captions/text", "|u1", 1)
        self._map("captions/tokens", "<i4", 1)
        self.caption_count: int = len(self._map("captions/rows", "<i4", 1))
        for name in ("captions/offsets", "captions/token_offsets"):
            self._map(name, "<i8", 1, self.caption_count + 1)
        self._map("words/text", "|u1", 1)
        self.word_count: int = len(self._map("words/counts", "<i8", 1))
        self._map("words/offsets", "<i8", 1, self.word_count + 1)
        shape = (rows, len(self.encoder.views), self.encoder.feature_dim)
        self.shards: ShardedFeatures | None = None  # of a catalogue
        if "features" in seal.arrays:
            self.features: NDArray[np.float16] = self._map("features", "<f2", 3, rows)  # N, V, D
        else:
            self.shards = self._open_shards(shape[1:])
            self.features = cast("NDArray[np.float16]", self.shards)
        if (
            self.features.shape != shape
            or self.digests.shape != (rows, DIGEST_BYTES)
            or self.error_bytes.shape != (rows, ERROR_BYTES)
        ):
            raise CacheError(_DO_NOT_FIT)
        if self.status.max(initial=0) > UNREADABLE:
            raise CacheError("damaged (a row has an unknown status); extract again")

    @functools.cached_property
    def image_ids(self) -> Strings:
        """N ids. Raises CacheError if they are damaged."""
        with self._reading():
            return self._strings("image_ids")

    @functools.cached_property
    def paths(self) -> Strings:
        """N paths below the image folder. Raises CacheError if they are damaged."""
        with self._reading():
            return self._strings("paths")

    @functools.cached_property
    def numbered(self) -> NDArray[np.bool_] | None:
        """(N,) which ids are numbers; None if that is unknown. Raises CacheError."""
        if "image_ids/numbers" not in self._regions:
            return None
        with self._reading():
            numbers: NDArray[np.uint8] = self._fixed("image_ids/numbers", "|u1", 1)
            return numbers.astype(bool)

    @functools.cached_property
    def captions(self) -> CaptionTable:
        """All captions; `caption_count` and `word_count` tell their numbers without reading them.

        Raises CacheError if they are damaged.
        """
        with self._reading():
            texts, words = self._strings("captions"), self._strings("words")
            tokens: NDArray[np.int32] = self._fixed("captions/tokens", "<i4", 1)
            captions = CaptionTable(
                texts=texts,
                rows=self._fixed("captions/rows", "<i4", 1),
                tokens=tokens,
                token_offsets=self._offsets("captions/token_offsets", len(tokens)),
                words=words,
                counts=self._fixed("words/counts", "<i8", 1),
                tokenizer=self.tokenizer,
            )
            if (
                not _within(captions.rows, len(self))
                or (np.diff(captions.rows) < 0).any()
                or not _within(captions.tokens, len(words))
                or (captions.counts < 1).any()
                or (np.diff(captions.counts) > 0).any()
            ):
                raise CacheError(_DO_NOT_FIT)
            return captions

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """For arrays that are read after opening, when the file may have become another."""
        self.check_unchanged()
        with _naming(self.path):
            yield

    def check(self) -> None:
        """Raise CacheError if names or captions are damaged. The rows have checksums of their own,
        see `cache.verify`.
        """
        for name in ("image_ids", "paths", "numbered", "captions"):
            getattr(self, name)

    def _map(self, name: str, dtype: str, dimensions: int, rows: int | None = None) -> NDArray[Any]:
        region = self._regions[name]
        if region.dtype.str != dtype or len(region.shape) != dimensions:
            raise CacheError(f"damaged ({name} has another type or shape); extract again")
        if rows is not None and region.shape[0] != rows:
            raise CacheError(f"damaged ({name} has {region.shape[0]} rows, not {rows})")
        if not region.size_bytes:
            return np.zeros(region.shape, region.dtype)
        return np.ndarray(region.shape, region.dtype, self._mapped, region.offset)

    def _fixed(self, name: str, dtype: str, dimensions: int) -> NDArray[Any]:
        """Map an array that never changes, after a look at its checksum."""
        check_array(self._fd, self._seal, name)
        return self._map(name, dtype, dimensions)

    def _offsets(self, name: str, end: int) -> NDArray[np.int64]:
        """Map the offsets of consecutive parts, the last of which ends at `end`."""
        offsets = self._fixed(name, "<i8", 1)
        if not len(offsets) or offsets[0] or offsets[-1] != end or (np.diff(offsets) < 0).any():
            raise CacheError(f"damaged ({name} are not ascending); extract again")
        return offsets

    def _strings(self, name: str) -> Strings:
        text: NDArray[np.uint8] = self._fixed(f"{name}/text", "|u1", 1)
        return Strings(text, self._offsets(f"{name}/offsets", len(text)))

    def _open_shards(self, row_shape: tuple[int, int]) -> ShardedFeatures:
        paths = self._strings("shards/paths")
        rows: NDArray[np.int64] = self._fixed("shards/rows", "<i8", 1)
        sizes: NDArray[np.int64] = self._fixed("shards/sizes", "<i8", 1)
        seals: NDArray[np.uint8] = self._fixed("shards/seals", "|u1", 2)
        if {len(rows), len(sizes), len(seals)} != {len(paths)}:
            raise CacheError("damaged (its list of caches is invalid)")
        if (rows < 0).any() or seals.shape[1] != SEAL_DIGEST_BYTES:
            raise CacheError("damaged (its list of caches is invalid)")
        return ShardedFeatures(
            self.path,
            Path(os.path.realpath(self.path)).parent,
            [
                Listed(*listed)
                for listed in zip(
                    paths, rows.tolist(), sizes.tolist(), map(bytes, seals), strict=True
                )
            ],
            row_shape=row_shape,
            status=self.status,
            checksums=self.checksums,
        )

    def __reduce__(self) -> tuple[type[FeatureCache], tuple[Path]]:
        return FeatureCache, (self.path,)

    def __len__(self) -> int:
        return len(self.status)

    def __getitem__(self, key: SupportsIndex | str) -> NDArray[np.float16]:
        """The features (V, D) of one photo, copied; by its row, path or image id.

        Together with `len`, this is what PyTorch's loaders ask of a dataset. Raises IndexError or
        KeyError if there is no such photo, and CacheError if it has no features.
        """
        row = self.row(key) if isinstance(key, str) else operator.index(key)
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        if self.status[row] != DONE:
            reason = self.error(row) if self.status[row] == UNREADABLE else "not extracted yet"
            raise CacheError(f"{self.path}: no features of {self.paths[row]} ({reason})")
        features: NDArray[np.float16] = self.read_rows(np.array([row]))[0]
        return features

    def row(self, name: str) -> int:
        """The row of the photo with this path or image id. Raises KeyError.

        The first call indexes all names.
        """
        if self._rows is None:
            self._rows = {name: row for row, name in enumerate(self.image_ids)}
            self._rows.update((path, row) for row, path in enumerate(self.paths))
        return self._rows[name]

    def check_unchanged(self) -> None:
        """Raise CacheError if the file was cut off or has got other content since it was opened.

        It takes a microsecond or two. Rows that a writer fills meanwhile are no change.
        """
        try:
            status = os.fstat(self._fd)
            if status.st_size != self._size:
                raise CacheError(
                    f"{self.path}: {status.st_size:,} bytes, but {self._size:,} when it was opened;"
                    " another program has cut it off, copy it here again"
                )
            if status.st_mtime_ns != self._modified_ns:
                if os.pread(self._fd, SEAL_BYTES, 0) != self._seal_block:
                    raise CacheError(
                        f"{self.path}: another program has overwritten it since it was opened; "
                        "start again"
                    )
                self._modified_ns = status.st_mtime_ns
        except OSError as error:
            raise CacheError(f"{self.path}: cannot read ({error.strerror})") from None

    def read_rows(
        self, rows: NDArray[np.int64], out: NDArray[np.float16] | None = None
    ) -> NDArray[np.float16]:
        """Features (B, V, D) of these rows (B,), copied into memory, or into `out`.

        Raises CacheError if the file cannot be read, or was cut off or overwritten meanwhile.
        """
        self.check_unchanged()
        if self.shards is not None:
            return self.shards.read_rows(rows, out)
        region = self._regions["features"]
        features = np.empty((len(rows), *region.shape[1:]), region.dtype) if out is None else out
        row_bytes = region.size_bytes // max(1, region.shape[0])
        for run in runs(rows):
            self._read_into(features[run], region.offset + int(rows[run.start]) * row_bytes)
        return features

    def load_features(self) -> NDArray[np.float16]:
        """Read all features (N, V, D) into memory, which is faster than copying the mapped file.

        Raises CacheError as `read_rows` does.
        """
        return self.read_rows(np.arange(len(self)))

    def _read_into(self, array: NDArray[Any], position: int) -> None:
        """Fill an array with the bytes from `position` on, without touching the mapping."""
        try:
            if not read_into(self._fd, array, position):
                self.check_unchanged()
                raise CacheError(f"{self.path}: the file has become shorter")
        except OSError as error:
            raise CacheError(f"{self.path}: cannot read ({error.strerror})") from None

    def identity(self) -> tuple[int, bytes]:
        """(size in bytes, digest of the seal), by which a catalogue knows this file again."""
        return self._size, seal_digest(self._seal_block)

    def region(self, name: str) -> Region:
        """Where an array lies in the file."""
        return self._regions[name]

    def rows_with(self, status: int) -> NDArray[np.int64]:
        """Row numbers with this status (PENDING, DONE or UNREADABLE), ascending."""
        return np.flatnonzero(self.status == status)

    def error(self, row: int) -> str:
        """Why a row is unreadable."""
        return str(self.error_bytes[row].tobytes().rstrip(b"\0"), "utf-8", "replace")

    def errors(self) -> list[tuple[str, str]]:
        """(path, reason) of every unreadable photo."""
        return [(self.paths[row], self.error(row)) for row in self.rows_with(UNREADABLE).tolist()]

    def checksum(
        self,
        row: int,
        digest: NDArray[np.uint8],
        error: NDArray[np.uint8],
        features: NDArray[np.float16] | None,
    ) -> int:
        """The checksum that a row must have with this content. features: None if unreadable.

        It covers the path, so rows that are exchanged do not match. Version 2 left it out.
        """
        body = None if features is None else features.tobytes()
        return self._crc32(row, digest.tobytes() + error.tobytes(), body)

    def _crc32(self, row: int, head: bytes | memoryview, body: bytes | memoryview | None) -> int:
        crc = zlib.crc32(self.paths.raw(row)) if self.format_version > 2 else 0
        crc = zlib.crc32(head, crc)
        return crc if body is None else zlib.crc32(body, crc)

    def intact(self, rows: NDArray[np.int64], features: NDArray[np.float16]) -> list[bool]:
        """Whether each of these done or unreadable rows (B,) still has its `checksum`.

        features: (B, V, D), of these rows.
        """
        heads = np.hstack([self.digests[rows], self.error_bytes[rows]])
        bodies = np.ascontiguousarray(features).reshape(-1).view(np.uint8).data
        size, body = heads.shape[1], features[:1].nbytes
        head = heads.reshape(-1).data
        done, expected = (self.status[rows] == DONE).tolist(), self.checksums[rows].tolist()
        paths = self.paths.raws(rows) if self.format_version > 2 else [b""] * len(rows)
        crc32, found = zlib.crc32, []
        for n, path in enumerate(paths):
            crc = crc32(head[n * size : (n + 1) * size], crc32(path))
            if done[n]:
                crc = crc32(bodies[n * body : (n + 1) * body], crc)
            found.append(crc == expected[n])
        return found


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns what damaged content raises into a CacheError that names the file."""
    try:
        yield
    except CacheError as error:
        raise CacheError(f"{path}: {error}") from None
    except OSError as error:
        raise CacheError(f"{path}: cannot read ({error.strerror})") from None
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        raise CacheError(f"{path}: damaged (its record is invalid)") from None


def _open(path: Path) -> int:
    try:
        # O_NONBLOCK, because opening a named pipe would wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise CacheError(f"{path}: no such file") from None
    except OSError as error:
        raise CacheError(f"{path}: cannot open ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CacheError(f"{path}: not a feature cache")
    return fd


def _within(values: NDArray[np.int32], end: int) -> bool:
    return not len(values) or (int(values.min()) >= 0 and int(values.max()) < end)


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
