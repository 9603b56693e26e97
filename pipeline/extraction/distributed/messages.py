"""What the job sends to its workers, and what they send back. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cache.record import EncoderRecord, Shard

if TYPE_CHECKING:
    from pipeline.captions.photos import Photos
    from pipeline.extraction.config import ExtractConfig
    from pipeline.photos.sources.places import Place


@dataclass(frozen=True)
class Here:
    """Where a worker runs: the first that it sends."""

    host: str
    pid: int


@dataclass(frozen=True)
class Loaded:
    """A worker has its encoder. The precision of its record is not chosen yet."""

    record: EncoderRecord
    device: str  # its type
    versions: dict[str, str]  # of the libraries
    notices: tuple[str, ...] = ()
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chosen:
    """The precision that `auto` means on this worker's device."""

    precision: str
    notices: tuple[str, ...] = ()
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShardTask:
    """A shard to be made: all that a worker has to know beside the job's settings."""

    shard: Shard
    photos: Photos  # of this shard
    places: Sequence[Place] | None  # where they lie; None if they are files of the job's folder
    batch_rows: int
    draft: Path
    final: Path


@dataclass(frozen=True)
class Said:
    """A notice, one line."""

    text: str
    detail: bool = False


@dataclass(frozen=True)
class Filled:
    """How far a shard is, counting all workers that have been at it."""

    done: int
    unreadable: int
    new: int  # of this call


@dataclass(frozen=True)
class Finished:
    """A shard is whole, verified, and has its final name."""

    done: int
    unreadable: int
    new: int


@dataclass(frozen=True)
class Damaged:
    """A shard that was finished earlier is not what it has to be. reason: one line."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """A worker cannot do what it was asked. reason: one line. trace: of a bug, else empty."""

    reason: str
    trace: str = ""


@dataclass(frozen=True)
class Died:
    """A worker is gone. reason: one line."""

    reason: str


@dataclass(frozen=True)
class Ended:
    """A worker has done what it was asked, and has no more to say."""


Message = Here | Loaded | Chosen | Said | Filled | Finished | Damaged | Failed | Died | Ended


@dataclass(frozen=True)
class Settings:
    """What all workers are told first. The paths are absolute."""

    config: ExtractConfig
    folder: Path  # of the shards
    label: str  # of the photos' source
    token: str  # what the lock in that folder says
    cpus: float  # of each worker
