"""What a job is made of: its folder, its shards, and the record by which a later run goes on."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from cache.atomic import remove_leftovers, write_text
from cache.record import CacheError, EncoderRecord, made_by, texts_sha256
from cache.seal import attributes_of
from cache.store import PENDING, open_cache
from pipeline.captions.photos import Photos
from pipeline.encoder.networks.sources import recorded_name
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.distributed.messages import ShardTask
from pipeline.extraction.distributed.shards import ShardError, shard_of
from pipeline.photos.sources.places import Place
from pipeline.photos.sources.source import Folder, Source

_RECORD_NAME = "job.json"
_OWN_NAMES = re.compile(r"\d+-of-\d+(\.draft)?\.h5")
_LEFTOVERS = re.compile(r"\.(\d+-of-\d+\.draft\.h5)\.cap-.*")  # of a draft whose writer was killed

# Photos of a shard: some minutes of work.
_SHARD_PHOTOS = {"cpu": 10_000, "cuda": 500_000}
_SHARDS_PER_WORKER = 4  # so that the last ones end at about the same time
_LEAST_BATCHES = 8  # of a shard that is made smaller for that


def folder_of(out: Path) -> Path:
    """Where the shards of a job lie: beside its result."""
    return out.with_name(f"{out.name}.shards")


@dataclass(frozen=True)
class JobRecord:
    """What all runs of a job have in common."""

    photos: int
    all_photos_sha256: str
    all_captions_sha256: str
    tokenizer: str
    shards: int
    batch_rows: int
    encoder: EncoderRecord  # its precision is chosen

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The record of the job that was begun in a folder; None if there is none.

        Raises CacheError if it is damaged.
        """
        path = folder / _RECORD_NAME
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            encoder = found.pop("encoder")
            record = cls(
                **found, encoder=EncoderRecord(**{**encoder, "views": tuple(encoder["views"])})
            )
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CacheError(f"{path}: cannot read ({error.strerror})") from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise CacheError(
                f"{path}: damaged; --overwrite begins the job again, without its shards"
            ) from None
        return record

    def write(self, folder: Path) -> None:
        """Raises WriteError."""
        write_text(folder / _RECORD_NAME, json.dumps(asdict(self), indent=1) + "\n")

    def difference(self, other: JobRecord) -> str | None:
        """What of this job is not that of another one, as `mine, not theirs`."""
        if self.all_photos_sha256 != other.all_photos_sha256:
            if self.photos == other.photos:
                return "other photos (names, ids or order), not those asked for"
            return f"{self.photos:,} photos, not {other.photos:,}"
        if self.all_captions_sha256 != other.all_captions_sha256:
            return "other captions, not those asked for"
        for name, unit in (
            ("tokenizer", "tokenizer"),
            ("shards", "--ray-shards"),
            ("batch_rows", "--batch-size"),
        ):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{unit} {mine}, not {theirs}"
        return self.encoder.difference(other.encoder)


@dataclass(frozen=True)
class Shards:
    """The shards of a job, by number from 1 on."""

    folder: Path
    record: JobRecord
    photos: Photos
    source: Source

    def task(self, number: int, *, with_photos: bool = True) -> ShardTask:
        """What a worker has to know of a shard. with_photos: not needed to check a finished one."""
        job = self.record
        shard, share = shard_of(
            job.photos,
            job.batch_rows,
            number,
            job.shards,
            all_photos_sha256=job.all_photos_sha256,
            all_captions_sha256=job.all_captions_sha256,
        )
        photos = self.photos[share if with_photos else slice(0)]
        return ShardTask(
            shard=shard,
            photos=photos,
            places=places_of(photos, self.source),
            batch_rows=job.batch_rows,
            draft=self._path(number, ".draft.h5"),
            final=self.path(number),
        )

    def path(self, number: int) -> Path:
        """The cache of a finished shard."""
        return self._path(number, ".h5")

    def paths(self) -> list[Path]:
        return [self.path(number) for number in range(1, self.record.shards + 1)]

    def is_there(self, number: int) -> bool:
        """Whether a cache of this shard has its final name. Its rows are not looked at."""
        attributes = attributes_of(self.path(number))
        if attributes is None:
            return False
        try:
            encoder, batch_rows, shard = made_by(attributes)
        except (KeyError, ValueError):
            return False
        task = self.task(number, with_photos=False)
        return (
            shard == task.shard
            and batch_rows == task.batch_rows
            and encoder.difference(self.record.encoder) is None
        )

    def _path(self, number: int, suffix: str) -> Path:
        count = self.record.shards
        return self.folder / f"{number:0{len(str(count))}d}-of-{count}{suffix}"


def places_of(photos: Photos, source: Source) -> list[Place] | None:
    """Where photos lie, for workers, which do not look into tars themselves; None for those of a
    folder.
    """
    if isinstance(source, Folder):
        return None
    return [source.place(path) for path in photos.paths]


def shard_count(photos: int, batch_rows: int, workers: int, device: str, asked: int | None) -> int:
    """How many shards to make: some minutes of work each, and a few for each worker.

    device: its type. Raises ShardError if more are asked for than there are batches.
    """
    batches = -(-photos // batch_rows)
    if asked is not None:
        if asked > batches:
            raise ShardError(
                f"--ray-shards {asked}: {photos:,} photos are {batches} batches of {batch_rows}; "
                f"make at most {batches} shards, or the --batch-size smaller"
            )
        return asked
    by_time = -(-photos // _SHARD_PHOTOS[device])
    by_workers = min(_SHARDS_PER_WORKER * workers, max(workers, batches // _LEAST_BATCHES))
    return min(batches, max(by_time, by_workers))


def remove_job(folder: Path) -> None:
    """Remove what a job has made in its folder, and the folder if nothing else is in it."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            if (leftover := _LEFTOVERS.fullmatch(path.name)) is not None:
                remove_leftovers(folder / leftover[1])
            elif path.name == _RECORD_NAME or _OWN_NAMES.fullmatch(path.name):
                path.unlink()
        folder.rmdir()


def is_made(config: ExtractConfig, photos: int, digests: tuple[str, str]) -> bool:
    """Whether the result is at --out already, from an earlier run.

    digests: of all photos and captions. Raises CacheError if another cache is there.
    """
    out = config.out
    if config.overwrite or not out.exists():
        return False
    cache = open_cache(out, allow_pending=True)
    advice = "Use another --out, or --overwrite."
    if (cache.status == PENDING).any() or cache.shard is not None:
        raise CacheError(f"{out}: is being made without --ray; finish it so. {advice}")
    difference = None
    if cache.photos_sha256 != digests[0]:
        difference = (
            "other photos (names, ids or order), not those asked for"
            if len(cache) == photos
            else f"{len(cache):,} photos, not {photos:,}"
        )
    elif texts_sha256(cache.captions.texts, cache.captions.rows) != digests[1]:
        difference = "other captions, not those asked for"
    elif len(cache.captions) and cache.captions.tokenizer != config.tokenizer:
        difference = f"tokenizer {cache.captions.tokenizer}, not {config.tokenizer}"
    for name, asked in (
        ("backbone", recorded_name(config.backbone)),
        ("weights", config.weights),
        ("image_size", config.image_size),
        ("views", config.views),
        ("precision", None if config.precision == "auto" else config.precision),
    ):
        mine = getattr(cache.encoder, name)
        if difference is None and asked not in (None, "", mine):
            difference = f"{name.replace('_', ' ')} {mine}, not {asked}"
    if difference is not None:
        raise CacheError(f"{out}: written with {difference}. {advice}")
    return True
