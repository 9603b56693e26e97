"""Joining caches keeps the photos, counts words again, and does not silently drop or repeat any."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.merge import merge
from cache.record import CacheError, Shard, Skeleton, Strings, photos_sha256, texts_sha256
from cache.store import DONE, UNREADABLE, FeatureCache, open_cache
from cache.verify import verify
from cache.writer import CacheWriter, open_writer
from tests.conftest import ROOT, record
from tests.pipeline.test_cli import cap
from train.captions.numbering import build_caption_table
from train.captions.script import TREEBANK, WHITESPACE

PHOTOS = [f"{letter}.jpg" for letter in "abcdefghij"]
CAPTIONS = {
    name: [f"A dog and {name[0]} .", "The dog , a cat ."][: index % 3]
    for index, name in enumerate(PHOTOS)
}
BAD = {"c.jpg", "h.jpg"}


def digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def features(name: str) -> np.ndarray:
    return np.frombuffer(digest(name), np.uint8).reshape(1, 16)[:, :8].astype(np.float16)


def write(
    path: Path,
    photos: Sequence[str],
    *,
    shard: Shard | None = None,
    pending: Sequence[str] = (),
    content: dict[str, str] | None = None,
    unreadable: Collection[str] = BAD,
    tokenizer: str = TREEBANK,
    **changes: object,
) -> FeatureCache:
    """Write a cache of these photos as an extraction would. Features follow from the content."""
    content = content or {}
    skeleton = Skeleton(
        image_ids=Strings.pack(photos),
        paths=Strings.pack(photos),
        captions=build_caption_table([CAPTIONS[name] for name in photos], tokenizer),
        encoder=record(**changes),
        batch_rows=2,
        shard=shard,
    )
    with open_writer(path, skeleton, library_versions={"torch": "2"}) as writer:
        for row, name in enumerate(photos):
            inside = content.get(name, name)
            if name in pending:
                continue
            if inside == "absent":
                writer.set_unreadable(row, "file not found", np.zeros(16, np.uint8))
            elif name in unreadable:
                key = np.frombuffer(digest(inside), np.uint8)
                writer.set_unreadable(row, f"cannot decode ({name})", key)
            else:
                key = np.frombuffer(digest(inside), np.uint8)[None]
                writer.write(np.array([row]), features(inside)[None], key)
    return open_cache(path, allow_pending=True)


def shards(folder: Path, *cuts: int, content: dict[str, str] | None = None) -> list[Path]:
    names = Strings.pack(PHOTOS)
    whole = photos_sha256(names, names)
    table = build_caption_table([CAPTIONS[name] for name in PHOTOS])
    captions = texts_sha256(table.texts, table.rows)
    bounds = [0, *cuts, len(PHOTOS)]
    paths = []
    for i in range(len(bounds) - 1):
        shard = Shard(i + 1, len(bounds) - 1, bounds[i], len(PHOTOS), whole, captions)
        paths.append(folder / f"s{i + 1}.h5")
        write(paths[-1], PHOTOS[bounds[i] : bounds[i + 1]], shard=shard, content=content)
    return paths


def test_merged_shards_are_the_unsharded_file_in_any_order(tmp_path: Path) -> None:
    write(tmp_path / "whole.h5", PHOTOS)
    paths = shards(tmp_path, 2, 6)
    report = merge([paths[2], paths[0], paths[1]], tmp_path / "merged.h5")
    assert (tmp_path / "merged.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert (report.photos, report.unreadable, report.captions) == (10, 2, 9)
    assert not list(tmp_path.glob("*.tmp"))


def test_sets_of_photos_are_joined_as_if_extracted_together(tmp_path: Path) -> None:
    write(tmp_path / "whole.h5", PHOTOS)
    write(tmp_path / "a.h5", PHOTOS[:3])
    write(tmp_path / "b.h5", PHOTOS[3:])
    merge([tmp_path / "a.h5", tmp_path / "b.h5"], tmp_path / "merged.h5")
    assert (tmp_path / "merged.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    merged = open_cache(tmp_path / "merged.h5")
    assert dict(merged.errors()) == {name: f"cannot decode ({name})" for name in BAD}
    assert verify(merged)[0].ok


def test_a_missing_or_repeated_shard_is_named(tmp_path: Path) -> None:
    one, two, three, four = shards(tmp_path, 2, 4, 6)
    out = tmp_path / "merged.h5"
    with pytest.raises(CacheError, match=r"s1\.h5: shard 1/4; missing are 2/4, 4/4"):
        merge([one, three], out)
    with pytest.raises(CacheError, match=r"s2\.h5: shard 2/4, and so is .*s2\.h5"):
        merge([one, two, two, three, four], out)
    write(tmp_path / "other.h5", ["a.jpg"])
    with pytest.raises(CacheError, match=r"other\.h5: is not a shard, but .*s1\.h5 is shard 1/4"):
        merge([one, two, three, tmp_path / "other.h5"], out)
    (tmp_path / "halves").mkdir()
    half = shards(tmp_path / "halves", 4)[0]
    with pytest.raises(CacheError, match=r"halves/s1\.h5: shard 1/2 of 10 photos .* shard 1/4"):
        merge([one, half], out)
    assert not out.exists()


def test_another_encoder_is_refused_by_file_and_field(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", PHOTOS[:2])
    write(tmp_path / "b.h5", PHOTOS[2:4], precision="bfloat16")
    with pytest.raises(
        CacheError, match=r"b\.h5: made with precision bfloat16, not float32 as in .*a\.h5"
    ):
        merge([tmp_path / "a.h5", tmp_path / "b.h5"], tmp_path / "merged.h5")


def test_captions_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "bare.h5", ["a.jpg"])  # has no captions, so any tokenizer goes with it
    write(tmp_path / "b.h5", PHOTOS[1:3], tokenizer=WHITESPACE)
    write(tmp_path / "c.h5", PHOTOS[3:6])
    merge([tmp_path / "bare.h5", tmp_path / "b.h5"], tmp_path / "merged.h5")
    merged = open_cache(tmp_path / "merged.h5").captions
    assert merged.tokenizer == WHITESPACE
    assert "the" in merged.words
    with pytest.raises(
        CacheError, match=r"c\.h5: made with tokenizer treebank, not whitespace as in .*b\.h5"
    ):
        merge([tmp_path / name for name in ("bare.h5", "b.h5", "c.h5")], tmp_path / "all.h5")


def test_pending_and_damaged_rows_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", PHOTOS[:2])
    write(tmp_path / "b.h5", PHOTOS[2:4], pending=["d.jpg"])
    with pytest.raises(CacheError, match=r"b\.h5: 1 of 2 photos are not extracted yet"):
        merge([tmp_path / "a.h5", tmp_path / "b.h5"], tmp_path / "merged.h5")
    cache = write(tmp_path / "d.h5", PHOTOS[4:6])
    with (tmp_path / "d.h5").open("rb+") as file:
        file.seek(cache.region("features").offset + 16)
        file.write(b"\x55")
    with pytest.raises(CacheError, match=r"d\.h5: row 1 \(f\.jpg\) does not match its checksum"):
        merge([tmp_path / "a.h5", tmp_path / "d.h5"], tmp_path / "merged.h5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "b.h5", "d.h5"]


def test_duplicates_are_refused_or_left_out_with_their_captions(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", ["a.jpg", "b.jpg", "c.jpg"])
    write(tmp_path / "b.h5", ["d.jpg", "f.jpg", "g.jpg"], content={"f.jpg": "b.jpg"})
    paths, out = [tmp_path / "a.h5", tmp_path / "b.h5"], tmp_path / "merged.h5"
    found = r"b\.h5: f\.jpg is the same photo as .*a\.h5: b\.jpg \(duplicates: 1\); --deduplicate"
    with pytest.raises(CacheError, match=found):
        merge(paths, out)
    report = merge(paths, out, deduplicate=True)
    assert (report.photos, report.duplicates, report.duplicate_captions) == (5, 1, 2)
    write(tmp_path / "expected.h5", ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "g.jpg"])
    assert out.read_bytes() == (tmp_path / "expected.h5").read_bytes()


def test_copies_within_one_cache_are_its_owners_affair(tmp_path: Path) -> None:
    same = {"b.jpg": "a.jpg"}
    write(tmp_path / "a.h5", ["a.jpg", "b.jpg"], content=same)
    write(tmp_path / "b.h5", ["d.jpg"])
    report = merge([tmp_path / "a.h5", tmp_path / "b.h5"], tmp_path / "x.h5", deduplicate=True)
    assert report.photos == 3


def test_one_id_for_two_photos_is_refused_even_when_deduplicating(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", ["a.jpg", "b.jpg"])
    write(tmp_path / "b.h5", ["b.jpg", "d.jpg"], content={"b.jpg": "another"})
    for deduplicate in (False, True):
        with pytest.raises(
            CacheError, match=r"b\.h5: b\.jpg has the same id as another photo, .*a\.h5"
        ):
            merge(
                [tmp_path / "a.h5", tmp_path / "b.h5"],
                tmp_path / "merged.h5",
                deduplicate=deduplicate,
            )


def test_absent_files_are_told_apart_by_their_id(tmp_path: Path) -> None:
    gone = {"a.jpg": "absent", "d.jpg": "absent"}
    write(tmp_path / "a.h5", ["a.jpg", "b.jpg"], content=gone)
    write(tmp_path / "b.h5", ["d.jpg", "e.jpg"], content=gone)
    merge([tmp_path / "a.h5", tmp_path / "b.h5"], tmp_path / "x.h5")
    assert open_cache(tmp_path / "x.h5").status.tolist() == [UNREADABLE, DONE, UNREADABLE, DONE]
    write(tmp_path / "c.h5", ["a.jpg", "f.jpg"], content=gone)
    with pytest.raises(CacheError, match=r"c\.h5: a\.jpg is the same photo as .*a\.h5: a\.jpg"):
        merge([tmp_path / "a.h5", tmp_path / "c.h5"], tmp_path / "y.h5")
    report = merge([tmp_path / "a.h5", tmp_path / "c.h5"], tmp_path / "y.h5", deduplicate=True)
    assert report.photos == 3


@pytest.mark.parametrize("unreadable_first", [True, False])
@pytest.mark.parametrize("inside", ["absent", "broken"])
def test_of_an_unreadable_photo_and_its_whole_copy_the_whole_one_is_kept(
    tmp_path: Path, inside: str, unreadable_first: bool
) -> None:
    """Its file was missing or damaged, and has been mended for the other cache."""
    bad, good = tmp_path / "bad.h5", tmp_path / "good.h5"
    write(bad, ["a.jpg", "b.jpg"], content={"b.jpg": inside}, unreadable=["b.jpg"])
    write(good, ["b.jpg", "d.jpg"])
    paths = [bad, good] if unreadable_first else [good, bad]
    with pytest.raises(CacheError, match=r"bad\.h5: b\.jpg is the same photo as .*good\.h5"):
        merge(paths, tmp_path / "x.h5")
    report = merge(paths, tmp_path / "x.h5", deduplicate=True)
    assert (report.photos, report.unreadable, report.duplicates) == (3, 0, 1)
    merged = open_cache(tmp_path / "x.h5")
    assert sorted(merged.paths) == ["a.jpg", "b.jpg", "d.jpg"]
    row = list(merged.paths).index("b.jpg")
    assert np.array_equal(merged.features[row], features("b.jpg"))


def test_the_same_bytes_that_only_one_cache_could_decode_are_kept_there(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", ["a.jpg", "b.jpg"], unreadable=["b.jpg"])
    write(tmp_path / "b.h5", ["d.jpg", "e.jpg"], content={"d.jpg": "b.jpg"})
    write(tmp_path / "c.h5", ["f.jpg"], content={"f.jpg": "b.jpg"})
    merge([tmp_path / f"{n}.h5" for n in "abc"], tmp_path / "x.h5", deduplicate=True)
    merged = open_cache(tmp_path / "x.h5")
    assert list(merged.paths) == ["a.jpg", "d.jpg", "e.jpg"]
    assert (merged.status == DONE).all()


def test_the_id_of_a_photo_that_is_left_out_is_free(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", ["a.jpg", "b.jpg"])
    write(tmp_path / "b.h5", ["d.jpg"], content={"d.jpg": "b.jpg"})
    write(tmp_path / "c.h5", ["d.jpg", "e.jpg"])
    merge([tmp_path / f"{n}.h5" for n in "abc"], tmp_path / "x.h5", deduplicate=True)
    assert list(open_cache(tmp_path / "x.h5").paths) == ["a.jpg", "b.jpg", "d.jpg", "e.jpg"]


def test_copies_in_different_shards_are_left_out_when_asked(tmp_path: Path) -> None:
    copies = {"f.jpg": "a.jpg", "j.jpg": "g.jpg"}  # of the first shard; of its own shard
    paths = shards(tmp_path, 4, content=copies)
    assert merge(paths, tmp_path / "x.h5").photos == 10
    report = merge(paths, tmp_path / "y.h5", deduplicate=True)
    assert (report.photos, report.duplicates, report.duplicate_captions) == (9, 1, 2)
    merged = open_cache(tmp_path / "y.h5")
    assert list(merged.paths) == [name for name in PHOTOS if name != "f.jpg"]
    assert verify(merged)[0].ok


def test_a_cache_that_is_written_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unreadable photos are tried again while the caches are being copied."""
    write(tmp_path / "a.h5", ["a.jpg", "b.jpg"])
    write(tmp_path / "b.h5", ["c.jpg", "d.jpg"])
    real = CacheWriter.copy

    def copy(writer: CacheWriter, rows: Any, source: FeatureCache, source_rows: Any) -> None:
        skeleton = Skeleton(
            source.image_ids, source.paths, source.captions, source.encoder, source.batch_rows
        )
        with open_writer(source.path, skeleton, library_versions={}) as other:
            other.retry_unreadable()
        real(writer, rows, source, source_rows)

    monkeypatch.setattr(CacheWriter, "copy", copy)
    with pytest.raises(CacheError, match=r"b\.h5: another process is writing it"):
        merge([tmp_path / "a.h5", tmp_path / "b.h5"], tmp_path / "x.h5")
    assert not (tmp_path / "x.h5").exists()


def test_an_existing_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", PHOTOS[:2])
    write(tmp_path / "b.h5", PHOTOS[3:5])
    before = (tmp_path / "a.h5").read_bytes()
    with pytest.raises(CacheError, match=r"a\.h5: already exists; name another --out"):
        merge([tmp_path / "a.h5", tmp_path / "b.h5"], tmp_path / "a.h5")
    assert (tmp_path / "a.h5").read_bytes() == before
    merge([tmp_path / "a.h5", tmp_path / "b.h5"], tmp_path / "a.h5", overwrite=True)
    assert list(open_cache(tmp_path / "a.h5").paths) == [*PHOTOS[:2], *PHOTOS[3:5]]


def test_the_command_prints_what_it_made(tmp_path: Path) -> None:
    one, two = shards(tmp_path, 4)
    out, _ = cap("merge", one, two, "--out", tmp_path / "x.h5")
    assert out == f"{tmp_path}/x.h5: 10 photos of 2 caches, 9 captions; 2 set aside\n"
    result = json.loads(cap("merge", two, one, "--out", tmp_path / "y.h5", "--json")[0])
    assert (result["photos"], result["unreadable"], result["duplicates"]) == (10, 2, 0)
    out, err = cap("merge", one, one, "--out", tmp_path / "z.h5", code=1)
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith(f"error: {one}: shard 1/2, and so is ")


def test_memory_does_not_grow_with_the_features(tmp_path: Path) -> None:
    """Two caches of 120 MB each, merged in a process that may take 60 MB beyond its imports."""
    code = f"""
import resource, sys
from pathlib import Path
from cache.merge import merge
folder = Path({str(tmp_path)!r})
def rss():  # KB
    return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])
before = rss()
merge([folder / 'a.h5', folder / 'b.h5'], folder / 'c.h5')
print(rss() - before)
"""
    for name, first in (("a.h5", 0), ("b.h5", 1000)):
        names = Strings.pack(str(first + row) for row in range(1000))
        skeleton = Skeleton(
            names, names, build_caption_table([[]] * 1000), record(feature_dim=60_000), 4
        )
        keys = np.frombuffer(b"".join(digest(name) for name in names), np.uint8).reshape(-1, 16)
        with open_writer(tmp_path / name, skeleton, library_versions={}) as writer:
            for start in range(0, 1000, 100):
                rows = np.arange(start, start + 100)
                block = np.full((100, 1, 60_000), start / 1000, np.float16)
                writer.write(rows, block, keys[rows])
    taken = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert int(taken.stdout) < 60_000
