from __future__ import annotations

from pathlib import Path

import pytest

from cache.merge import merge
from cache.record import CacheError
from cache.store import open_cache
from pipeline.extraction.config import parse_shard
from pipeline.extraction.distributed.shards import ShardError, shard_of
from tests.pipeline.test_cli import cap
from tests.pipeline.test_extract import run


def test_shares_are_even_runs_of_whole_batches() -> None:
    whole = {"all_photos_sha256": "ab", "all_captions_sha256": "cd"}
    shares = [shard_of(100, 8, number, 4, **whole)[1] for number in (1, 2, 3, 4)]
    assert shares == [slice(0, 24), slice(24, 48), slice(48, 72), slice(72, 100)]
    shard, rows = shard_of(10, 4, 3, 3, **whole)
    assert (str(shard), shard.first_row, shard.all_rows, rows) == ("3/3", 8, 10, slice(8, 10))
    with pytest.raises(ShardError, match="10 photos are 3 batches of 4; make at most 3 shards"):
        shard_of(10, 4, 1, 4, **whole)


def test_a_shard_is_written_i_of_n() -> None:
    assert parse_shard("2/8") == (2, 8)
    for text in ("0/8", "9/8", "2", "2/", "a/b", "1/2/3", "-1/2"):
        with pytest.raises(ValueError, match="is not I/N"):
            parse_shard(text)


def test_the_command_refuses_an_impossible_share(photos: Path, tmp_path: Path) -> None:
    _, err = cap(
        "extract-features", "--images", photos, "--out", tmp_path / "x.h5", "--shard", "3/2", code=2
    )
    assert "'3/2' is not I/N" in err


def test_merged_shards_are_the_bytes_of_one_extraction(photos: Path, tmp_path: Path) -> None:
    """Twelve photos in batches of five, the last batch short, one photo unreadable."""
    run(photos, tmp_path / "whole.h5", batch_size=5)
    for number in (1, 2, 3):
        last, _ = run(photos, tmp_path / f"{number}.h5", batch_size=5, shard=(number, 3))
        assert last.total == (5, 5, 2)[number - 1]
    merge([tmp_path / f"{number}.h5" for number in (3, 1, 2)], tmp_path / "merged.h5")
    assert (tmp_path / "merged.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_shards_of_other_captions_or_photos_are_refused(photos: Path, tmp_path: Path) -> None:
    lines = (photos / "captions.txt").read_text().splitlines()
    changed, renamed = tmp_path / "changed.csv", tmp_path / "renamed.csv"
    changed.write_text("\n".join([*lines[:-1], lines[-1] + " indeed"]))
    renamed.write_text("\n".join(lines[::-1][:-1]))
    run(photos, tmp_path / "1.h5", shard=(1, 2), captions=photos / "captions.txt")
    for captions, what in ((renamed, "photos"), (None, "captions"), (changed, "captions")):
        run(photos, tmp_path / "2.h5", shard=(2, 2), captions=captions, overwrite=True)
        with pytest.raises(CacheError, match=rf"2\.h5: a shard of other {what} than .*1\.h5"):
            merge([tmp_path / "1.h5", tmp_path / "2.h5"], tmp_path / "merged.h5")
    # The remedy in the message: extract again with the same captions, reusing all encoded photos.
    _, notices = run(
        photos, tmp_path / "3.h5", shard=(2, 2), captions=photos / "captions.txt",
        reuse=tmp_path / "2.h5",
    )  # fmt: skip
    assert notices[-1:] == ["7 photos are known; encoding the others"]
    report = merge([tmp_path / "1.h5", tmp_path / "3.h5"], tmp_path / "merged.h5")
    assert (report.photos, report.captions) == (12, 24)


def test_a_shard_goes_on_as_itself_only(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "x.h5", shard=(1, 3))
    last, _ = run(photos, tmp_path / "x.h5", shard=(1, 3))
    assert (last.new, last.total) == (0, 4)
    for changes, message in (
        ({"shard": (2, 3)}, "written with --shard 1/3, not --shard 2/3"),
        ({}, "written with --shard 1/3, not all photos"),
    ):
        with pytest.raises(CacheError, match=message):
            run(photos, tmp_path / "x.h5", **changes)
    assert str(open_cache(tmp_path / "x.h5").shard) == "1/3"


def other_captions_elsewhere(photos: Path, tmp_path: Path) -> Path:
    """A captions file that differs from that of the photos in its last line only."""
    lines = (photos / "captions.txt").read_text().splitlines()
    changed = tmp_path / "changed.csv"
    changed.write_text("\n".join([*lines[:-1], lines[-1] + " indeed"]))
    return changed


def test_a_shard_does_not_go_on_with_other_captions_elsewhere_in_the_set(
    photos: Path, tmp_path: Path
) -> None:
    """Its own captions are the same, but it could not be merged with the other shards."""
    run(photos, tmp_path / "x.h5", shard=(1, 3))
    changed = other_captions_elsewhere(photos, tmp_path)
    with pytest.raises(CacheError, match=r"x\.h5: written with other captions in the other shards"):
        run(photos, tmp_path / "x.h5", shard=(1, 3), captions=changed)


@pytest.mark.parametrize(
    ("changes", "notice"),
    [
        ({}, None),
        ({"captions": None}, "shard 1/3 was made with other captions than these; if it"),
        ({"image_size": 96}, "shard 1/3 was made with image_size 64, not 96; if it"),
        ({"batch_size": 3}, "shard 1/3 was made with --batch-size 4, not 3; if it"),
        ({"limit": 11}, "shard 1/3 was made with other photos than these; if it"),
        ({"shard": (2, 2)}, None),
        ({"shard": None}, None),
    ],
)
def test_a_shard_that_begins_says_what_keeps_it_from_those_beside_it(
    photos: Path, tmp_path: Path, changes: dict[str, object], notice: str | None
) -> None:
    run(photos, tmp_path / "train.1.h5", shard=(1, 3))
    run(photos, tmp_path / "other.h5", shard=(3, 3), image_size=32)  # has nothing to do with it
    (tmp_path / "train.7.h5").write_text("no cache")
    _, notices = run(photos, tmp_path / "train.2.h5", **{"shard": (2, 3), **changes})
    expected = [] if notice is None else [f"{tmp_path}/train.1.h5: {notice}"]
    found = [text.partition(" belongs") for text in notices]
    assert [text for text, belongs, _ in found if belongs] == expected
