"""The feature cache: one HDF5 file per split. It survives a kill and is read at memory speed.

Format, version 2. N photos, V views, D features, M captions, K tokens, W words.

- Bytes 0–16383: the seal (`cache.seal`). From byte 16384: an ordinary HDF5 file, for other
  programs. This one reads the arrays at the places given in the seal.
- All datasets are contiguous, little-endian, and allocated in full when the file is made. The file
  is written as `NAME.tmp`, synced and renamed. After that only the bytes of the five mutable arrays
  change, so the file is valid whenever the writer is killed.
- Mutable, written row by row:
  - `features`  (N, V, D) float16
  - `status`    (N,) uint8: 0 pending, 1 done, 2 unreadable. Written after the rest of the row.
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
    int64. A vocabulary of all the captions is a prefix of `words` for any minimum count.
- Root attributes: `format_version`, `backbone`, `weights`, `weights_sha256`, `feature_dim`,
  `image_size`, `views` (comma-separated), `preprocessing`, `precision`, `batch_rows`,
  `photos_sha256`, `captions_sha256`, `tokenizer` (0.1.0 wrote none), `library_versions` (JSON). A
  shard of a larger set of photos has five more: `shard` (as in `2/8`), `shard_first_row`,
  `all_rows`, `all_photos_sha256`, `all_captions_sha256`.

There are no timestamps, so the same photos and the same encoder give the same bytes.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.record import FIRST_TOKENIZER, CacheError, CaptionTable, EncoderRecord, Shard, Strings
from cache.seal import Region, Seal, check_seal

PENDING, DONE, UNREADABLE = 0, 1, 2
DIGEST_BYTES = 16
ERROR_BYTES = 96

_READ_BYTES = 1 << 24  # at a time


def row_checksum(
    digest: NDArray[np.uint8],
    error: NDArray[np.uint8],
    features: NDArray[np.float16] | None,
) -> int:
    """CRC-32 of a row: of its digest, its error bytes and, if it is done, its features."""
    crc = zlib.crc32(error.tobytes(), zlib.crc32(digest.tobytes()))
    return crc if features is None else zlib.crc32(features.tobytes(), crc)


class FeatureCache:
    """A cache open for reading. Arrays are memory-mapped, and strings are decoded when asked for.

    `cache.features[rows]` reads only those rows. Open one with `open_cache`. Pickling stores only
    the path, so a cache can be passed to other processes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        fd = _open(path)
        try:
            seal = check_seal(fd)
            status = os.fstat(fd)
            self._file_id = status.st_dev, status.st_ino
            self._mapped = mmap.mmap(fd, seal.size_bytes, prot=mmap.PROT_READ)
            self._take(seal)
        except CacheError as error:
            raise CacheError(f"{path}: {error}") from None
        except OSError as error:
            raise CacheError(f"{path}: cannot read ({error.strerror})") from None
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
            raise CacheError(f"{path}: damaged (its record is invalid)") from None
        finally:
            os.close(fd)

    def _take(self, seal: Seal) -> None:
        """Set the attributes from the arrays. Raises CacheError, KeyError or ValueError if they are
        not those of a cache.

        The seal's checksums reveal accidents. The checks here are against files made with intent:
        every number that is later used as an index is checked once.
        """
        self._regions = seal.arrays
        self.features: NDArray[np.float16] = self._map("features", "<f2", 3)  # (N, V, D)
        rows = len(self.features)
        self.status: NDArray[np.uint8] = self._map("status", "|u1", 1, rows)  # (N,)
        self.digests: NDArray[np.uint8] = self._map("digests", "|u1", 2, rows)  # (N, 16)
        self.checksums: NDArray[np.uint32] = self._map("checksums", "<u4", 1, rows)  # (N,)
        self.error_bytes: NDArray[np.uint8] = self._map("errors", "|u1", 2, rows)  # (N, 96)
        self.image_ids = self._strings("image_ids", rows)
        self.paths = self._strings("paths", rows)
        texts, words = self._strings("captions"), self._strings("words")
        tokens: NDArray[np.int32] = self._map("captions/tokens", "<i4", 1)
        self.captions = CaptionTable(
            texts=texts,
            rows=self._map("captions/rows", "<i4", 1, len(texts)),
            tokens=tokens,
            token_offsets=self._offsets("captions/token_offsets", len(tokens), len(texts)),
            words=words,
            counts=self._map("words/counts", "<i8", 1, len(words)),
            tokenizer=str(seal.attributes.get("tokenizer", FIRST_TOKENIZER)),
        )
        self.encoder, self.batch_rows, self.shard = _made_by(seal.attributes)
        self.photos_sha256 = str(seal.attributes["photos_sha256"])
        self.captions_sha256 = str(seal.attributes["captions_sha256"])
        self.library_versions: dict[str, str] = {
            str(name): str(version)
            for name, version in json.loads(str(seal.attributes["library_versions"])).items()
        }
        captions = self.captions
        shape = (rows, len(self.encoder.views), self.encoder.feature_dim)
        if (
            self.features.shape != shape
            or self.digests.shape != (rows, DIGEST_BYTES)
            or self.error_bytes.shape != (rows, ERROR_BYTES)
            or not _within(captions.rows, rows)
            or (np.diff(captions.rows) < 0).any()
            or not _within(captions.tokens, len(words))
            or (captions.counts < 1).any()
            or (np.diff(captions.counts) > 0).any()
        ):
            raise CacheError("damaged (its arrays do not fit together); extract again")
        if self.status.max(initial=0) > UNREADABLE:
            raise CacheError("damaged (a row has an unknown status); extract again")

    def _map(self, name: str, dtype: str, dimensions: int, rows: int | None = None) -> NDArray[Any]:
        region = self._regions[name]
        if region.dtype.str != dtype or len(region.shape) != dimensions:
            raise CacheError(f"damaged ({name} has another type or shape); extract again")
        if rows is not None and region.shape[0] != rows:
            raise CacheError(f"damaged ({name} has {region.shape[0]} rows, not {rows})")
        if not region.size_bytes:
            return np.zeros(region.shape, region.dtype)
        return np.ndarray(region.shape, region.dtype, self._mapped, region.offset)

    def _offsets(self, name: str, end: int, parts: int | None = None) -> NDArray[np.int64]:
        """Map the offsets of consecutive parts, the last of which ends at `end`."""
        offsets = self._map(name, "<i8", 1, None if parts is None else parts + 1)
        if not len(offsets) or offsets[0] or offsets[-1] != end or (np.diff(offsets) < 0).any():
            raise CacheError(f"damaged ({name} are not ascending); extract again")
        return offsets

    def _strings(self, name: str, count: int | None = None) -> Strings:
        text: NDArray[np.uint8] = self._map(f"{name}/text", "|u1", 1)
        return Strings(text, self._offsets(f"{name}/offsets", len(text), count))

    def __reduce__(self) -> tuple[type[FeatureCache], tuple[Path]]:
        return FeatureCache, (self.path,)

    def __len__(self) -> int:
        return len(self.status)

    def load_features(self) -> NDArray[np.float16]:
        """Read all features (N, V, D) into memory, which is faster than copying the mapped file.

        Raises CacheError if the file cannot be read in full.
        """
        region = self._regions["features"]
        features = np.empty(region.shape, region.dtype)
        left = features.reshape(-1).view(np.uint8).data
        try:
            with self.path.open("rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if (status.st_dev, status.st_ino) != self._file_id:
                    raise CacheError(f"{self.path}: has been replaced since it was opened")
                file.seek(region.offset)
                while len(left):
                    count = file.readinto(left[:_READ_BYTES])
                    if not count:
                        raise CacheError(f"{self.path}: the file has become shorter")
                    left = left[count:]
        except OSError as error:
            raise CacheError(f"{self.path}: cannot read ({error.strerror})") from None
        return features

    def region(self, name: str) -> Region:
        """Where an array lies in the file."""
        return self._regions[name]

    def forget_pages(self) -> None:
        """Release the memory of rows that were read. They are read again when needed."""
        self._mapped.madvise(mmap.MADV_DONTNEED)

    def rows_with(self, status: int) -> NDArray[np.int64]:
        """Row numbers with this status (PENDING, DONE or UNREADABLE), ascending."""
        return np.flatnonzero(self.status == status)

    def error(self, row: int) -> str:
        """Why a row is unreadable."""
        return str(self.error_bytes[row].tobytes().rstrip(b"\0"), "utf-8", "replace")

    def errors(self) -> list[tuple[str, str]]:
        """(path, reason) of every unreadable photo."""
        return [(self.paths[row], self.error(row)) for row in self.rows_with(UNREADABLE).tolist()]

    def row_is_intact(self, row: int) -> bool:
        """Whether a done or unreadable row still has the checksum it was written with."""
        features = self.features[row] if self.status[row] == DONE else None
        expected = row_checksum(self.digests[row], self.error_bytes[row], features)
        return expected == int(self.checksums[row])


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


def _made_by(attributes: Mapping[str, str | int]) -> tuple[EncoderRecord, int, Shard | None]:
    """(encoder, batch_rows, shard) from a cache's attributes. Raises KeyError or ValueError."""
    encoder = EncoderRecord(
        backbone=str(attributes["backbone"]),
        weights=str(attributes["weights"]),
        weights_sha256=str(attributes["weights_sha256"]),
        feature_dim=int(attributes["feature_dim"]),
        image_size=int(attributes["image_size"]),
        views=tuple(str(attributes["views"]).split(",")),
        preprocessing=str(attributes["preprocessing"]),
        precision=str(attributes["precision"]),
    )
    batch_rows = int(attributes["batch_rows"])
    if min(batch_rows, encoder.image_size, encoder.feature_dim) < 1:
        raise ValueError("sizes are positive")
    if "shard" not in attributes:
        return encoder, batch_rows, None
    number, count = map(int, str(attributes["shard"]).split("/"))
    shard = Shard(
        number=number,
        count=count,
        first_row=int(attributes["shard_first_row"]),
        all_rows=int(attributes["all_rows"]),
        all_photos_sha256=str(attributes["all_photos_sha256"]),
        all_captions_sha256=str(attributes["all_captions_sha256"]),
    )
    if not 1 <= number <= count or not 0 <= shard.first_row < shard.all_rows:
        raise ValueError("no such shard")
    return encoder, batch_rows, shard


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
