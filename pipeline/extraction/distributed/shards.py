"""One shard of a set of photos, as in `--shard 2/8`: which rows it has, and what is beside it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cache.errors import CapError
from cache.record import Shard, Skeleton, made_by
from cache.seal import attributes_of


class ShardError(CapError):
    """Raised when a set of photos cannot be split into so many shards. The message is one line."""


def shard_of(
    rows: int,
    batch_rows: int,
    number: int,
    count: int,
    *,
    all_photos_sha256: str,
    all_captions_sha256: str,
) -> tuple[Shard, slice]:
    """Shard `number` of `count` of a set of `rows` photos, and the slice of rows that it has.

    Each shard is a run of whole batches; their sizes differ by one batch at most. Every photo keeps
    its place in its batch, so the merged shards have the bytes of one extraction. Raises ShardError
    if there are fewer batches than shards.
    """
    batches = -(-rows // batch_rows)
    if count > batches:
        raise ShardError(
            f"--shard {number}/{count}: {rows:,} photos are {batches} batches of {batch_rows}; "
            f"make at most {batches} shards, or the --batch-size smaller"
        )
    first, stop = (min(rows, batches * n // count * batch_rows) for n in (number - 1, number))
    shard = Shard(number, count, first, rows, all_photos_sha256, all_captions_sha256)
    return shard, slice(first, stop)


def unlike_siblings(out: Path, skeleton: Skeleton) -> list[str]:
    """A notice if `cap merge` could not join the shard at `out` with another one beside it.

    Shards made by different commands or machines can differ in captions or precision, and only the
    merge would tell, after the hours that they take. Looked at are caches in the folder of `out`
    whose names differ from its name in numbers only, such as `train.1.h5` and `train.2.h5`.
    """
    shard = skeleton.shard
    if shard is None:
        return []
    pattern = _without_numbers(out.name)
    try:
        names = sorted(name for name in os.listdir(out.parent) if name != out.name)
    except OSError:
        return []
    for name in names:
        sibling = out.with_name(name)
        attributes = attributes_of(sibling) if _without_numbers(name) == pattern else None
        if attributes is None:
            continue
        try:
            encoder, batch_rows, other = made_by(attributes)
        except (KeyError, ValueError):
            continue
        if other is None or other.count != shard.count or other.number == shard.number:
            continue
        difference = encoder.difference(skeleton.encoder)
        if difference is None and other.all_photos_sha256 != shard.all_photos_sha256:
            difference = "other photos than these"
        if difference is None and other.all_captions_sha256 != shard.all_captions_sha256:
            difference = "other captions than these"
        if difference is None and batch_rows != skeleton.batch_rows:
            difference = f"--batch-size {batch_rows}, not {skeleton.batch_rows}"
        if difference is not None:
            return [
                f"{sibling}: shard {other} was made with {difference}; if it belongs to the same "
                "set, `cap merge` will refuse this one"
            ]
    return []


def _without_numbers(name: str) -> str:
    return re.sub(r"[0-9]+", "0", name)
