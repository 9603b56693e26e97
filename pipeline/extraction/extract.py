"""Extraction: from photos to a feature cache, or on with a cache that was begun.

Rows of known photos are copied from an older cache; the others are encoded and written as they
come.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version

import torch

from cache.record import (
    CacheError,
    CaptionTable,
    EncoderRecord,
    Shard,
    Skeleton,
    photos_sha256,
    texts_sha256,
)
from cache.seal import attributes_of
from cache.store import DONE, PENDING, FeatureCache
from cache.writer import CacheWriter, check_place, open_writer
from pipeline.captions.dataset import open_photos, read_photos
from pipeline.captions.photos import Photos
from pipeline.captions.records import Choice
from pipeline.encoder.backbone import Backbone
from pipeline.encoder.encoder import Encoder, encoder_record
from pipeline.encoder.precision import check_device, choose_precision, fast_precisions
from pipeline.encoder.warm_up import begin_warm_up
from pipeline.encoder.weights import load_backbone
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.digests import other_photos
from pipeline.extraction.distributed.shards import shard_of, unlike_siblings
from pipeline.extraction.fill import (
    CacheFiller,
    ExtractError,
    Notice,
    Progress,
)
from pipeline.extraction.reuse import KnownPhotos, open_known
from pipeline.extraction.update import Update, bring_up_to_date
from pipeline.photos.photo_loader import BatchRequest, PhotoLoader
from pipeline.photos.preprocessing import Preprocessing
from pipeline.photos.readers.start import MOST_THREADS, reader_count
from pipeline.photos.sources.ahead import DaemonThreads
from pipeline.photos.sources.source import Report, Source
from train.allocator import without_collections
from train.captions.numbering import number_captions
from train.captions.script import misfit
from train.device import resolve_devices

# A CPU is fastest with a few megabytes of activations per layer, a GPU with many.
BATCH_PHOTOS = {"cpu": 16, "cuda": 256}
_PRECISION_CHECK_PHOTOS = 8
_LOOK_S = 1.0  # between two reports while tars are looked into
PRECISION_PHOTOS = 4 * _PRECISION_CHECK_PHOTOS  # looked at, since some may be unreadable


@dataclass
class Job:
    """What a command asks for, before anything is written."""

    config: ExtractConfig
    source: Source
    backbone: Backbone
    devices: list[torch.device]
    skeleton: Skeleton
    known: KnownPhotos | None  # of --reuse
    updates: bool  # whether the cache at --out is brought up to date, and so kept
    notices: list[str]
    details: list[str]  # notices that ask for nothing
    encoder: Encoder | None = (
        None  # the backbone, made ready for the first device by an earlier job
    )


def library_versions() -> dict[str, str]:
    return {
        name: version(name)
        for name in ("torch", "torchvision", "pillow", "pillow-heif", "simplejpeg")
    }


def extract(config: ExtractConfig) -> Generator[Notice | Progress, None, None]:
    """Make a cache, or finish one that was begun.

    Yields notices and progress; the last item is the final progress. Closing the generator keeps
    what is done. Raises FolderError, DatasetError, ShardError, DeviceError, EncoderError,
    CacheError, StalledError, VanishedError, ShortageError, SourceError, WorkerError or
    ExtractError.
    """
    source = yield from _looking(config)
    photos, understood = read_asked(config, source)
    yield from map(Notice, understood)  # before the weights are read, which may be downloaded
    job = prepare(config, photos, source)
    del photos  # the job's skeleton holds the same
    yield from map(Notice, job.notices)
    yield from (Notice(text, detail=True) for text in job.details)
    yield from fill_cache(job)


def fill_cache(job: Job) -> Generator[Notice | Progress, None, None]:
    """Do what is asked for. Yields, and raises, as `extract` does."""
    config = job.config
    if job.updates:
        yield from _update(job)
    writer = _open(job)
    with writer:
        if config.overwrite and not job.updates and writer.status.any():
            yield Notice(
                f"going on with {config.out}, which this command has begun; remove it to start "
                "afresh"
            )
        if writer.cache.batch_rows != job.skeleton.batch_rows:
            size = writer.cache.batch_rows
            yield Notice(f"continuing with the cache's own batch size, {size}", detail=True)
        del job.skeleton  # the cache holds the same, memory-mapped
        filler = CacheFiller(writer, config, job.source)
        yield from filler.fill(
            job.backbone, job.devices, job.known, packed=job.updates, encoder=job.encoder
        )
        # Only now: rows that were pending before have the same places in their batches as ever.
        if config.retry_unreadable and (count := writer.retry_unreadable()):
            yield Notice(f"trying {count:,} unreadable photos again")
            yield from filler.fill(job.backbone, job.devices, job.known)


def _looking(config: ExtractConfig) -> Generator[Notice | Progress, None, Source]:
    """`open_asked`, with progress where it takes longer, as it does for tars in a store."""
    start, looked = time.perf_counter(), (0, 0)

    def note(done: int, total: int) -> None:
        nonlocal looked
        looked = done, total

    threads = DaemonThreads(1)  # which may hang in a network, so that Ctrl-C ends the waiting
    opened = threads.submit(partial(open_asked, config, note))
    threads.end()
    while not wait([opened], _LOOK_S).done:
        (done, total), elapsed_s = looked, time.perf_counter() - start
        if total:
            yield Progress(
                done=done,
                unreadable=0,
                total=total,
                new=0,
                copied=0,
                elapsed_s=elapsed_s,
                photos_per_s=done / elapsed_s,
                stage="looking",
            )
    return opened.result()


@without_collections()
def open_asked(config: ExtractConfig, report: Report | None = None) -> Source:
    """Where the photos lie; tars are passed through for it. Raises as `extract` does.

    report: as for `open_source`.
    """
    check_place(config.out)
    choice = Choice(config.split, config.image_column, config.caption_column)
    return open_photos(config.images, config.captions, choice, report)


@without_collections()
def read_asked(config: ExtractConfig, source: Source | None = None) -> tuple[Photos, list[str]]:
    """(the photos asked for, lines about what was understood). Raises as `extract` does.

    source: what `open_asked` returned, where it is wanted later, too.
    """
    check_place(config.out)
    understood: list[str] = []
    photos = read_photos(
        config.images if source is None else source,
        config.captions,
        split=config.split,
        only=config.only,
        limit=config.limit,
        image_column=config.image_column,
        caption_column=config.caption_column,
        say=understood.append,
    )
    unfit = misfit(photos.texts, config.tokenizer)
    return photos, understood if unfit is None else [*understood, unfit]


def prepare(config: ExtractConfig, photos: Photos, source: Source | None = None) -> Job:
    """Check what is asked for. Writes nothing. Raises as `extract` does.

    source: of the photos, where it is open already.
    """
    if source is None:
        source = open_asked(config)
    devices = resolve_devices(config.device)
    begin_warm_up(devices[0])
    backbone = load_backbone(config.backbone, config.weights, config.image_size)
    backbone = _with_recorded_filter(config, backbone)
    image_size = config.image_size or backbone.image_size
    config = replace(config, image_size=image_size)
    precision, notices, details = _choose_precision(config, source, backbone, photos, devices[0])
    record = encoder_record(backbone, image_size, config.views, precision)
    same = config.reuse is not None and config.out.exists() and config.out.samefile(config.reuse)
    known = None if config.reuse is None else open_known(config.reuse, record)
    if same and not config.overwrite and not config.update:
        raise CacheError(
            f"{config.reuse}: cannot be both --reuse and --out; --update keeps what it holds and "
            "encodes only what is new"
        )
    skeleton = _skeleton(config, photos, record, devices[0])
    return Job(
        config=config,
        source=source,
        backbone=backbone,
        devices=devices,
        skeleton=skeleton,
        known=None if same else known,
        updates=updates(config),
        notices=[*backbone.notices, *notices, *unlike_siblings(config.out, skeleton)],
        details=[*backbone.details, *details],
    )


def _with_recorded_filter(config: ExtractConfig, backbone: Backbone) -> Backbone:
    """The backbone with the filter of the cache that goes on, or that rows are taken from.

    Before filters followed the networks, all photos were resized bilinearly. Such a cache goes on
    as it was made. Another mean or standard deviation in its record stays a difference, because its
    features are those of wrong pixels.
    """
    usual = backbone.preprocessing
    for source in (None if config.overwrite else config.out, config.reuse):
        found = None if source is None else attributes_of(source)
        if found is not None and found.get("backbone") == backbone.name:
            made = Preprocessing.parse(str(found.get("preprocessing")))
            if made is not None and (made.mean, made.std) == (usual.mean, usual.std):
                return replace(backbone, preprocessing=made)
            return backbone
    return backbone


def updates(config: ExtractConfig) -> bool:
    """Whether the command brings the cache at --out up to date.

    `--overwrite --reuse` of this cache means the same as `--update`.
    """
    if not config.out.is_file():
        return False
    own = config.reuse is not None and config.out.samefile(config.reuse)
    return config.update or (config.overwrite and own)


def _keeps_old_rows(config: ExtractConfig) -> bool:
    return config.out.is_file() and (not config.overwrite or updates(config))


def _update(job: Job) -> Generator[Notice | Progress, None, None]:
    config = job.config
    total, start = len(job.skeleton.paths), time.perf_counter()
    threads = reader_count(config.workers)
    for item in bring_up_to_date(config.out, job.skeleton, job.source, threads):
        if isinstance(item, Update):
            yield Notice(f"{config.out}: {item}")
            continue
        elapsed_s = time.perf_counter() - start
        yield Progress(
            done=item,
            unreadable=0,
            total=total,
            new=0,
            copied=0,
            elapsed_s=elapsed_s,
            photos_per_s=item / elapsed_s if elapsed_s else 0.0,
            stage="comparing",
        )


def _open(job: Job) -> CacheWriter:
    """The writer of the job's cache. Raises CacheError, ExtractError or StalledError."""
    config, skeleton = job.config, job.skeleton

    def opened(*, overwrite: bool) -> CacheWriter:
        return open_writer(
            config.out, skeleton, library_versions=library_versions(), overwrite=overwrite
        )

    if job.updates:
        return opened(overwrite=False)
    writer = None
    if config.overwrite:
        # An interrupted --overwrite goes on by the same command: the result is the same, and
        # starting afresh would throw the work away.
        if is_unfinished(config, skeleton):
            with suppress(CacheError):  # made by another command
                writer = opened(overwrite=False)
        if writer is None:
            return opened(overwrite=True)
    else:
        writer = opened(overwrite=False)
    try:
        problem = other_photos(writer.cache, job.source, reader_count(config.workers))
    except BaseException:
        writer.close()
        raise
    if problem is None:
        return writer
    writer.close()
    if config.overwrite:
        return opened(overwrite=True)
    raise ExtractError(problem)


def is_unfinished(config: ExtractConfig, skeleton: Skeleton) -> bool:
    """Whether an interrupted command of the same batch size and libraries has left its cache."""
    try:
        cache = FeatureCache(config.out)
    except CacheError:
        return False
    return (
        bool((cache.status == PENDING).any())
        and bool((cache.status == DONE).any())
        and cache.batch_rows == skeleton.batch_rows
        and cache.library_versions == library_versions()
    )


def _skeleton(
    config: ExtractConfig, photos: Photos, record: EncoderRecord, device: torch.device
) -> Skeleton:
    """All that a cache of these photos, or of the shard asked for, holds besides its rows."""
    batch_rows = min(config.batch_size or BATCH_PHOTOS[device.type], len(photos))
    shard = None
    if config.shard is not None:
        names, texts = digests_of(photos)
        shard, share = shard_of(
            len(photos),
            batch_rows,
            *config.shard,
            all_photos_sha256=names,
            all_captions_sha256=texts,
        )
        photos = photos[share]
    return skeleton_of(photos, config.tokenizer, record, batch_rows, shard)


@without_collections()
def digests_of(photos: Photos) -> tuple[str, str]:
    """(`photos_sha256`, `texts_sha256`) of all photos, as every shard records them."""
    names = photos_sha256(photos.image_ids, photos.paths)
    return names, texts_sha256(photos.texts, photos.caption_rows)


@without_collections()
def skeleton_of(
    photos: Photos,
    tokenizer: str,
    record: EncoderRecord,
    batch_rows: int,
    shard: Shard | None,
    captions: CaptionTable | None = None,
) -> Skeleton:
    """All that a cache of exactly these photos holds besides its rows.

    captions: those of the photos, if they are tokenized already.
    """
    if captions is None:
        captions = number_captions(photos.texts, photos.caption_rows, tokenizer)
    return Skeleton(
        image_ids=photos.image_ids,
        paths=photos.paths,
        captions=captions,
        encoder=record,
        batch_rows=batch_rows,
        shard=shard,
        numbered=photos.numbered,
    )


def _choose_precision(
    config: ExtractConfig,
    source: Source,
    backbone: Backbone,
    photos: Photos,
    device: torch.device,
) -> tuple[str, list[str], list[str]]:
    """(precision, notices, details). Shards test the first photos of the whole set, so that they
    agree.
    """
    if config.precision != "auto":
        if not _keeps_old_rows(config) and config.reuse is None:
            check_device(config.precision, device)
        return config.precision, [], []
    if _keeps_old_rows(config):  # the precision of the rows already there
        return FeatureCache(config.out).encoder.precision, [], []
    if config.reuse is not None:
        return FeatureCache(config.reuse).encoder.precision, [], []
    precision, notices, details = fastest_precision(config, source, backbone, photos, device)
    if config.shard is not None:
        number, count = config.shard
        notices.append(
            f"shard {number}/{count} is in {precision}, which `auto` chose on this machine; give "
            f"the other shards --precision {precision}, or they cannot be merged"
        )
    return precision, notices, details


def fastest_precision(
    config: ExtractConfig,
    source: Source,
    backbone: Backbone,
    photos: Photos,
    device: torch.device,
) -> tuple[str, list[str], list[str]]:
    """(precision, notices, details: why the faster ones do not do), by the first photos.

    config: its image size is known.
    """
    if fast_precisions(device) == ("float32",):
        return "float32", [], []
    assert config.image_size is not None
    pixels: list[torch.Tensor] = []
    first = range(min(len(photos), PRECISION_PHOTOS))
    loader = PhotoLoader(
        [
            BatchRequest(row, first[row : row + _PRECISION_CHECK_PHOTOS])
            for row in first[::_PRECISION_CHECK_PHOTOS]
        ],
        lambda row: source.place(photos[row].path),
        batch_rows=_PRECISION_CHECK_PHOTOS,
        image_size=config.image_size,
        views=("full",),
        readers=min(MOST_THREADS, reader_count(config.workers)),
        filter=backbone.preprocessing.filter,
    )
    with loader:
        for batch in loader:
            pixels.extend(batch.pixels[row - batch.first] for row in sorted(batch.decoded))
            if len(pixels) >= _PRECISION_CHECK_PHOTOS:
                break
    if not pixels:
        return "float32", ["none of the first photos can be decoded; computing in float32"], []
    first_pixels = torch.cat(pixels[:_PRECISION_CHECK_PHOTOS])
    precision, details = choose_precision(backbone, first_pixels, device=device)
    return precision, [], details
