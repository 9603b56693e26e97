"""A cache gets other captions or other photos, and keeps the rows that it has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache.derived.update import update_cache
from cache.record import CacheError, Skeleton, Strings
from cache.store import DONE, PENDING, UNREADABLE, open_cache
from cache.verify import verify
from cache.writer import open_writer
from tests.cache.test_store import CAPTIONS, DIGESTS, FEATURES, fill
from tests.conftest import skeleton
from train.captions.numbering import build_caption_table

OTHER = [["A dog sleeps ."], ["Nothing ."], []]


def with_captions(captions: list[list[str]]) -> Skeleton:
    return replace(skeleton(CAPTIONS), captions=build_caption_table(captions))


def test_other_captions_give_the_bytes_of_an_extraction_with_them(tmp_path: Path) -> None:
    fill(tmp_path / "x.h5")
    before = open_cache(tmp_path / "x.h5")
    update_cache(tmp_path / "x.h5", with_captions(OTHER), np.arange(3))
    fill(tmp_path / "y.h5", OTHER)
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "y.h5").read_bytes()
    assert before.captions.by_row(3) == CAPTIONS  # a reader keeps the file that it opened
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["x.h5", "y.h5"]


def test_photos_that_are_new_are_pending_and_gone_ones_are_left_out(tmp_path: Path) -> None:
    fill(tmp_path / "x.h5")
    made = skeleton([[], ["A bird ."], ["The cat 's hat ."], [], []])
    made = replace(
        made,
        image_ids=Strings.pack(["new", "1001", "1002", "copy", "1000"]),
        paths=Strings.pack(["new.jpg", "0001.jpg", "renamed.jpg", "copy.jpg", "0000.jpg"]),
    )
    update_cache(tmp_path / "x.h5", made, np.array([-1, 1, 2, 2, 0]))
    cache = open_cache(tmp_path / "x.h5", allow_pending=True)
    assert cache.status.tolist() == [PENDING, UNREADABLE, DONE, DONE, DONE]
    assert np.array_equal(cache.features[2:], FEATURES[[2, 2, 0]])
    assert np.array_equal(cache.digests[1:], DIGESTS[[1, 2, 2, 0]])
    assert cache.errors() == [("0001.jpg", "cannot decode (é)")]
    assert verify(cache)[0].ok
    with open_writer(tmp_path / "x.h5", made, library_versions={}) as writer:
        writer.write(np.array([0]), FEATURES[:1], DIGESTS[:1])
    assert verify(open_cache(tmp_path / "x.h5"))[0].ok


def test_an_unfinished_cache_stays_unfinished(tmp_path: Path) -> None:
    with open_writer(tmp_path / "x.h5", skeleton(CAPTIONS), library_versions={}) as writer:
        writer.write(np.array([1]), FEATURES[[1]], DIGESTS[[1]])
    update_cache(tmp_path / "x.h5", with_captions(OTHER), np.arange(3))
    cache = open_cache(tmp_path / "x.h5", allow_pending=True)
    assert cache.status.tolist() == [PENDING, DONE, PENDING]
    assert cache.captions.by_row(3) == OTHER


def test_a_refused_update_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    fill(path)
    before = path.read_bytes()
    with pytest.raises(CacheError, match=r"x\.h5: written with image_size 64, not 128; its rows"):
        update_cache(path, skeleton(CAPTIONS, image_size=128), np.arange(3))
    with (
        open_writer(path, skeleton(CAPTIONS), library_versions={}),
        pytest.raises(CacheError, match="another process is writing it"),
    ):
        update_cache(path, with_captions(OTHER), np.arange(3))
    assert path.read_bytes() == before
    offset = open_cache(path).region("features").offset
    damaged = bytearray(before)
    damaged[offset + 3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CacheError, match=r"x\.h5: row 0 \(0000\.jpg\) does not match its checksum"):
        update_cache(path, with_captions(OTHER), np.arange(3))
    assert path.read_bytes() == damaged
