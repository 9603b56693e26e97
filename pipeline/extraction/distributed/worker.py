"""A worker: loads the encoder once, then makes one shard after the other.

It knows nothing of the engine that hands them out. Every method is a generator of messages; what
goes wrong is a message, too.
"""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache.errors import CapError
from cache.record import CacheError, EncoderRecord
from cache.store import DONE, UNREADABLE, FeatureCache, open_cache
from cache.verify import damaged_rows
from cache.writer import check_place
from pipeline.captions.photos import Photos
from pipeline.encoder.backbone import Backbone
from pipeline.encoder.encoder import Encoder, encoder_record
from pipeline.encoder.precision import check_device
from pipeline.encoder.weights import load_backbone
from pipeline.extraction.digests import other_photos
from pipeline.extraction.distributed.lock import LOCK_NAME
from pipeline.extraction.distributed.messages import (
    Chosen,
    Damaged,
    Failed,
    Filled,
    Finished,
    Loaded,
    Message,
    Said,
    Settings,
    ShardTask,
)
from pipeline.extraction.extract import (
    Job,
    fastest_precision,
    fill_cache,
    library_versions,
    skeleton_of,
)
from pipeline.extraction.fill import ExtractError, Notice, Progress
from pipeline.photos.folder import FolderPhotos
from pipeline.photos.readers.start import reader_count
from pipeline.photos.sources.patterns import is_pattern
from pipeline.photos.sources.places import Place, address_of
from pipeline.photos.sources.source import Folder, Source
from train.captions.numbering import number_captions
from train.device import resolve_devices

_PROGRESS_S = 1.0
_SIGHT_S = 20.0  # how long a network drive may hide a new file
_BUSY_S = 60.0  # how long the worker of a killed job may live


class ShardWorker:
    """One process with one encoder. Its methods are called by name, with `call`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        threads = max(1, round(settings.cpus))
        # As `reader_count` does with the cores of a whole machine.
        spared = threads // 8 if settings.config.device == "cuda" else 0
        self._config = replace(settings.config, workers=settings.config.workers or threads - spared)
        torch.set_num_threads(threads)
        self._backbone: Backbone | None = None
        self._encoder: Encoder | None = None
        self._devices: list[torch.device] = []

    def call(self, method: str, arguments: tuple[Any, ...]) -> Iterator[Message]:
        """The messages of a method. What goes wrong is a message, too: `Failed`."""
        try:
            yield from getattr(self, method)(*arguments)
        except CapError as error:
            yield Failed(str(error))
        except Exception as error:  # a bug, or no memory; other shards are none the worse for it
            lines = str(error).splitlines()
            reason = f"{type(error).__name__}: {lines[0] if lines else '(no message)'}"
            yield Failed(reason, traceback.format_exc())

    def load(self) -> Iterator[Message]:
        """Load the encoder, and check that the photos and the job's folder are seen here."""
        config = self._config
        _check_sight(config.images, self._settings.folder, self._settings.token)
        self._devices = resolve_devices(config.device)
        if config.precision != "auto":
            check_device(config.precision, self._devices[0])
        self._backbone = load_backbone(config.backbone, config.weights, config.image_size)
        size = config.image_size or self._backbone.image_size
        self._config = config = replace(config, image_size=size)
        yield Loaded(
            encoder_record(self._backbone, size, config.views, "float32"),
            self._devices[0].type,
            library_versions(),
            tuple(self._backbone.notices),
            tuple(self._backbone.details),
        )

    def choose(self, photos: Photos, places: Sequence[Place] | None) -> Iterator[Message]:
        """Choose the precision by these photos, the first of the job."""
        assert self._backbone is not None
        precision, notices, details = fastest_precision(
            self._config,
            self._source(photos, places),
            self._backbone,
            photos,
            self._devices[0],
        )
        yield Chosen(precision, tuple(notices), tuple(details))

    def _source(self, photos: Photos, places: Sequence[Place] | None) -> Source:
        if places is None:
            return Folder(Path(self._config.images))
        return ListedSource(self._settings.label, list(photos.paths), places)

    def check(self, task: ShardTask, record: EncoderRecord) -> Iterator[Message]:
        """Verify a shard that was finished earlier: `Finished` or `Damaged`. With --overwrite, its
        photos are looked at, too.
        """
        found = verified(task.final, task, record)
        config = self._config
        if config.overwrite and isinstance(found, Finished):
            cache = open_cache(task.final)
            other = other_photos(
                cache, self._source(task.photos, task.places), reader_count(config.workers)
            )
            found = found if other is None else Damaged(_without_advice(other))
        yield found

    def work(self, task: ShardTask, record: EncoderRecord) -> Iterator[Message]:
        """Make a shard, or go on with its draft. The last message is `Finished` or `Failed`."""
        backbone = self._backbone
        assert backbone is not None
        _wait_for(task.draft)
        config = replace(
            self._config,
            out=task.draft,
            precision=record.precision,
            batch_size=task.batch_rows,
            reuse=None,
        )
        devices = self._devices
        if len(devices) == 1 and self._encoder is None:
            self._encoder = Encoder(
                backbone,
                device=devices[0],
                precision=record.precision,
                image_size=record.image_size,
                views=record.views,
            )
        job = Job(
            config=config,
            source=self._source(task.photos, task.places),
            backbone=backbone,
            devices=devices,
            skeleton=skeleton_of(
                task.photos,
                config.tokenizer,
                record,
                task.batch_rows,
                task.shard,
                number_captions(
                    task.photos.texts,
                    task.photos.caption_rows,
                    config.tokenizer,
                    processes=max(1, round(self._settings.cpus)),
                ),
            ),
            known=None,
            updates=False,
            notices=[],
            details=[],
            encoder=self._encoder,
        )
        new, said_s = 0, 0.0
        for item in _filling(job):
            if isinstance(item, Notice):
                going_on = item.text.startswith("going on with")  # as a job does, unlike a command
                yield Said(item.text, item.detail or going_on)
                continue
            new = item.new
            now = time.monotonic()
            if now - said_s > _PROGRESS_S:
                said_s = now
                yield Filled(item.done, item.unreadable, new)
        found = verified(task.draft, task, record)
        if isinstance(found, Damaged):
            raise CacheError(found.reason)
        _publish(task.draft, task.final)
        yield replace(found, new=new)


class ListedSource:
    """Photos whose places are known: those of one shard, in the order in which they lie."""

    def __init__(self, label: str, names: Sequence[str], places: Sequence[Place]) -> None:
        self.label = label
        self.remote = any(address_of(place) is not None for place in places)
        self._places = dict(zip(names, places, strict=True))
        self._order = {name: number for number, name in enumerate(names)}

    def photos(self) -> FolderPhotos:
        return FolderPhotos(Path(self.label), list(self._places), Counter())

    def place(self, name: str) -> Place:
        return self._places[name]

    def order(self, name: str) -> int | None:
        return self._order.get(name)

    def is_gone(self) -> bool:
        return False  # reading says so itself


def _filling(job: Job) -> Iterator[Notice | Progress]:
    """`fill_cache`, whose error advises what helps a job."""
    try:
        yield from fill_cache(job)
    except ExtractError as error:
        raise ExtractError(_without_advice(str(error))) from None


def _without_advice(text: str) -> str:
    """A line about changed photos, with the advice for a job."""
    line, found, _ = text.partition("; --update")
    return f"{line}; --overwrite encodes the photos of such shards again" if found else line


def verified(path: Path, task: ShardTask, record: EncoderRecord) -> Finished | Damaged:
    """Whether the cache at `path` is this shard, complete and undamaged to the last row."""
    try:
        cache = open_cache(path)
        problem = other_shard(cache, task, record)
        if problem is None:
            rows = np.arange(len(cache))
            damaged = damaged_rows(cache, rows)
            if damaged:
                problem = f"{len(damaged):,} rows are damaged"
    except CacheError as error:
        return Damaged(str(error))
    if problem is not None:
        return Damaged(f"{path}: {problem}")
    done, unreadable = (int((cache.status == kind).sum()) for kind in (DONE, UNREADABLE))
    return Finished(done, unreadable, 0)


def other_shard(cache: FeatureCache, task: ShardTask, record: EncoderRecord) -> str | None:
    """How a cache differs from the shard; None if it does not.

    The digests of the whole set and the number say which photos and captions a shard holds.
    """
    if cache.shard != task.shard:
        return f"is shard {cache.shard} of other photos or captions than shard {task.shard}"
    difference = cache.encoder.difference(record)
    if difference is not None:
        return f"made with {difference}"
    if cache.batch_rows != task.batch_rows:
        return f"made with batches of {cache.batch_rows}, not {task.batch_rows}"
    return None


def _publish(draft: Path, final: Path) -> None:
    """Give a finished shard its name. Its bytes are on the disk already."""
    try:
        os.rename(draft, final)
        folder = os.open(final.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        except OSError:  # some network drives cannot; a lost rename costs a rename
            pass
        finally:
            os.close(folder)
    except OSError as error:
        raise CacheError(f"{final}: cannot rename its draft ({error.strerror})") from None


def _wait_for(draft: Path) -> None:
    """Wait until nobody writes the draft: the worker of a killed job may live for some seconds.

    Raises CacheError, as `check_place` does.
    """
    end = time.monotonic() + _BUSY_S
    while True:
        try:
            return check_place(draft)
        except CacheError as error:
            if "another process is writing it" not in str(error) or time.monotonic() > end:
                raise
        time.sleep(1.0)


def _check_sight(images: Path | str, folder: Path, token: str) -> None:
    """Raise CacheError unless this machine sees the photos, if they are in a folder, and the same
    folder as the job.
    """
    host = socket.gethostname()
    is_folder = isinstance(images, Path) and not is_pattern(str(images))
    if is_folder and not os.path.exists(images):
        raise CacheError(f"{images}: {host} does not see it; all machines must")
    end = time.monotonic() + _SIGHT_S
    while True:
        try:
            if token in (folder / LOCK_NAME).read_text(encoding="utf-8"):
                return
        except (OSError, UnicodeDecodeError):
            pass
        if time.monotonic() > end:
            raise CacheError(
                f"{folder}: {host} does not see what this machine writes there; --out must lie in "
                "a folder that all machines share"
            )
        time.sleep(0.5)
