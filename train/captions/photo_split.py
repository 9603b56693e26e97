"""Splits the photos of a cache into those to train on and those held out for validation.

Two photos are copies if their files have the same digest. A digest of zeros is unknown and equals
no other: the file could not be read, or another program made the cache.
"""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from cache.errors import CapError
from cache.store import DIGEST_BYTES, DONE, FeatureCache


class SplitError(CapError):
    """Raised when a list of photos does not fit a cache. The message is one line."""


def split_by_list(cache: FeatureCache, names: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training rows, validation rows): the photos with captions that a file names validate.

    names: a text file with the path of one photo per line, with or without its folders. Raises
    SplitError if it cannot be read, names a photo that is not in the cache, or names all photos
    with captions or none.
    """
    try:
        lines = names.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise SplitError(f"{names}: cannot read ({error.strerror})") from None
    wanted = {line.strip() for line in lines} - {""}
    is_listed = np.zeros(len(cache), bool)
    unknown = set(wanted)
    for row, path in enumerate(cache.paths):
        found = {path, PurePosixPath(path).name} & wanted
        is_listed[row] = bool(found)
        unknown -= found
    if unknown:
        raise SplitError(
            f"{names}: {len(unknown):,} of {len(wanted):,} names are not among the photos of "
            f"{cache.path} (first: {min(unknown)})"
        )
    rows = _rows_with_captions(cache)
    listed = is_listed[rows]
    if listed.all() or not listed.any():
        share = "all" if listed.any() else "none"
        raise SplitError(
            f"{names}: names {share} of the {len(rows):,} photos with captions in {cache.path}; "
            "name some to validate on, and leave others to train on"
        )
    return rows[~listed], rows[listed]


def split_photos(
    cache: FeatureCache, *, held_out: float, seed: int, split_copies: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training rows, validation rows): a random share of the photos with captions is held out.

    A photo is on one side with all its captions, with its copies, and with the photos of the same
    id. The choice depends only on the seed, the image ids and which photos are copies, not on the
    order of the photos. At most the share is held out, but at least one photo with its copies; if
    all photos are copies of one, none. split_copies: ignore copies and equal ids, as 0.1.0 did.
    """
    rows = _rows_with_captions(cache)
    all_ids = list(cache.image_ids)
    ids = [all_ids[row] for row in rows.tolist()]
    groups = list(range(len(rows))) if split_copies else _groups(ids, cache.digests[rows])
    # The lowest id decides a group's rank, so that large groups are not held out more often.
    names: dict[int, str] = {}
    for group, image_id in zip(groups, ids, strict=True):
        names[group] = min(names.get(group, image_id), image_id)
    numbers = np.array(list(names), np.int64)
    sizes = np.bincount(groups)[numbers] if groups else numbers
    ranks = np.array([_rank(name, seed) for name in names.values()], np.int64)
    in_order = np.argsort(ranks, kind="stable")
    left = min(max(1, round(held_out * len(rows))), max(len(rows) - 1, 0))
    chosen: list[int] = []
    for index in in_order.tolist():
        if sizes[index] <= left:
            chosen.append(index)
            left -= sizes[index]
        if not left:
            break
    if not chosen and len(in_order) > 1:  # the smallest group is larger than the share
        chosen = [int(in_order[np.argmin(sizes[in_order])])]
    is_held_out = np.isin(np.array(groups, np.int64), numbers[chosen])
    return rows[~is_held_out], rows[is_held_out]


def _rows_with_captions(cache: FeatureCache) -> NDArray[np.int64]:
    """Of the photos that were extracted."""
    extracted = cache.status[cache.captions.rows] == DONE
    return np.unique(cache.captions.rows[extracted]).astype(np.int64)


def count_copies(digests: NDArray[np.uint8]) -> int:
    """How many of these photos are copies of an earlier one. digests: (N, 16) uint8."""
    return int((_first_copies(digests) != np.arange(len(digests))).sum())


def count_copies_of(others: NDArray[np.uint8], digests: NDArray[np.uint8]) -> int:
    """How many of these photos are copies of one of the others. Both are (N, 16) uint8."""
    known = digests[digests.any(axis=1)]
    return int(np.isin(_keys(known), _keys(others)).sum())


def may_be_equal(digests: NDArray[np.uint8], others: NDArray[np.uint8]) -> bool:
    """Whether no photo n of one set has another digest than photo n of the other set.

    Unknown digests are skipped. Both are (N, 16) uint8.
    """
    known = digests.any(axis=1) & others.any(axis=1)
    return np.array_equal(digests[known], others[known])


def _groups(ids: list[str], digests: NDArray[np.uint8]) -> list[int]:
    """The group of each photo, named by the index of one of its photos.

    Photos that are copies or have the same id are in one group, also by way of other photos.
    """
    parents = list(range(len(ids)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    first_with_id: dict[str, int] = {}
    same_id = [first_with_id.setdefault(image_id, index) for index, image_id in enumerate(ids)]
    for firsts in (same_id, _first_copies(digests).tolist()):
        for index, first in enumerate(firsts):
            if first != index:
                parents[root(index)] = root(first)
    return [root(index) for index in range(len(ids))]


def _first_copies(digests: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(N,) for each photo the index of the first one with its digest; its own if unknown."""
    firsts = np.arange(len(digests))
    known = np.flatnonzero(digests.any(axis=1))
    _, first, inverse = np.unique(_keys(digests[known]), return_index=True, return_inverse=True)
    firsts[known] = known[first[inverse]]
    return firsts


def _keys(digests: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """(N,) byte strings that are equal where the digests (N, 16) are, and can be sorted."""
    return np.ascontiguousarray(digests).view(f"S{DIGEST_BYTES}").reshape(-1)


def _rank(image_id: str, seed: int) -> int:
    text = f"{seed} {image_id}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
