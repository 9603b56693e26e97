"""`--dry-run`: what an extraction would do, how long it would take, and how much disk it needs."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.create import size_bytes
from cache.place import folder_above
from cache.record import CacheError
from cache.store import DONE, PENDING, UNREADABLE, FeatureCache
from cache.writer import open_writer
from pipeline.encoder.precision import check_device
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.digests import other_photos
from pipeline.extraction.encode_batches import encode_batches
from pipeline.extraction.extract import (
    Job,
    is_unfinished,
    library_versions,
    open_asked,
    prepare,
    read_asked,
)
from pipeline.extraction.feature_checks import EncodedBatch
from pipeline.extraction.fill import ExtractError
from pipeline.extraction.update import check_encoder
from pipeline.photos.photo_loader import BatchRequest
from pipeline.photos.readers.start import reader_count

_MEASURED_BATCHES = 3  # the first of them is not timed


@dataclass(frozen=True)
class Plan:
    """What a command would do."""

    cache: Path
    what: str  # in words
    photos: int
    captions: int
    to_encode: int  # photos; those that an older cache has under the same name are not counted
    precision: str
    photos_per_s: float | None  # measured on some of them; None if nothing is to be encoded
    seconds: float | None  # of encoding
    new_bytes: int  # that the disk needs in addition
    free_bytes: int
    notices: list[str]


def plan(config: ExtractConfig) -> Plan:
    """Find out what `extract` would do, without writing anything. Raises what it would raise.

    Encodes some of the photos to measure the speed. Photos that an older cache has under the same
    name count as known; whether their bytes are the same is compared when they are extracted.
    """
    source = open_asked(config)
    photos, understood = read_asked(config, source)
    job = prepare(config, photos, source)
    what, rows, new_bytes = _work(job)
    rate = _rate(job, rows) if len(rows) else None
    return Plan(
        cache=config.out,
        what=what,
        photos=len(job.skeleton.paths),
        captions=len(job.skeleton.captions),
        to_encode=len(rows),
        precision=job.skeleton.encoder.precision,
        photos_per_s=rate,
        seconds=len(rows) / rate if rate else None,
        new_bytes=new_bytes,
        free_bytes=shutil.disk_usage(folder_above(config.out.absolute())).free,
        notices=[*understood, *job.notices],
    )


def _work(job: Job) -> tuple[str, NDArray[np.int64], int]:
    """(what would be done, the rows that would be encoded, how much more disk it takes)."""
    config, skeleton = job.config, job.skeleton
    size = size_bytes(skeleton)
    known = [job.known.cache] if job.known else []
    if job.updates:
        old = FeatureCache(config.out)
        check_encoder(old, skeleton)
        rows = _unknown(job, [old, *known])
        gone = len(set(old.paths) - set(skeleton.paths))
        other = old.captions_sha256 != skeleton.captions.sha256()
        counts = f"{len(skeleton.paths) - len(rows):,} photos are known by name, {gone:,} gone"
        # The new file is made beside the old one.
        return f"would be updated; {counts}{'; other captions' if other else ''}", rows, size
    new = _unknown(job, known)
    by_name = f"; {len(skeleton.paths) - len(new):,} photos are known by name" if known else ""
    if config.out.exists() and (not config.overwrite or is_unfinished(config, skeleton)):
        status = _status(job)
        if status is not None:
            wanted = (PENDING, UNREADABLE) if config.retry_unreadable else (PENDING,)
            rows = np.intersect1d(np.flatnonzero(np.isin(status, wanted)), new)
            done = f"would be continued; {int((status == DONE).sum()):,} photos are done{by_name}"
            finished = not len(rows) and not (status == PENDING).any()
            return "is finished" if finished else done, rows, 0
    return f"would be {'replaced' if config.out.exists() else 'made'}{by_name}", new, size


def _status(job: Job) -> NDArray[np.uint8] | None:
    """The status of the rows of the cache that would be continued; None if --overwrite replaces it.

    Raises CacheError or ExtractError if it cannot be continued.
    """
    config = job.config
    try:
        with open_writer(config.out, job.skeleton, library_versions=library_versions()) as writer:
            threads = reader_count(config.workers)
            problem = other_photos(writer.cache, job.source, threads)
            if problem is not None:
                raise ExtractError(problem)
            return writer.status
    except (CacheError, ExtractError):
        if config.overwrite:
            return None
        raise


def _unknown(job: Job, caches: list[FeatureCache]) -> NDArray[np.int64]:
    """The rows whose names no cache has."""
    names = {cache.paths[row] for cache in caches for row in np.flatnonzero(cache.status).tolist()}
    new = [row for row, path in enumerate(job.skeleton.paths) if path not in names]
    return np.array(new, np.int64)


def _rate(job: Job, rows: NDArray[np.int64]) -> float | None:
    """Photos per second of all devices, measured on the first of these rows; None if no photo of
    them can be read."""
    config, record, batch_rows = job.config, job.skeleton.encoder, job.skeleton.batch_rows
    check_device(record.precision, job.devices[0])
    few = rows[: _MEASURED_BATCHES * batch_rows]
    batches = [
        BatchRequest(first, list(range(first, min(first + batch_rows, len(few)))))
        for first in range(0, len(few), batch_rows)
    ]
    arrived = [time.perf_counter()]
    photos = []
    for item in encode_batches(
        job.backbone,
        record,
        job.devices[0],
        few,
        batches,
        source=job.source,
        paths=job.skeleton.paths,
        batch_rows=batch_rows,
        readers=reader_count(config.workers, job.devices[0].type),
        decoder=config.decoder,
    ):
        if isinstance(item, EncodedBatch):
            arrived.append(time.perf_counter())
            photos.append(len(item.rows) + len(item.unreadable))
    # The first batch also waits for the network and the first files.
    first = 1 if len(photos) > 1 else 0
    seconds = arrived[-1] - arrived[first]
    return len(job.devices) * sum(photos[first:]) / seconds if seconds > 0 else None
