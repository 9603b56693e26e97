"""Joins caches into one: the shards of one set of photos, or different sets of photos."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.record import (
    CacheError,
    CaptionTable,
    Skeleton,
    Strings,
    join_versions,
    offsets_of,
    texts_sha256,
)
from cache.store import DIGEST_BYTES, DONE, FeatureCache, open_cache
from cache.writer import new_cache

_BLOCK_BYTES = 1 << 20  # of features, copied at a time; it stays in the processor's cache
_BLOCK_TOKENS = 1 << 20


@dataclass(frozen=True)
class MergeReport:
    caches: int
    photos: int
    unreadable: int
    captions: int
    duplicates: int  # photos left out because another cache has them
    duplicate_captions: int  # captions left out with them


@dataclass(frozen=True)
class Joined:
    """Caches that fit together, in the order of their rows."""

    caches: list[FeatureCache]
    kept: list[NDArray[np.bool_]]  # which rows (N,) of each
    skeleton: Skeleton  # of the kept rows
    library_versions: dict[str, str]

    def report(self) -> MergeReport:
        pairs = list(zip(self.caches, self.kept, strict=True))
        return MergeReport(
            caches=len(pairs),
            photos=len(self.skeleton.paths),
            unreadable=sum(int((cache.status[mask] != DONE).sum()) for cache, mask in pairs),
            captions=len(self.skeleton.captions),
            duplicates=sum(int((~mask).sum()) for _, mask in pairs),
            duplicate_captions=sum(len(cache.captions) for cache, _ in pairs)
            - len(self.skeleton.captions),
        )


def merge(
    paths: Sequence[Path], out: Path, *, deduplicate: bool = False, overwrite: bool = False
) -> MergeReport:
    """Join finished caches of one encoder into the cache `out`, which appears only when complete.

    Photos keep the order of the caches and of the rows in them. Shards are sorted by number. All of
    them must be there and belong to the same photos and captions. The result is then byte for byte
    the cache of an extraction without shards. In caches that are not shards, a photo that another
    cache has too is an error. With `deduplicate` it is left out, also in shards: the first cache
    that could read it keeps it. Unreadable photos are kept with their reasons, and words are
    counted again. A cache whose rows another process changes meanwhile is refused.

    Memory holds names and captions; features pass through it in blocks of 16 MB.
    Raises CacheError for another encoder (naming the field) or tokenizer, pending or damaged rows,
    missing shards, shards of other photos or captions, duplicates, two photos with one id, or an
    `out` that cannot be written.
    """
    joined = join(paths, deduplicate=deduplicate)
    with new_cache(
        out, joined.skeleton, library_versions=joined.library_versions, overwrite=overwrite
    ) as writer:
        first = 0
        for cache, mask in zip(joined.caches, joined.kept, strict=True):
            rows = np.flatnonzero(mask)
            block = max(1, _BLOCK_BYTES // (cache.features[:1].nbytes or 1))
            for start in range(0, len(rows), block):
                part = rows[start : start + block]
                writer.copy(np.arange(first, first + len(part)), cache, part)
                first += len(part)
    return joined.report()


def join(paths: Sequence[Path], *, deduplicate: bool = False) -> Joined:
    """Open caches and join their names and captions, after all checks of `merge` but those of rows.

    Raises CacheError as `merge` does.
    """
    caches = [open_cache(path) for path in paths]
    if not caches:
        raise CacheError("no caches to merge")
    for cache in caches[1:]:
        difference = cache.encoder.difference(caches[0].encoder)
        if difference is not None:
            raise CacheError(f"{cache.path}: made with {difference} as in {caches[0].path}")
    captioned = [cache for cache in caches if len(cache.captions)]
    for cache in captioned[1:]:
        difference = cache.captions.other_tokenizer(captioned[0].captions)
        if difference is not None:
            raise CacheError(f"{cache.path}: made with {difference} as in {captioned[0].path}")
    sharded = any(cache.shard is not None for cache in caches)
    if sharded:
        caches = _shards_in_order(caches)
        _check_whole(caches)
    kept = [np.ones(len(cache), bool) for cache in caches]
    if deduplicate or not sharded:
        kept = _without_duplicates(caches, deduplicate, of_one_set=sharded)
    return Joined(
        caches=caches,
        kept=kept,
        skeleton=_joined(caches, kept),
        library_versions=join_versions(cache.library_versions for cache in caches),
    )


def _joined(caches: Sequence[FeatureCache], kept: Sequence[NDArray[np.bool_]]) -> Skeleton:
    """The names and captions of the kept rows (N,) of each cache."""
    numbered = [
        cache.numbered[mask]
        for cache, mask in zip(caches, kept, strict=True)
        if cache.numbered is not None
    ]
    return Skeleton(
        image_ids=_join([cache.image_ids for cache in caches], kept),
        paths=_join([cache.paths for cache in caches], kept),
        captions=merge_captions([cache.captions for cache in caches], kept),
        encoder=caches[0].encoder,
        batch_rows=caches[0].batch_rows,
        numbered=np.concatenate(numbered) if len(numbered) == len(caches) else None,
    )


def merge_captions(
    tables: Sequence[CaptionTable], kept: Sequence[NDArray[np.bool_]]
) -> CaptionTable:
    """Join the captions of the kept rows of several caches. Words are counted and numbered again.

    kept: for each table, (N,) whether each of its photos is kept. The kept photos get consecutive
    numbers.
    """
    chosen = [mask[table.rows] for table, mask in zip(tables, kept, strict=True)]  # captions
    spans = [np.diff(table.token_offsets) for table in tables]
    tokens = [
        table.tokens if captions.all() else table.tokens[np.repeat(captions, lengths)]
        for table, captions, lengths in zip(tables, chosen, spans, strict=True)
    ]
    counts: Counter[str] = Counter()
    for table, own in zip(tables, tokens, strict=True):
        times = np.zeros(len(table.words), np.int64)
        for first in range(0, len(own), _BLOCK_TOKENS):  # counting takes 8 bytes for each
            times += np.bincount(own[first : first + _BLOCK_TOKENS], minlength=len(times))
        counts.update({w: n for w, n in zip(table.words, times.tolist(), strict=True) if n})
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    number = {word: index for index, (word, _) in enumerate(ordered)}
    renumbered = np.empty(sum(map(len, tokens)), np.int32)
    end = 0
    for table, own in zip(tables, tokens, strict=True):
        # A word that occurs only in captions left out has no number, and none is looked up.
        numbers = np.array([number.get(word, -1) for word in table.words], np.int32)
        start, end = end, end + len(own)
        for first in range(start, end, _BLOCK_TOKENS):
            stop = min(end, first + _BLOCK_TOKENS)
            renumbered[first:stop] = numbers[own[first - start : stop - start]]
    first_rows = offsets_of(np.array([int(mask.sum()) for mask in kept], np.int64))
    rows = [
        (first + np.cumsum(mask)[table.rows[captions]] - 1).astype(np.int32)
        for table, mask, captions, first in zip(tables, kept, chosen, first_rows[:-1], strict=True)
    ]
    return CaptionTable(
        texts=_join([table.texts for table in tables], chosen),
        rows=np.concatenate(rows),
        tokens=renumbered,
        token_offsets=offsets_of(
            np.concatenate([s[captions] for s, captions in zip(spans, chosen, strict=True)])
        ),
        words=Strings.pack(word for word, _ in ordered),
        counts=np.array([count for _, count in ordered], np.int64),
        tokenizer=next((table.tokenizer for table in tables if len(table)), tables[0].tokenizer),
    )


def _join(parts: Sequence[Strings], kept: Sequence[NDArray[np.bool_]]) -> Strings:
    return Strings.join([part.where(mask) for part, mask in zip(parts, kept, strict=True)])


def _shards_in_order(caches: Sequence[FeatureCache]) -> list[FeatureCache]:
    """The caches by shard number. Raises CacheError unless they are all shards of one whole."""
    first = next(cache for cache in caches if cache.shard is not None)
    assert first.shard is not None
    by_number: dict[int, FeatureCache] = {}
    for cache in caches:
        shard = cache.shard
        if shard is None:
            raise CacheError(
                f"{cache.path}: is not a shard, but {first.path} is shard {first.shard}; "
                "merge the shards on their own first"
            )
        if (shard.count, shard.all_rows, cache.batch_rows) != (
            first.shard.count,
            first.shard.all_rows,
            first.batch_rows,
        ):
            raise CacheError(
                f"{cache.path}: shard {shard} of {shard.all_rows:,} photos in batches of "
                f"{cache.batch_rows}, but {first.path} is shard {first.shard} of "
                f"{first.shard.all_rows:,} photos in batches of {first.batch_rows}"
            )
        for what, own, others in (
            ("photos", shard.all_photos_sha256, first.shard.all_photos_sha256),
            ("captions", shard.all_captions_sha256, first.shard.all_captions_sha256),
        ):
            if own != others:
                raise CacheError(
                    f"{cache.path}: a shard of other {what} than {first.path}; extract it again "
                    f"from the same files (--reuse {cache.path} keeps its features)"
                )
        if shard.number in by_number:
            raise CacheError(
                f"{cache.path}: shard {shard}, and so is {by_number[shard.number].path}"
            )
        by_number[shard.number] = cache
    missing = [n for n in range(1, first.shard.count + 1) if n not in by_number]
    if missing:
        raise CacheError(
            f"{first.path}: shard {first.shard}; missing {'is' if len(missing) == 1 else 'are'} "
            + ", ".join(f"{n}/{first.shard.count}" for n in missing)
        )
    return [by_number[n] for n in sorted(by_number)]


def _check_whole(shards: Sequence[FeatureCache]) -> None:
    """Raise CacheError unless the shards together have the photos and captions of their whole."""
    shard = shards[0].shard
    assert shard is not None
    whole = _joined(shards, [np.ones(len(cache), bool) for cache in shards])
    captions = texts_sha256(whole.captions.texts, whole.captions.rows)
    for what, together, shared in (
        ("photos", whole.photos_sha256(), shard.all_photos_sha256),
        ("captions", captions, shard.all_captions_sha256),
    ):
        if together != shared:
            raise CacheError(
                f"{shards[0].path}: together, the shards do not have the {what} of their whole"
            )


def _without_duplicates(
    caches: Sequence[FeatureCache], deduplicate: bool, *, of_one_set: bool
) -> list[NDArray[np.bool_]]:
    """For each cache, which photos are kept.

    Two photos are the same if their files have the same bytes. If one of them could not be read,
    also if they have the same id: its file may have been mended since. Copies of a photo within one
    cache are all kept; only copies in different caches are duplicates. The first cache that could
    read the photo keeps it. of_one_set: whether the caches are shards, whose ids may repeat.
    """
    owners = np.repeat(np.arange(len(caches)), [len(cache) for cache in caches])
    first_rows = offsets_of(np.bincount(owners, minlength=len(caches)))
    every = np.arange(len(owners))

    def named(row: int) -> str:
        cache = caches[owners[row]]
        return f"{cache.path}: {cache.paths[int(row - first_rows[owners[row]])]}"

    digests = np.concatenate([cache.digests for cache in caches])
    done = np.concatenate([cache.status == DONE for cache in caches])
    has_digest = np.asarray(digests.any(axis=1), bool)
    kept_for = every.copy()  # for each row, the row that is kept in its place
    hashed = np.flatnonzero(has_digest)
    kept_for[hashed] = hashed[_kept_rows(digests[hashed], owners[hashed], done[hashed])]
    # A photo that is already left out no longer takes part with its id.
    left = np.flatnonzero(kept_for == every)
    ids = np.concatenate([_id_digests(cache) for cache in caches])[left]
    same_id = left[_kept_rows(ids, owners[left], done[left])]
    same_photo = ~(done[left] & has_digest[left])
    kept_for[left[same_photo]] = same_id[same_photo]
    clashes = np.flatnonzero((same_id != left) & ~same_photo)
    keep: NDArray[np.bool_] = kept_for == every
    if not keep.all() and not deduplicate:
        row = int(np.flatnonzero(~keep)[0])
        raise CacheError(
            f"{named(row)} is the same photo as {named(int(kept_for[row]))} (duplicates: "
            f"{int((~keep).sum()):,}); --deduplicate keeps one of each, the first that could be "
            "read"
        )
    if len(clashes) and not of_one_set:
        row, other = int(left[clashes[0]]), int(same_id[clashes[0]])
        raise CacheError(
            f"{named(max(row, other))} has the same id as another photo, {named(min(row, other))} "
            f"(ids that clash: {len(clashes):,}); extract one of the two sets with other ids"
        )
    return [keep[start:stop] for start, stop in pairwise(first_rows)]


def _kept_rows(
    keys: NDArray[np.uint8], owners: NDArray[np.int64], done: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """For each row, the row that is kept of all that have its (16,) key: the first one that is
    done, or else the first one. Rows of the same owner as that one are kept themselves.
    """
    halves = np.ascontiguousarray(keys).view(np.uint64)  # (N, 2)
    order = np.lexsort((~done, halves[:, 1], halves[:, 0]))  # stable: else rows keep their order
    ordered = halves[order]
    starts = np.ones(len(order), bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    chosen = np.empty(len(order), np.int64)
    chosen[order] = order[np.flatnonzero(starts)[np.cumsum(starts) - 1]]
    own = owners[chosen] == owners
    chosen[own] = np.flatnonzero(own)
    return chosen


def _id_digests(cache: FeatureCache) -> NDArray[np.uint8]:
    data = b"".join(
        hashlib.blake2b(
            image_id.encode("utf-8", "surrogateescape"), digest_size=DIGEST_BYTES
        ).digest()
        for image_id in cache.image_ids
    )
    return np.frombuffer(data, np.uint8).reshape(-1, DIGEST_BYTES)
