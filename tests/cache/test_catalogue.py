"""A catalogue is read like the merged cache of the caches that it lists."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.derived.catalogue import write_catalogue
from cache.derived.update import update_cache
from cache.merge import merge
from cache.record import CacheError
from cache.store import DONE, FeatureCache, open_cache
from cache.verify import check_rows, verify
from cache.writer import check_place, open_writer
from tests.cache.test_merge import PHOTOS, shards, write
from tests.conftest import skeleton
from tests.pipeline.test_cli import cap

ARRAYS = ("status", "digests", "checksums", "error_bytes")


@pytest.fixture
def listed(tmp_path: Path) -> tuple[FeatureCache, FeatureCache]:
    """(a catalogue of three shards, the cache merged from them)."""
    paths = shards(tmp_path, 2, 6)
    write_catalogue([paths[2], paths[0], paths[1]], tmp_path / "photos.catalogue")
    merge(paths, tmp_path / "merged.h5")
    return open_cache(tmp_path / "photos.catalogue"), open_cache(tmp_path / "merged.h5")


def test_a_catalogue_has_the_rows_of_the_merged_cache(
    listed: tuple[FeatureCache, FeatureCache],
) -> None:
    catalogue, merged = listed
    assert len(catalogue) == len(merged) == len(PHOTOS)
    for name in ARRAYS:
        assert np.array_equal(getattr(catalogue, name), getattr(merged, name)), name
    assert list(catalogue.paths) == list(merged.paths) == PHOTOS
    assert catalogue.image_ids == merged.image_ids
    assert catalogue.captions.sha256() == merged.captions.sha256()
    assert list(catalogue.captions.words) == list(merged.captions.words)
    assert catalogue.captions.counts.tolist() == merged.captions.counts.tolist()
    assert catalogue.encoder == merged.encoder
    assert catalogue.photos_sha256 == merged.photos_sha256
    assert catalogue.library_versions == merged.library_versions
    assert catalogue.errors() == merged.errors()
    for row in merged.rows_with(DONE).tolist():
        assert np.array_equal(catalogue[row], merged[row])
        assert np.array_equal(catalogue[PHOTOS[row]], merged[PHOTOS[row]])
    assert verify(catalogue)[0].ok
    assert np.array_equal(pickle.loads(pickle.dumps(catalogue)).features[9], merged.features[9])


def test_features_are_indexed_as_those_of_an_array(
    listed: tuple[FeatureCache, FeatureCache],
) -> None:
    catalogue, merged = listed
    array = np.array(merged.features)
    scattered = np.array([9, 0, 5, 5, 6, -1, 1])
    views = np.zeros(7, np.int64)
    keys: tuple[Any, ...] = (
        3,
        -1,
        np.int64(2),
        slice(1, 9, 2),
        slice(None, None, -1),
        scattered,
        [1, 2],
        [],
        scattered.reshape(7, 1),
        array[:, 0, 0] > 100,
        (scattered, views),
        (scattered, 0, slice(2, 4)),
        (scattered, slice(None), 3),
        (scattered.reshape(7, 1), views),
        (slice(2, 8), 0),
        (4, 0, 1),
        (Ellipsis, 2),
        Ellipsis,
    )
    for key in keys:
        assert np.array_equal(catalogue.features[key], array[key]), key
    assert catalogue.features.shape == array.shape
    assert catalogue.features.nbytes == array.nbytes
    assert len(catalogue.features) == 10
    assert np.array_equal(np.asarray(catalogue.features), array)
    assert np.array_equal(catalogue.read_rows(scattered % 10), array[scattered])
    assert np.array_equal(catalogue.load_features(), array)
    wrong: tuple[Any, ...] = (
        10,
        -11,
        np.array([3, 10]),
        np.array([0.5]),
        np.ones(9, bool),
        "a.jpg",
        None,
    )
    for bad in wrong:
        with pytest.raises(IndexError):
            catalogue.features[bad]


def test_sets_of_photos_are_listed_and_joined_again(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", PHOTOS[:3])
    write(tmp_path / "b.h5", PHOTOS[3:])
    write(tmp_path / "whole.h5", PHOTOS)
    report = write_catalogue([tmp_path / "a.h5", tmp_path / "b.h5"], tmp_path / "x.catalogue")
    assert (report.caches, report.photos, report.unreadable, report.captions) == (2, 10, 2, 9)
    merge([tmp_path / "x.catalogue"], tmp_path / "merged.h5")  # now with the features
    assert (tmp_path / "merged.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_a_folder_of_a_catalogue_and_its_caches_can_be_moved(tmp_path: Path) -> None:
    (tmp_path / "old" / "shards").mkdir(parents=True)
    paths = shards(tmp_path / "old" / "shards", 5)
    (tmp_path / "link").symlink_to(tmp_path / "old" / "shards", target_is_directory=True)
    by_link = [tmp_path / "link" / path.name for path in paths]
    write_catalogue(by_link, tmp_path / "old" / "x.catalogue")
    (tmp_path / "link").unlink()
    (tmp_path / "old").rename(tmp_path / "new")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "name").symlink_to(tmp_path / "new" / "x.catalogue")
    assert len(open_cache(tmp_path / "elsewhere" / "name").load_features()) == 10


def _remove(path: Path) -> None:
    path.unlink()


def _cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


def _another_cache(path: Path) -> None:
    """Of the same size."""
    shard = open_cache(path).shard
    other = write(path.with_name("other.h5"), PHOTOS[2:6], shard=shard, precision="float16")
    other.path.replace(path)


def _other_rows(path: Path) -> None:
    """The same names and captions, hence the same seal, but another photo."""
    path.unlink()
    shards(path.parent, 2, 6, content={"d.jpg": "another"})


def _pending(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[open_cache(path).region("status").offset + 1] = 0
    path.write_bytes(data)


CHANGES = pytest.mark.parametrize(
    ("change", "message"),
    [
        (_remove, r"s2\.h5, which it lists, is not there; put it back, or list the caches again"),
        (_cut_off, r"s2\.h5 has [\d,]+ bytes, but [\d,]+ when it was listed"),
        (_another_cache, r"s2\.h5 is another cache than when it was listed"),
        (_other_rows, r"s2\.h5 has other rows than when it was listed"),
        (_pending, r"1 of 4 photos of .*s2\.h5 are not extracted yet"),
    ],
)


@CHANGES
def test_a_cache_that_has_changed_is_named_when_the_catalogue_is_opened(
    tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    write_catalogue(shards(tmp_path, 2, 6), tmp_path / "x.catalogue")
    change(tmp_path / "s2.h5")
    with pytest.raises(CacheError, match=rf"x\.catalogue: .*{message}") as raised:
        open_cache(tmp_path / "x.catalogue")
    assert "\n" not in str(raised.value)


@CHANGES
def test_a_cache_that_changes_while_the_catalogue_is_open_is_named(
    tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    write_catalogue(shards(tmp_path, 2, 6), tmp_path / "x.catalogue")
    catalogue = open_cache(tmp_path / "x.catalogue")
    os.utime(tmp_path / "s2.h5", ns=(0, 0))  # touched, which is no change
    assert len(catalogue.load_features()) == 10
    change(tmp_path / "s2.h5")
    catalogue.read_rows(np.array([0, 9]))  # of the other caches
    for read in (
        lambda: catalogue.read_rows(np.array([0, 3])),
        lambda: catalogue.features[2:4],
        lambda: catalogue[3],
        lambda: check_rows(catalogue, np.arange(10)),
    ):
        with pytest.raises(CacheError, match=rf"x\.catalogue: .*{message}"):
            read()


def test_whatever_merge_refuses_is_refused(tmp_path: Path) -> None:
    one, two, three = shards(tmp_path, 2, 6)
    out = tmp_path / "x.catalogue"
    with pytest.raises(CacheError, match=r"s1\.h5: shard 1/3; missing is 2/3"):
        write_catalogue([one, three], out)
    write(tmp_path / "b.h5", PHOTOS[:2], precision="bfloat16")
    write(tmp_path / "c.h5", PHOTOS[2:], pending=["d.jpg"])
    write(tmp_path / "d.h5", PHOTOS[:2])
    for paths, message in (
        (["b.h5", "d.h5"], r"d\.h5: made with precision float32, not bfloat16"),
        (["c.h5", "d.h5"], r"c\.h5: 1 of 8 photos are not extracted yet"),
        (["d.h5", "d.h5"], r"is the same photo as"),
        ([], "no caches"),
    ):
        with pytest.raises(CacheError, match=message):
            write_catalogue([tmp_path / path for path in paths], out)
    assert not out.exists()
    write_catalogue([one, two, three], out)
    before = out.read_bytes()
    with pytest.raises(CacheError, match=r"x\.catalogue: already exists; .*--overwrite"):
        write_catalogue([one, two, three], out)
    with pytest.raises(CacheError, match=r"x\.catalogue: is a catalogue itself"):
        write_catalogue([out], tmp_path / "y.catalogue")
    with pytest.raises(CacheError, match=r"s1\.h5: is one of the caches to list"):
        write_catalogue([one, two, three], one, overwrite=True)
    write_catalogue([one, two, three], out, overwrite=True)
    assert out.read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_cache_of_an_older_format_is_refused(tmp_path: Path) -> None:
    old = Path(__file__).parent.parent / "formats" / "v0.1.0" / "cache.h5"
    with pytest.raises(CacheError, match=r"cache\.h5: has format 2, which a catalogue cannot list"):
        write_catalogue([old], tmp_path / "x.catalogue")


def test_a_catalogue_is_not_filled(tmp_path: Path) -> None:
    write_catalogue(shards(tmp_path, 4), tmp_path / "x.catalogue")
    before = (tmp_path / "x.catalogue").read_bytes()
    asked = skeleton([["a"]])
    for attempt in (
        lambda: open_writer(tmp_path / "x.catalogue", asked, library_versions={}),
        lambda: update_cache(tmp_path / "x.catalogue", asked, np.zeros(1, np.int64)),
        lambda: check_place(tmp_path / "x.catalogue"),
    ):
        with pytest.raises(CacheError, match=r"x\.catalogue: is a catalogue, which lists caches"):
            attempt()
    assert (tmp_path / "x.catalogue").read_bytes() == before


def test_a_damaged_row_of_a_listed_cache_is_found(tmp_path: Path) -> None:
    paths = shards(tmp_path, 4)
    write_catalogue(paths, tmp_path / "x.catalogue")
    data = bytearray(paths[1].read_bytes())
    data[open_cache(paths[1]).region("features").offset] ^= 1
    paths[1].write_bytes(data)
    report, _ = verify(open_cache(tmp_path / "x.catalogue"))
    assert report.damaged == ["e.jpg: row 4 does not match its checksum"]


@pytest.mark.parametrize("change", ["rows", "offsets", "path"])
def test_a_manipulated_list_is_one_line(tmp_path: Path, change: str) -> None:
    """With recomputed checksums, as somebody might do on purpose."""
    from cache import seal as seals

    paths = shards(tmp_path, 4)
    write_catalogue(paths, tmp_path / "x.catalogue")
    array = {"rows": "shards/rows", "offsets": "shards/paths/offsets", "path": "shards/paths/text"}
    region = open_cache(tmp_path / "x.catalogue").region(array[change])
    fd = os.open(tmp_path / "x.catalogue", os.O_RDWR)
    os.pwrite(fd, b"\0" if change == "path" else b"\x05", region.offset)
    seal = seals.read_seal(fd)
    seals.write_seal(fd, seal.arrays, seal.attributes)
    os.close(fd)
    with pytest.raises(CacheError, match=r"x\.catalogue: "):
        open_cache(tmp_path / "x.catalogue")


def test_the_commands_take_a_catalogue(tmp_path: Path) -> None:
    paths = shards(tmp_path, 3)
    out = tmp_path / "photos.catalogue"
    said, _ = cap("merge", *paths, "--catalogue", "--out", out)
    assert said == f"{out}: catalogue of 10 photos of 2 caches, 9 captions; 2 set aside\n"
    facts = json.loads(cap("info", out, "--json")[0])
    assert (facts["kind"], facts["photos"], facts["listed_caches"]) == ("cache", 10, 2)
    assert facts["listed_bytes"] == sum(path.stat().st_size for path in paths)
    assert "listed_caches" not in cap("info", paths[0])[0]
    cap("verify", out)
    cap("merge", *paths, "--catalogue", "--deduplicate", "--out", out, code=2)
    paths[0].unlink()
    _, error = cap("info", out, code=1)
    assert error.count("\n") == 1
    assert "s1.h5, which it lists, is not there" in error
