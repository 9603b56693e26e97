"""A row is bound to its photo, and the cache says which library versions made its parts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache.derived.update import update_cache
from cache.merge import merge
from cache.record import Strings, join_versions, pack_versions, unpack_versions
from cache.store import LATER_VERSIONS_BYTES, PENDING, open_cache
from cache.verify import verify
from cache.writer import open_writer
from tests.cache.test_store import CAPTIONS, DIGESTS, FEATURES, fill
from tests.conftest import ROOT, skeleton


def exchange(path: Path, one: int, other: int, names: tuple[str, ...]) -> None:
    """Exchange two rows in these arrays."""
    cache = open_cache(path)
    data = bytearray(path.read_bytes())
    for name in names:
        region = cache.region(name)
        size = region.size_bytes // region.shape[0]
        first, second = (
            slice(region.offset + row * size, region.offset + row * size + size)
            for row in (one, other)
        )
        data[first], data[second] = data[second], data[first]
    path.write_bytes(data)


ROW = ("features", "digests", "errors", "checksums")


@pytest.mark.parametrize("names", [ROW, ROW[:1], ROW[:3], (*ROW, "status")])
def test_rows_that_are_exchanged_are_found(tmp_path: Path, names: tuple[str, ...]) -> None:
    path = tmp_path / "x.h5"
    fill(path)
    exchange(path, 0, 2, names)
    assert verify(open_cache(path))[0].damaged == [
        f"{name}: row {row} does not match its checksum"
        for row, name in ((0, "0000.jpg"), (2, "0002.jpg"))
    ]


def test_rows_of_an_older_format_are_not_bound_to_their_photos(tmp_path: Path) -> None:
    """Format 2 has nothing to notice it by, but damage within a row is still found."""
    path = tmp_path / "x.h5"
    shutil.copy(ROOT / "tests" / "formats" / "v0.1.0" / "cache.h5", path)
    exchange(path, 0, 2, ROW)
    assert verify(open_cache(path))[0].ok
    exchange(path, 0, 3, ("features",))
    assert len(verify(open_cache(path))[0].damaged) == 2


@pytest.mark.parametrize("kind", ["merge", "update"])
def test_copied_rows_are_bound_to_their_new_photos(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.h5"
    fill(path)
    if kind == "merge":
        merge([path], tmp_path / "y.h5")
        path = tmp_path / "y.h5"
    else:
        renamed = replace(skeleton(CAPTIONS), paths=Strings.pack(["c.jpg", "b.jpg", "a.jpg"]))
        update_cache(path, renamed, np.array([2, 1, 0]))
    assert verify(open_cache(path))[0].ok
    exchange(path, 0, 2, ROW)
    assert len(verify(open_cache(path))[0].damaged) == 2


def test_the_versions_behind_all_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    for row, versions in enumerate(
        ({"torch": "2.13", "pillow": "11"}, {"torch": "2.14", "pillow": "11"}, {"torch": "2.13"})
    ):
        with open_writer(path, skeleton(CAPTIONS), library_versions=versions) as writer:
            writer.write(np.array([row]), FEATURES[[row]], DIGESTS[[row]])
        # A run that writes nothing has made nothing.
        open_writer(path, skeleton(CAPTIONS), library_versions={"torch": "3"}).close()
    cache = open_cache(path)
    assert cache.library_versions == {"torch": "2.13, 2.14", "pillow": "11"}
    assert bytes(cache.later_versions).rstrip(b"\0") == pack_versions({"torch": "2.14"})
    assert verify(cache)[0].ok
    other = replace(skeleton(CAPTIONS), image_ids=Strings.pack("abc"))
    with open_writer(tmp_path / "y.h5", other, library_versions={"torch": "2.14"}) as writer:
        writer.write(np.arange(3), FEATURES, DIGESTS + 100)
    merge([path, tmp_path / "y.h5"], tmp_path / "z.h5")
    merged = open_cache(tmp_path / "z.h5").library_versions
    assert merged == {"torch": "2.13, 2.14", "pillow": "11"}
    with open_writer(tmp_path / "w.h5", other, library_versions={"torch": "2.15"}) as writer:
        writer.copy(np.array([0, 1]), cache, np.array([1, 0]))
    reused = open_cache(tmp_path / "w.h5", allow_pending=True)
    assert reused.library_versions == {"torch": "2.15, 2.13, 2.14", "pillow": "11"}


def test_a_torn_or_damaged_list_of_versions_is_said_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    fill(path)
    with open_writer(path, skeleton(CAPTIONS), library_versions={"torch": "3"}) as writer:
        writer.retry_unreadable()
        writer.write(np.array([1]), FEATURES[[1]], DIGESTS[[1]])
    region = open_cache(path).region("later_versions")
    whole = path.read_bytes()
    for place in (0, 5, 12, 30, 2000):
        data = bytearray(whole)
        data[region.offset + place] ^= 1
        path.write_bytes(data)
        message = f"{path}: its list of library versions is damaged"
        assert verify(open_cache(path))[0].damaged == [message]
    path.write_bytes(whole[: region.offset + 9] + bytes(100) + whole[region.offset + 109 :])
    assert open_cache(path).library_versions == {"torch": "2"}
    with open_writer(path, skeleton(CAPTIONS), library_versions={"torch": "3"}) as writer:
        writer.write(np.array([1]), FEATURES[[1]], DIGESTS[[1]])
    assert path.read_bytes() == whole


def test_versions_beyond_the_room_for_them_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    fill(path)
    for number in range(9):
        versions = {"torch": f"{number}" * 1000}
        with open_writer(path, skeleton(CAPTIONS), library_versions=versions) as writer:
            writer.write(np.array([0]), FEATURES[[0]], DIGESTS[[0]])
    cache = open_cache(path)
    assert verify(cache)[0].ok
    assert len(cache.later_versions) == LATER_VERSIONS_BYTES
    assert [v[0] for v in cache.library_versions["torch"].split(", ")] == [*"20123"]


def test_an_older_format_is_filled_on_without_new_versions(tmp_path: Path) -> None:
    from tests.formats.make import skeleton as written

    path = tmp_path / "x.h5"
    shutil.copy(ROOT / "tests" / "formats" / "v0.1.0" / "pending.h5", path)
    size = path.stat().st_size
    with open_writer(path, written(), library_versions={"torch": "99"}) as writer:
        rows = np.flatnonzero(writer.status == PENDING)
        writer.write(rows, np.ones((len(rows), 2, 8), np.float16), np.ones((len(rows), 16), "u1"))
    assert path.stat().st_size == size
    assert open_cache(path).library_versions == {"torch": "2.14.1"}
    assert verify(open_cache(path))[0].ok


def test_versions_are_joined_once_each() -> None:
    assert join_versions([{"a": "1"}, {"a": "2, 1", "b": "3"}, {}]) == {"a": "1, 2", "b": "3"}
    lines = pack_versions({"a": "é"}) + pack_versions({"b": "2"})
    assert unpack_versions(lines + bytes(9)) == ([{"a": "é"}, {"b": "2"}], len(lines))
    assert unpack_versions(lines[:-1])[0] == [{"a": "é"}]
    assert unpack_versions(b"") == ([], 0)


def test_which_ids_were_numbers_is_kept(tmp_path: Path) -> None:
    known = replace(skeleton(CAPTIONS), numbered=np.array([True, False, True]))
    for name, made in (("x.h5", known), ("y.h5", skeleton(CAPTIONS))):
        with open_writer(tmp_path / name, made, library_versions={}) as writer:
            writer.write(np.arange(3), FEATURES, DIGESTS)
    cache = open_cache(tmp_path / "x.h5")
    assert cache.numbered is not None
    assert cache.numbered.tolist() == [True, False, True]
    assert open_cache(tmp_path / "y.h5").numbered is None
    merge([tmp_path / "x.h5"], tmp_path / "z.h5")
    assert (tmp_path / "z.h5").read_bytes() == (tmp_path / "x.h5").read_bytes()
    paths = [tmp_path / "x.h5", tmp_path / "y.h5"]
    merge(paths, tmp_path / "z.h5", deduplicate=True, overwrite=True)
    assert open_cache(tmp_path / "z.h5").numbered is None  # as unknown as in one of them
