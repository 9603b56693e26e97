"""`cap verify`: compare a cache with its checksums, its photos, and features computed again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cache.store import FeatureCache, open_cache
from cache.verify import VerifyReport, verify
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.errors import EncoderError
from pipeline.photos.decoding import ImageError
from pipeline.photos.photo_file import file_digest, read_file, read_photo
from pipeline.photos.sources.patterns import is_pattern
from pipeline.photos.sources.places import is_address
from pipeline.photos.sources.source import Folder, Source, open_source
from train.device import resolve_device

# The same pixels through the same network give at least this cosine, whatever the machine.
MIN_COSINE = 0.9999
_BATCH_PHOTOS = 32


@dataclass(frozen=True)
class Verification:
    """What was compared, and what was wrong."""

    rows: int
    pending: int
    sampled: int  # photos whose files were compared with their digests
    encoded: int  # photos encoded again
    worst_cosine: float | None  # of stored to recomputed features; None if none was encoded again
    problems: list[str]

    @property
    def ok(self) -> bool:
        return not self.problems

    def summary(self) -> str:
        lines = [
            f"{self.rows:,} rows, {self.pending:,} pending; "
            f"{self.sampled:,} photos compared, {self.encoded:,} encoded again"
        ]
        if self.worst_cosine is not None:
            lines.append(f"worst cosine of stored to recomputed features: {self.worst_cosine:.6f}")
        count = len(self.problems)
        good = "all good" if self.sampled else "the cache is intact; no photo was looked at"
        lines.append(good if self.ok else f"{count:,} problem{'s' if count > 1 else ''}")
        return "\n".join(lines)


def verify_cache(
    cache_path: Path,
    images: Path | str | None,
    *,
    sample: int = 64,
    weights: str | None = None,
    device: str = "auto",
) -> Verification:
    """Check a cache and, if its photos are given, a seeded sample of them.

    images: as for `open_source`. Raises CacheError if the cache cannot be opened at all: its seal
    covers all but the rows; and SourceError if the photos cannot be had.
    """
    cache = open_cache(cache_path, allow_pending=True)
    source = None if images is None else _opened(images)
    label = None if source is None else source.label
    report, unchanged = verify(cache, partial(_digest, source), label, sample=sample)
    problems = [*report.damaged, *report.changed]
    if report.pending:  # by an unfinished run, or by damage to a status byte
        problems.append(
            f"{cache_path}: {report.pending:,} of {report.rows:,} photos are not extracted yet; "
            "run the same `cap extract-features` again to finish it"
        )
    if source is None or not len(unchanged):
        return _verification(report, problems)
    try:
        encoder = Encoder.load(
            cache.encoder, device=resolve_device(device), weights=weights, near=cache_path
        )
    except EncoderError as error:
        return _verification(report, [*problems, f"features not compared: {error}"])
    cosines: list[float] = []
    for row, found in _cosines(cache, encoder, source, unchanged):
        if isinstance(found, str):
            problems.append(f"{cache.paths[row]}: {found}")
            continue
        cosines.append(found)
        if not found >= MIN_COSINE:
            problems.append(
                f"{cache.paths[row]}: stored features have cosine {found:.5f} to those computed now"
            )
    return _verification(report, problems, cosines)


def _verification(
    report: VerifyReport, problems: list[str], cosines: list[float] | None = None
) -> Verification:
    return Verification(
        rows=report.rows,
        pending=report.pending,
        sampled=report.sampled,
        encoded=len(cosines) if cosines else 0,
        worst_cosine=min(cosines) if cosines else None,
        problems=problems,
    )


def _opened(images: Path | str) -> Source:
    if not is_address(str(images)) and not is_pattern(str(images)) and not os.path.exists(images):
        return Folder(Path(images))  # it has no photo, and the report says so
    return open_source(images)


def _digest(source: Source | None, path: str) -> NDArray[np.uint8]:
    assert source is not None
    try:
        return file_digest(read_file(source.place(path)))
    except ImageError as error:
        raise OSError(str(error)) from None


def _cosines(
    cache: FeatureCache, encoder: Encoder, source: Source, rows: NDArray[np.int64]
) -> Iterator[tuple[int, float | str]]:
    """(row, cosine of its stored to the recomputed features, the worst of its views) in turn.

    Instead of a cosine, a text says why a photo could not be read. All of them were there a moment
    ago, with the digests that they should have, but a file may vanish or change at any time.
    """
    size, views = encoder.record.image_size, encoder.record.views
    filter = encoder.preprocessing.filter
    for chunk in np.array_split(rows, -(-len(rows) // _BATCH_PHOTOS)):
        pixels, read = [], []
        for row in chunk.tolist():
            photo = read_photo(source.place(cache.paths[row]), size, views, filter=filter)
            if photo.pixels is None:
                yield row, f"{photo.error} (it was there a moment ago)"
            elif not np.array_equal(photo.digest, cache.digests[row]):
                yield row, "the photo changes while it is being compared"
            else:
                pixels.append(photo.pixels)
                read.append(row)
        if not read:
            continue
        now = encoder.encode(torch.cat(pixels)).float().cpu().unflatten(0, (len(read), len(views)))
        stored = torch.from_numpy(cache.read_rows(np.array(read))).float()
        cosines = torch.cosine_similarity(now, stored, dim=2).amin(1)
        yield from zip(read, cosines.tolist(), strict=True)
