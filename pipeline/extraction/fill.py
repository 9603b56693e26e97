"""Filling the pending rows of a cache: known photos are copied, the others encoded."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cache.errors import CapError
from cache.store import DONE, PENDING, UNREADABLE
from cache.writer import CacheWriter
from pipeline.encoder.backbone import Backbone
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.precision import check_device
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.device_workers import encode_on_devices
from pipeline.extraction.encode_batches import encode_batches, pending_batches
from pipeline.extraction.feature_checks import EncodedBatch
from pipeline.extraction.reuse import KnownPhotos, copy_known, new_rows
from pipeline.photos.readers.start import reader_count
from pipeline.photos.sources.source import Source

_FLUSH_INTERVAL_S = 2.0

Stage = Literal["looking", "comparing", "copying", "extracting"]


class ExtractError(CapError):
    """Raised when an extraction cannot continue. The message is one line."""


@dataclass(frozen=True)
class Notice:
    """A message for the user, one line."""

    text: str
    detail: bool = False  # it asks for nothing


@dataclass(frozen=True)
class Progress:
    """How far an extraction is, counting all runs of the command so far."""

    done: int
    unreadable: int
    total: int
    new: int  # photos that this run has encoded or found unreadable
    copied: int  # photos that this run has copied from another cache
    elapsed_s: float  # of this run, from its first photo
    photos_per_s: float  # of this stage in this run
    # While comparing, nothing is written, and `done` counts photos that were read. While looking
    # for photos in tars and Parquet files, it counts these.
    stage: Stage = "extracting"


class CacheFiller:
    """Fills the pending rows of a cache, and counts and times this run."""

    def __init__(self, writer: CacheWriter, config: ExtractConfig, source: Source) -> None:
        self._writer, self._config, self._source = writer, config, source
        self._threads = reader_count(config.workers)
        self._done = self._unreadable = self._new = self._copied = 0
        self._start = self._last_flush = time.perf_counter()
        self._begin("extracting")

    def fill(
        self,
        backbone: Backbone,
        devices: Sequence[torch.device],
        known: KnownPhotos | None = None,
        *,
        packed: bool = False,
        encoder: Encoder | None = None,
    ) -> Generator[Notice | Progress, None, None]:
        """Fill the pending rows; yields notices and progress, at the end the final progress.

        packed: whether the pending rows fill the batches one after the other. Otherwise each row
        has its own place, and the more rows are done, the more places are black. encoder: the
        backbone on the first device, if it is ready already. Raises as `extract` does.
        """
        writer = self._writer
        self._done = int(np.count_nonzero(writer.status == DONE))
        self._unreadable = int(np.count_nonzero(writer.status == UNREADABLE))
        self._begin("extracting" if known is None else "copying")
        yield self._progress()
        order = np.arange(len(writer.cache))
        if known is not None:
            copies = copy_known(writer, known, self._source, self._threads)
            for copied, unreadable in copies:
                self._copied += copied
                self._done += copied
                self._new += unreadable
                self._unreadable += unreadable
                self._flush_now_and_then()
                yield self._progress()
            order = new_rows(writer, known)
            count = len(order)
            yield Notice(f"{len(writer.cache) - count:,} photos are known; encoding the others")
        if packed:
            # An interruption leaves whole batches, so the rows that are then pending fill the same
            # batches again.
            order = np.flatnonzero(writer.status == PENDING)
        writer.flush()
        self._begin("extracting")
        for item in self._encoded(backbone, devices, order, encoder):
            if isinstance(item, str):
                yield Notice(item)
            else:
                self._store(item)
                yield self._progress()
        writer.flush()
        yield self._progress()

    def _begin(self, stage: Stage) -> None:
        self._stage: Stage = stage
        self._stage_start, self._stage_before = time.perf_counter(), self._new + self._copied

    def _encoded(
        self,
        backbone: Backbone,
        devices: Sequence[torch.device],
        order: NDArray[np.int64],
        encoder: Encoder | None,
    ) -> Iterator[EncodedBatch | str]:
        """The pending rows of `order`, batch by batch, as they are ready; a str is a notice."""
        cache, config = self._writer.cache, self._config
        batches = pending_batches(order, self._writer.status, cache.batch_rows)
        if not batches:
            return iter(())
        check_device(cache.encoder.precision, devices[0])
        readers = reader_count(config.workers, devices[0].type)
        if min(len(devices), len(batches)) > 1:
            return encode_on_devices(
                cache,
                order,
                batches,
                devices,
                source=self._source,
                weights=backbone.weights,
                readers=readers,
                decoder=config.decoder,
            )
        return encode_batches(
            backbone,
            cache.encoder,
            devices[0],
            order,
            batches,
            source=self._source,
            paths=cache.paths,
            batch_rows=cache.batch_rows,
            readers=readers,
            decoder=config.decoder,
            encoder=encoder,
        )

    def _store(self, encoded: EncodedBatch) -> None:
        writer = self._writer
        # If the folder is gone, as when a drive is unplugged, its photos are not unreadable.
        if encoded.unreadable and self._source.is_gone():
            raise ExtractError(
                f"{self._source.label}: the folder is gone; what is done is kept, run the same "
                "command again to continue"
            )
        for row, reason, digest in encoded.unreadable:
            writer.set_unreadable(row, reason, digest)
        if len(encoded.rows):
            writer.write(encoded.rows, encoded.features, encoded.digests)
        self._done += len(encoded.rows)
        self._unreadable += len(encoded.unreadable)
        self._new += len(encoded.rows) + len(encoded.unreadable)
        self._flush_now_and_then()

    def _flush_now_and_then(self) -> None:
        if time.perf_counter() - self._last_flush > _FLUSH_INTERVAL_S:
            self._writer.flush()
            self._last_flush = time.perf_counter()

    def _progress(self) -> Progress:
        now = time.perf_counter()
        stage_s = now - self._stage_start
        count = self._new + self._copied - self._stage_before
        return Progress(
            done=self._done,
            unreadable=self._unreadable,
            total=len(self._writer.cache),
            new=self._new,
            copied=self._copied,
            elapsed_s=now - self._start,
            photos_per_s=count / stage_s if stage_s > 0 else 0.0,
            stage=self._stage,
        )
