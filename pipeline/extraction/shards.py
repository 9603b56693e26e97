"""One shard of a set of photos, as in `--shard 2/8`: which rows it has."""

from __future__ import annotations

from cache.errors import CapError
from cache.record import Shard


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
