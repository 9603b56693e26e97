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

from cache.record import CacheError, CaptionTable, Skeleton, Strings, offsets_of, texts_sha256
from cache.store import DIGEST_BYTES, DONE, FeatureCache, open_cache
from cache.writer import new_cache

_BLOCK_BYTES = 1 << 24  # of features, copied at a time


@dataclass(frozen=True)
class MergeReport:
    caches: int
    photos: int
    unreadable: int
    captions: int
    duplicates: int  # photos left out because an earlier cache has them
    duplicate_captions: int  # captions left out with them


def merge(
    paths: Sequence[Path], out: Path, *, deduplicate: bool = False, overwrite: bool = False
) -> MergeReport:
    """Join finished caches of one encoder into the cache `out`, which appears only when complete.

    Photos keep the order of the caches and of the rows in them. Shards are sorted by number. All of
    them must be there and belong to the same photos and captions. The result is then byte for byte
    the cache of an extraction without shards. In caches that are not shards, a photo that an
    earlier cache has, by its digest, is an error, or is left out with `deduplicate`. Unreadable
    photos are kept with their reasons, and words are counted again.

    Memory holds names and captions; features pass through it in blocks of 16 MB.
    Raises CacheError for another encoder (naming the field) or tokenizer, pending or damaged rows,
    missing shards, shards of other photos or captions, duplicates, two photos with one id, or an
    `out` that cannot be written.
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
        kept = [np.ones(len(cache), bool) for cache in caches]
    else:
        kept = _without_duplicates(caches, deduplicate)
    skeleton = Skeleton(
        image_ids=_join([cache.image_ids for cache in caches], kept),
        paths=_join([cache.paths for cache in caches], kept),
        captions=merge_captions([cache.captions for cache in caches], kept),
        encoder=caches[0].encoder,
        batch_rows=caches[0].batch_rows,
    )
    if sharded:
        shard = caches[0].shard
        assert shard is not None
        captions = skeleton.captions
        for what, together, shared in (
            ("photos", skeleton.photos_sha256(), shard.all_photos_sha256),
            ("captions", texts_sha256(captions.texts, captions.rows), shard.all_captions_sha256),
        ):
            if together != shared:
                raise CacheError(
                    f"{caches[0].path}: together, the shards do not have the {what} of their whole"
                )
    with new_cache(
        out, skeleton, library_versions=_versions(caches), overwrite=overwrite
    ) as writer:
        first = 0
        for cache, mask in zip(caches, kept, strict=True):
            rows = np.flatnonzero(mask)
            block = max(1, _BLOCK_BYTES // (cache.features[:1].nbytes or 1))
            for start in range(0, len(rows), block):
                part = rows[start : start + block]
                writer.copy(first, cache, part)
                cache.forget_pages()
                first += len(part)
        unreadable = int((writer.status != DONE).sum())
    left_out = sum(int((~mask).sum()) for mask in kept)
    return MergeReport(
        caches=len(caches),
        photos=len(skeleton.paths),
        unreadable=unreadable,
        captions=len(skeleton.captions),
        duplicates=left_out,
        duplicate_captions=sum(len(c.captions) for c in caches) - len(skeleton.captions),
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
        numbers = np.bincount(own, minlength=len(table.words)).tolist()
        counts.update({w: n for w, n in zip(table.words, numbers, strict=True) if n})
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    number = {word: index for index, (word, _) in enumerate(ordered)}
    # A word that occurs only in captions left out has no number, and none is looked up.
    renumbered = [
        np.array([number.get(word, -1) for word in table.words], np.int32)[own]
        for table, own in zip(tables, tokens, strict=True)
    ]
    first_rows = offsets_of(np.array([int(mask.sum()) for mask in kept], np.int64))
    rows = [
        (first + np.cumsum(mask)[table.rows[captions]] - 1).astype(np.int32)
        for table, mask, captions, first in zip(tables, kept, chosen, first_rows[:-1], strict=True)
    ]
    return CaptionTable(
        texts=_join([table.texts for table in tables], chosen),
        rows=np.concatenate(rows),
        tokens=np.concatenate(renumbered),
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


def _without_duplicates(
    caches: Sequence[FeatureCache], deduplicate: bool
) -> list[NDArray[np.bool_]]:
    """For each cache, which photos are kept.

    Copies of a photo within one cache are all kept; only copies in different caches are duplicates.
    """
    owners = np.repeat(np.arange(len(caches)), [len(cache) for cache in caches])
    first_rows = offsets_of(np.bincount(owners, minlength=len(caches)))

    def named(row: int) -> str:
        cache = caches[owners[row]]
        return f"{cache.path}: {cache.paths[int(row - first_rows[owners[row]])]}"

    digests = np.concatenate([cache.digests for cache in caches])
    same_id = _in_an_earlier_cache(np.concatenate([_id_digests(c) for c in caches]), owners)
    # A photo whose file could not be opened has no digest, so it is compared by its id.
    earlier = np.where(digests.any(axis=1), _in_an_earlier_cache(digests, owners), same_id)
    duplicates = np.flatnonzero(earlier >= 0)
    if len(duplicates) and not deduplicate:
        row = int(duplicates[0])
        raise CacheError(
            f"{named(row)} is the same photo as {named(int(earlier[row]))} "
            f"(duplicates: {len(duplicates):,}); --deduplicate keeps the first of each"
        )
    keep = earlier < 0
    clashes = np.flatnonzero((same_id >= 0) & keep)
    if len(clashes):
        row = int(clashes[0])
        raise CacheError(
            f"{named(row)} has the same id as another photo, {named(int(same_id[row]))} "
            f"(ids that clash: {len(clashes):,})"
        )
    return [keep[start:stop] for start, stop in pairwise(first_rows)]


def _in_an_earlier_cache(keys: NDArray[np.uint8], owners: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each row, the first row of an earlier owner that has the same (16,) key, or -1."""
    halves = np.ascontiguousarray(keys).view(np.uint64)  # (N, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: equal keys stay in row order
    ordered = halves[order]
    starts = np.ones(len(order), bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[np.flatnonzero(starts)[np.cumsum(starts) - 1]]
    first[owners[first] == owners] = -1
    return first


def _id_digests(cache: FeatureCache) -> NDArray[np.uint8]:
    data = b"".join(
        hashlib.blake2b(
            image_id.encode("utf-8", "surrogateescape"), digest_size=DIGEST_BYTES
        ).digest()
        for image_id in cache.image_ids
    )
    return np.frombuffer(data, np.uint8).reshape(-1, DIGEST_BYTES)


def _versions(caches: Sequence[FeatureCache]) -> dict[str, str]:
    """The library versions behind the caches; where they differ, all of them."""
    names = {name: None for cache in caches for name in cache.library_versions}
    return {
        name: ", ".join(
            dict.fromkeys(
                cache.library_versions[name] for cache in caches if name in cache.library_versions
            )
        )
        for name in names
    }
