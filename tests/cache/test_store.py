"""The file format, the writer and the reader: what happens to a cache after kills and damage."""

from __future__ import annotations

import random
from pathlib import Path

import h5py
import numpy as np
import pytest

from cache.record import CacheError, Strings
from cache.store import DONE, PENDING, UNREADABLE, open_cache
from cache.verify import check_rows, verify
from cache.writer import open_writer
from tests.conftest import MakeCache, skeleton

CAPTIONS = [["A dog runs .", "A dog ."], [], ["The cat 's hat ."]]
DIGESTS = np.arange(48, dtype=np.uint8).reshape(3, 16)
FEATURES = np.arange(24, dtype=np.float16).reshape(3, 1, 8)


def fill(path: Path, captions: list[list[str]] = CAPTIONS) -> None:
    with open_writer(path, skeleton(captions), library_versions={"torch": "2"}) as writer:
        writer.write(np.array([0, 2]), FEATURES[[0, 2]], DIGESTS[[0, 2]])
        writer.set_unreadable(1, "cannot decode (é)", DIGESTS[1])


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    fill(tmp_path / "x.h5")
    cache = open_cache(tmp_path / "x.h5")
    assert len(cache) == 3
    assert cache.status.tolist() == [DONE, UNREADABLE, DONE]
    assert np.array_equal(cache.features[[0, 2]], FEATURES[[0, 2]])
    assert np.array_equal(cache.digests, DIGESTS)
    assert list(cache.image_ids) == ["1000", "1001", "1002"]
    assert cache.paths[2] == "0002.jpg"
    assert cache.errors() == [("0001.jpg", "cannot decode (é)")]
    assert cache.encoder == skeleton(CAPTIONS).encoder
    assert cache.captions.by_row(3) == CAPTIONS
    assert cache.library_versions == {"torch": "2"}


def test_tokens_are_numbered_by_frequency_then_alphabet(tmp_path: Path) -> None:
    fill(tmp_path / "x.h5")
    table = open_cache(tmp_path / "x.h5").captions
    assert list(table.words) == [".", "a", "dog", "'s", "cat", "hat", "runs", "the"]
    assert table.counts.tolist() == [3, 2, 2, 1, 1, 1, 1, 1]
    assert table.tokens.tolist() == [1, 2, 6, 0, 1, 2, 0, 7, 4, 3, 5, 0]
    assert table.token_offsets.tolist() == [0, 4, 7, 12]
    assert table.rows.tolist() == [0, 0, 2]


def test_the_file_is_ordinary_hdf5_for_others(tmp_path: Path) -> None:
    fill(tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5", "r") as file:
        assert np.array_equal(file["features"][2], FEATURES[2])
        assert file["features"].chunks is None
        assert file.attrs["backbone"] == "resnet18"
        assert file.attrs["format_version"] == 3
        start, stop = file["captions/offsets"][1:3]
        assert file["captions/text"][start:stop].tobytes() == b"A dog ."


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    fill(tmp_path / "x.h5")
    fill(tmp_path / "y.h5")
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "y.h5").read_bytes()


def test_rows_written_in_two_sessions_give_the_same_bytes(tmp_path: Path) -> None:
    fill(tmp_path / "x.h5")
    with open_writer(
        tmp_path / "y.h5", skeleton(CAPTIONS), library_versions={"torch": "2"}
    ) as writer:
        writer.set_unreadable(1, "cannot decode (é)", DIGESTS[1])
    with pytest.raises(CacheError, match="2 of 3 photos are not extracted yet"):
        open_cache(tmp_path / "y.h5")
    with open_writer(tmp_path / "y.h5", skeleton(CAPTIONS), library_versions={}) as writer:
        assert writer.status.tolist() == [PENDING, UNREADABLE, PENDING]
        writer.write(np.array([2, 0]), FEATURES[[2, 0]], DIGESTS[[2, 0]])
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "y.h5").read_bytes()


def test_a_retried_photo_leaves_no_trace_of_its_error(tmp_path: Path) -> None:
    fill(tmp_path / "x.h5")
    for path, first in ((tmp_path / "y.h5", True), (tmp_path / "z.h5", False)):
        with open_writer(path, skeleton(CAPTIONS), library_versions={}) as writer:
            if first:
                writer.set_unreadable(1, "was not there", DIGESTS[1])
                assert writer.retry_unreadable() == 1
            writer.write(np.arange(3), FEATURES, DIGESTS)
    assert (tmp_path / "y.h5").read_bytes() == (tmp_path / "z.h5").read_bytes()


def test_rows_count_as_pending_until_they_are_flushed(tmp_path: Path) -> None:
    with open_writer(tmp_path / "x.h5", skeleton(CAPTIONS), library_versions={}) as writer:
        writer.write(np.array([0]), FEATURES[:1], DIGESTS[:1])
        assert writer.status[0] == DONE
        assert open_cache(tmp_path / "x.h5", allow_pending=True).status[0] == PENDING
        writer.flush()
        assert open_cache(tmp_path / "x.h5", allow_pending=True).status[0] == DONE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "resnet50"}, "backbone resnet18, not resnet50"),
        ({"weights_sha256": "cd" * 32}, "weights abababababab…, not cdcdcdcdcdcd…"),
        ({"weights_sha256": "cd" * 32, "weights": "b.pth"}, "weights random, not b.pth"),
        ({"image_size": 128}, "image_size 64, not 128"),
        ({"views": ("full", "flip")}, "views full, not full,flip"),
        ({"precision": "bfloat16"}, "precision float32, not bfloat16"),
    ],
)
def test_another_encoder_is_refused_by_field(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    fill(tmp_path / "x.h5")
    before = (tmp_path / "x.h5").read_bytes()
    with pytest.raises(CacheError, match=message):
        open_writer(tmp_path / "x.h5", skeleton(CAPTIONS, **change), library_versions={})
    assert (tmp_path / "x.h5").read_bytes() == before


def test_moved_weights_are_the_same_encoder(tmp_path: Path) -> None:
    fill(tmp_path / "x.h5")
    moved = skeleton(CAPTIONS, weights="elsewhere/w.pth")
    open_writer(tmp_path / "x.h5", moved, library_versions={}).close()


def test_other_photos_and_other_captions_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "x.h5")
    with pytest.raises(CacheError, match="3 photos, not 2"):
        open_writer(tmp_path / "x.h5", skeleton(CAPTIONS[:2]), library_versions={})
    with pytest.raises(CacheError, match="other captions"):
        open_writer(tmp_path / "x.h5", skeleton([["A dog"], [], []]), library_versions={})


def test_overwrite_starts_anew(tmp_path: Path) -> None:
    fill(tmp_path / "x.h5")
    other = skeleton(CAPTIONS[:1])
    with open_writer(tmp_path / "x.h5", other, library_versions={}, overwrite=True) as writer:
        assert writer.status.tolist() == [PENDING]


def test_a_foreign_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with pytest.raises(CacheError, match="no such file"):
        open_cache(path)
    path.write_bytes(b"")
    with pytest.raises(CacheError, match="not a feature cache"):
        open_cache(path)
    with h5py.File(path, "w") as file:
        file["features"] = FEATURES
    with pytest.raises(CacheError, match="not a feature cache"):
        open_cache(path)
    with pytest.raises(CacheError, match="not a feature cache"):
        open_writer(path, skeleton(CAPTIONS), library_versions={})


def test_any_flipped_byte_is_found(tmp_path: Path) -> None:
    """A checksum covers every byte, so a flipped bit is an error message or a damaged row."""
    path = tmp_path / "x.h5"
    fill(path)
    whole = path.read_bytes()
    with h5py.File(path, "r") as file:
        # The features of an unreadable row are never read.
        start = file["features"].id.get_offset() + 16
    slack = range(start, start + 16)
    random.seed(0)
    for position in random.sample(range(len(whole)), 400):
        if position in slack:
            continue
        damaged = bytearray(whole)
        damaged[position] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        try:
            report, _ = verify(open_cache(path))
            assert not report.ok, f"byte {position} went unnoticed"
        except CacheError:
            continue


def test_any_truncation_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    fill(path)
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 997), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CacheError):
            open_cache(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CacheError, match="damaged"):
        open_cache(path)


def test_verify_names_the_damaged_row(tmp_path: Path, make_cache: MakeCache) -> None:
    cache = make_cache([["a"], ["b"], ["c"]])
    offset = cache.region("features").offset
    with cache.path.open("rb+") as file:
        file.seek(offset + 16 + 3)
        file.write(b"\x55")
    report, _ = verify(open_cache(cache.path))
    assert report.damaged == ["0001.jpg: row 1 does not match its checksum"]


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, -NAN, INFINITY, -INFINITY])
def test_verify_names_the_rows_whose_features_are_not_finite(
    make_cache: MakeCache, value: float
) -> None:
    """They match their checksums, as those of another program's cache would."""
    largest = np.finfo(np.float16).max
    features = np.full((700, 1, 8), [largest, -largest, 0, -0.0, 1, 6e-8, -6e-8, 2])
    features[[3, 600], 0, 5] = value
    cache = make_cache([["A dog ."]] * 700, features)
    assert verify(cache)[0].damaged == [
        "0003.jpg: row 3 has features that are not finite (NaN or infinity)",
        "0600.jpg: row 600 has features that are not finite (NaN or infinity)",
    ]
    check_rows(cache, np.array([0, 2, 699]))  # others are not looked at
    with pytest.raises(CacheError) as caught:
        check_rows(cache, np.array([0, 600, 600, 3]))
    assert str(caught.value) == (
        f"{cache.path}: 2 of 3 photos are damaged (first: 0003.jpg, row 3, has features that are "
        f"not finite (NaN or infinity)); `cap verify {cache.path}` names them, extract them again"
    )


def test_an_unreadable_row_may_hold_any_features(tmp_path: Path) -> None:
    fill(tmp_path / "x.h5")
    data = bytearray((tmp_path / "x.h5").read_bytes())
    region = open_cache(tmp_path / "x.h5").region("features")
    data[region.offset + 16 : region.offset + 32] = b"\xff" * 16  # NaN
    (tmp_path / "x.h5").write_bytes(data)
    cache = open_cache(tmp_path / "x.h5")
    assert np.isnan(cache.features[1]).all()
    assert verify(cache)[0].ok


def test_strings_behave_like_a_sequence() -> None:
    strings = Strings.pack(["a", "", "éß", "\udcff raw"])
    assert list(strings) == ["a", "", "éß", "\udcff raw"]
    assert strings[-2] == "éß"
    assert strings[1:3] == ["", "éß"]
    assert len(strings) == 4
    assert strings == Strings.pack(list(strings))
    with pytest.raises(IndexError):
        strings[4]


def test_features_load_as_they_are_mapped(tmp_path: Path) -> None:
    fill(tmp_path / "x.h5")
    cache = open_cache(tmp_path / "x.h5")
    loaded = cache.load_features()
    assert loaded.tobytes() == cache.features.tobytes()
    loaded[:] = 0  # a copy in memory, not the file
    assert cache.features.any()


@pytest.mark.parametrize("between", [0, 10, 70_000])
def test_the_bytes_of_several_strings_are_those_of_each(between: int) -> None:
    """Near ones are read together, far ones each for itself."""
    strings = Strings.pack(["a", "", "bé", "c" * between, "\udcff", "d"])
    index = np.array([5, 0, 2, 4, 2, 1])
    assert strings.raws(index) == [strings.raw(row) for row in index.tolist()]
    assert strings.raws(index[:0]) == []
