"""Checks whether a cache is unchanged, by its checksums and by the digests of its photos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cache.record import CacheError, photos_sha256, unpack_versions
from cache.store import DONE, PENDING, FeatureCache

_BLOCK_ROWS = 256  # read together: about a megabyte, which stays in the processor's cache


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found. The lists hold messages of the form `path: what is wrong`."""

    rows: int
    pending: int
    damaged: list[str] = field(default_factory=list)
    sampled: int = 0  # photos compared with their files
    changed: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.damaged and not self.changed


def damaged_rows(cache: FeatureCache, rows: NDArray[np.int64]) -> list[tuple[int, str]]:
    """(row, what is wrong with it) for each of these finished rows (R,) that is damaged.

    A row is damaged if it does not match its checksum or, if it is done, has features that are not
    finite. Extraction writes no such features, but a cache may come from another program. The check
    takes 0.2 s for COCO's 82,783 rows of 4 kB.
    """
    found: list[tuple[int, str]] = []
    for start in range(0, len(rows), _BLOCK_ROWS):
        part = rows[start : start + _BLOCK_ROWS]
        found += _damaged(cache, part, cache.read_rows(part))
    return found


def _damaged(
    cache: FeatureCache, rows: NDArray[np.int64], features: NDArray[np.float16]
) -> list[tuple[int, str]]:
    # Eleven times as fast as `np.isfinite`: without the sign, a float16 that is infinite or NaN is
    # at least 0x7c00.
    finite = (features.view("<u2") & 0x7FFF).max(axis=(1, 2)) < 0x7C00
    intact = cache.intact(rows, features)
    found: list[tuple[int, str]] = []
    if all(intact) and finite[cache.status[rows] == DONE].all():
        return found
    for place, row in enumerate(rows.tolist()):
        if not intact[place]:
            found.append((row, "does not match its checksum"))
        elif cache.status[row] == DONE and not finite[place]:
            found.append((row, "has features that are not finite (NaN or infinity)"))
    return found


def check_rows(cache: FeatureCache, rows: NDArray[np.int64]) -> None:
    """Raise CacheError if one of these finished rows is damaged, before their features are used.

    rows: (R,); a row may occur several times.
    """
    rows = np.unique(rows)
    _refuse(cache, rows, damaged_rows(cache, rows))


def check_features(
    cache: FeatureCache, rows: NDArray[np.int64], features: NDArray[np.float16]
) -> None:
    """As `check_rows`, of features (R, V, D) that have just been read."""
    for start in range(0, len(rows), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        _refuse(cache, rows, _damaged(cache, rows[part], features[part]))


def _refuse(cache: FeatureCache, rows: NDArray[np.int64], damaged: list[tuple[int, str]]) -> None:
    if damaged:
        row, what = damaged[0]
        raise CacheError(
            f"{cache.path}: {len(damaged):,} of {len(rows):,} photos are damaged "
            f"(first: {cache.paths[row]}, row {row}, {what}); "
            f"`cap verify {cache.path}` names them, extract them again"
        )


def verify(
    cache: FeatureCache,
    digest_of: Callable[[str], NDArray[np.uint8]] | None = None,
    images: str | None = None,
    *,
    sample: int = 64,
    seed: int = 0,
) -> tuple[VerifyReport, NDArray[np.int64]]:
    """Check the checksums of all finished rows, that their features are finite, the digests of
    names and captions, and the digests of a random sample of photos.

    digest_of: reads a photo, by its path in the cache, and returns its (16,) uint8 digest, or
    raises OSError. images: where the photos are, in words. sample: number of photos, for which
    `images` and `digest_of` are needed. Returns the report and the sampled
    rows whose photos are unchanged. Raises CacheError if what the seal covers is damaged.
    """
    cache.check()
    finished = np.flatnonzero(cache.status != PENDING)
    damaged = [
        f"{cache.paths[row]}: row {row} {what}" for row, what in damaged_rows(cache, finished)
    ]
    # The seal covers these too, but only against accidents.
    if photos_sha256(cache.image_ids, cache.paths) != cache.photos_sha256:
        damaged.append(f"{cache.path}: the names of its photos are not those it was made with")
    if cache.captions.sha256() != cache.captions_sha256:
        damaged.append(f"{cache.path}: its captions are not those it was made with")
    later = cache.later_versions.tobytes()
    if any(later[unpack_versions(later)[1] :]):
        damaged.append(f"{cache.path}: its list of library versions is damaged")
    changed: list[str] = []
    same: list[int] = []
    missing = 0
    done = cache.rows_with(DONE)
    chosen = np.random.default_rng(seed).permutation(done)[:sample] if images else done[:0]
    for row in np.sort(chosen).tolist():
        assert digest_of is not None
        path = cache.paths[row]
        try:
            if np.array_equal(digest_of(path), cache.digests[row]):
                same.append(row)
            else:
                changed.append(f"{path}: the photo has changed since its features were extracted")
        except OSError as error:
            missing += isinstance(error, FileNotFoundError)
            changed.append(f"{path}: {error.strerror or error}")
    if missing > 1 and missing == len(chosen):  # probably the wrong folder
        changed = [
            f"{images}: none of the {missing} photos looked for is there, for example {path}"
        ]
    report = VerifyReport(
        rows=len(cache),
        pending=len(cache) - len(finished),
        damaged=damaged,
        sampled=len(chosen),
        changed=changed,
    )
    return report, np.array(same, np.int64)
