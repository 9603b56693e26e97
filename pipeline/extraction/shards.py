"""One share of a set of photos: `--shard 2/8`."""

from __future__ import annotations

from cache.errors import CapError
from cache.record import Shard


class ShardError(CapError):
    """A set of photos cannot be shared out like this. One line."""


def shard_of(
    rows: int,
    batch_rows: int,
    number: int,
    count: int,
    *,
    all_photos_sha256: str,
    all_captions_sha256: str,
) -> tuple[Shard, slice]:
    """Share `number` of `count` of so many rows, and which rows these are.

    Shares are runs of whole batches, as even as that allows: every photo keeps its place in its
    batch, so the shards, merged, are the bytes of one extraction. Raises ShardError where there are
    fewer batches than shards.
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
