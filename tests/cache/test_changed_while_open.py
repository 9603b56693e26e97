"""A cache that other programs replace, cut off or overwrite while it is open."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cache.record import CacheError
from cache.store import DONE, open_cache
from cache.verify import check_rows, verify
from cache.writer import open_writer
from tests.conftest import MakeCache, skeleton


def test_a_replaced_file_is_read_on_as_the_old_one(make_cache: MakeCache) -> None:
    cache = make_cache([["a"], ["b"]])
    before = cache.features.copy()
    make_cache([["a"]], name="y.h5")
    cache.path.with_name("y.h5").replace(cache.path)
    for features in (cache.features, cache.load_features(), cache.read_rows(np.array([0, 1]))):
        assert np.array_equal(features, before)
    assert (cache.status == DONE).all()


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    """As `cp` does, with a cache of the same size."""
    path.write_bytes(path.with_name("y.h5").read_bytes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut_off, r"x\.h5: [\d,]+ bytes, but [\d,]+ when it was opened; another program has cut"),
        (overwrite, r"x\.h5: another program has overwritten it since it was opened; start again"),
    ],
)
def test_a_cache_that_changes_while_it_is_open_is_one_line(
    make_cache: MakeCache, change: Callable[[Path], None], message: str
) -> None:
    """Reading the mapping beyond the end would kill the process."""
    make_cache([["a"], ["c"]], feature_dim=4096, name="y.h5")
    cache = make_cache([["a"], ["b"]], feature_dim=4096)
    os.utime(cache.path, ns=(0, 0))  # a file system may count time in steps of milliseconds
    cache.check_unchanged()
    change(cache.path)
    for read in (
        cache.check_unchanged,
        cache.load_features,
        lambda: cache.read_rows(np.array([1])),
        lambda: verify(cache),
        lambda: check_rows(cache, np.array([0])),
    ):
        with pytest.raises(CacheError, match=message):
            read()


def test_a_cache_cut_off_in_the_middle_of_a_read_is_one_line(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache([["a"], ["b"]], feature_dim=4096)
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], position: int) -> int:
        cut_off(cache.path)
        return real(fd, buffers, position)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(CacheError, match="another program has cut it off"):
        cache.load_features()


def test_rows_that_are_filled_meanwhile_are_no_change(tmp_path: Path) -> None:
    with open_writer(tmp_path / "x.h5", skeleton([["a"], ["b"]]), library_versions={}) as writer:
        cache = open_cache(tmp_path / "x.h5", allow_pending=True)
        writer.write(np.array([1]), np.ones((1, 1, 8), np.float16), np.ones((1, 16), np.uint8))
        writer.flush()
        assert cache.status.tolist() == [0, DONE]
        assert cache.read_rows(np.array([1])).tolist() == [[[1.0] * 8]]
        assert cache.load_features()[1].tolist() == [[1.0] * 8]
