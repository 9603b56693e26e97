"""Photos in tars and in Parquet files are the photos of the folder that they were made of."""

from __future__ import annotations

import ctypes
import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cache.merge import merge
from cache.store import DONE, PENDING, UNREADABLE, FeatureCache, open_cache
from pipeline.captions.dataset import read_photos
from pipeline.captions.records import DatasetError
from pipeline.extraction.extract import extract
from pipeline.extraction.fill import Progress
from pipeline.extraction.verify import verify_cache
from pipeline.photos.photo_file import file_digest, read_file
from pipeline.photos.photo_loader import BatchRequest, PhotoLoader
from pipeline.photos.sources import ranges
from pipeline.photos.sources.errors import SourceError
from pipeline.photos.sources.parquets import index_parquet
from pipeline.photos.sources.patterns import expanded, is_pattern, photos_at, root_of
from pipeline.photos.sources.places import Part, shown, without_secrets
from pipeline.photos.sources.reading import bytes_of
from pipeline.photos.sources.source import Source, open_source
from pipeline.photos.sources.tars import index_tar
from tests.conftest import write_photo
from tests.pipeline.making_sources import as_parquet, as_tars, captions_of, photos_of, write_tar
from tests.pipeline.test_cli import cap
from tests.pipeline.test_extract import config, run


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    """The cache of the folder."""
    out = tmp_path_factory.mktemp("whole") / "x.h5"
    run(photos, out)
    return open_cache(out)


def assert_same(cache: FeatureCache, whole: FeatureCache) -> None:
    """The same photos and captions, and the same bytes of features; names aside."""
    assert cache.status.tolist() == whole.status.tolist()
    assert cache.features.tobytes() == whole.features.tobytes()
    assert np.array_equal(cache.digests, whole.digests)
    assert cache.captions.by_row(len(cache)) == whole.captions.by_row(len(whole))
    assert [name.rpartition("/")[2] for name in cache.paths] == list(whole.paths)
    assert [reason for _, reason in cache.errors()] == [reason for _, reason in whole.errors()]


@pytest.mark.parametrize("kind", [".txt", ".json", "parquet", "captions file"])
def test_tars_and_parquet_give_the_bytes_of_the_folder(
    kind: str, photos: Path, whole: FeatureCache, tmp_path: Path
) -> None:
    captions = None
    if kind == "parquet":
        images = str(as_parquet(photos, tmp_path / "train.parquet"))
    else:
        images = as_tars(photos, tmp_path, texts=None if kind == "captions file" else kind)
        captions = photos / "captions.txt" if kind == "captions file" else None
    last, notices = run(photos, tmp_path / "x.h5", images=images, captions=captions)
    assert (last.done, last.unreadable) == (11, 1)
    assert_same(open_cache(tmp_path / "x.h5"), whole)
    if captions is None:
        told = {
            ".txt": ".txt members",
            ".json": "field 'captions' of .json members",
            "parquet": "column caption",
        }
        assert f"captions in {told[kind]}; 12 of 12 photos found; 24 captions" in notices[0]
    else:
        assert "photos matched: 12 by file name alone" in notices[2]


def test_an_interrupted_run_and_shards_over_tars_end_in_the_same_bytes(
    photos: Path, tmp_path: Path
) -> None:
    images = as_tars(photos, tmp_path)
    run(photos, tmp_path / "whole.h5", images=images, captions=None)
    reports = extract(config(photos, tmp_path / "x.h5", images=images, captions=None))
    for report in reports:
        if isinstance(report, Progress) and report.new >= 4:
            break
    reports.close()
    assert (open_cache(tmp_path / "x.h5", allow_pending=True).status == PENDING).any()
    run(photos, tmp_path / "x.h5", images=images, captions=None)
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    for number in (1, 2):
        out = tmp_path / f"{number}.h5"
        run(photos, out, images=images, captions=None, shard=(number, 2))
    merge([tmp_path / "1.h5", tmp_path / "2.h5"], tmp_path / "merged.h5")
    assert (tmp_path / "merged.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_update_and_verify_know_a_photo_of_a_tar_by_its_bytes(
    photos: Path, whole: FeatureCache, tmp_path: Path
) -> None:
    images = as_tars(photos, tmp_path)
    _, notices = run(
        photos, tmp_path / "x.h5", images=images, captions=None, reuse=Path(whole.path)
    )
    assert "11 photos are known; encoding the others" in notices
    assert verify_cache(tmp_path / "x.h5", images).ok
    changed = tmp_path / "changed"
    shutil.copytree(photos, changed)
    write_photo(changed / "b.jpg", 99)
    as_tars(changed, tmp_path)
    problems = verify_cache(tmp_path / "x.h5", images).problems
    b = "photos-000.tar/b.jpg"
    assert problems == [f"{b}: the photo has changed since its features were extracted"]
    last, notices = run(photos, tmp_path / "x.h5", images=images, captions=None, update=True)
    assert last.new == 1
    assert f"{tmp_path / 'x.h5'}: 11 photos kept, 1 changed" in notices


def test_reader_processes_read_tars_and_parquet_as_threads_do(photos: Path, tmp_path: Path) -> None:
    """Of a Parquet file, whose row groups of five rows lie across the batches, too."""
    sources = [
        open_source(as_tars(photos, tmp_path)),
        open_source(as_parquet(photos, tmp_path / "x.parquet")),
    ]
    places = [source.place(name) for source in sources for name in source.photos().paths]

    def pixels(processes: bool) -> tuple[list[bytes], dict[int, str]]:
        loader = PhotoLoader(
            [BatchRequest(row, range(row, min(row + 4, 24))) for row in range(0, 24, 4)],
            places.__getitem__,
            batch_rows=4,
            image_size=32,
            views=("full",),
            readers=2,
            processes=processes,
        )
        found, errors = [], {}
        with loader:
            for batch in loader:
                found.append(batch.pixels.numpy().tobytes() + batch.digests.tobytes())
                errors.update(batch.errors)
                loader.release(batch)
        return found, errors

    assert pixels(True) == pixels(False)
    assert pixels(False)[1].keys() == {4, 16}


def test_a_tar_that_vanishes_ends_the_run_and_sets_no_photo_aside(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = as_tars(photos, tmp_path, parts=3)
    monkeypatch.setattr(ranges, "_MOST_OPEN", 1)
    reports = extract(config(photos, tmp_path / "x.h5", images=images, captions=None, workers=1))

    def take_away() -> None:
        for report in reports:
            if isinstance(report, Progress):
                (tmp_path / "photos-002.tar").unlink(missing_ok=True)

    with pytest.raises(SourceError, match=r"photos-002\.tar: cannot be read any more \(No such"):
        take_away()
    cache = open_cache(tmp_path / "x.h5", allow_pending=True)
    assert (cache.status[8:] == PENDING).all()
    assert not (cache.status[5:] == UNREADABLE).any()
    assert (cache.status == DONE).sum() >= 3
    as_tars(photos, tmp_path, parts=3)
    last, _ = run(photos, tmp_path / "x.h5", images=images, captions=None)
    assert (last.done, last.unreadable) == (11, 1)


LONG = "/".join(["a folder with a long name"] * 8) + "/ä photo.jpg"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_places_in_a_tar_are_those_of_tarfile(format: int, tmp_path: Path) -> None:
    long = LONG if format != tarfile.USTAR_FORMAT else "short/ä.jpg"
    members = [(f"{n}.jpg", bytes([n]) * (n * 300)) for n in range(1, 6)]
    members[2:2] = [("notes.md", b"x" * 1000), ("./dot.jpg", b"dot"), (long, b"long")]
    path = write_tar(tmp_path / "x.tar", members, format)
    index = index_tar(str(path))
    with tarfile.open(path) as tar:
        expected = {
            member.name.removeprefix("./"): tar.extractfile(member).read()  # type: ignore[union-attr]
            for member in tar
            if member.name.endswith(".jpg")
        }
    found = {index.names[n]: bytes_of(index.place(n)) for n in range(len(index))}
    assert found == expected
    assert long in found
    assert index.left_out == {".md": 1}


def gzipped(path: Path) -> None:
    path.write_bytes(gzip.compress(write_tar(path, [("a.jpg", b"x")]).read_bytes()))


def cut_off(path: Path) -> None:
    data = write_tar(path, [("a.jpg", b"x" * 2000), ("b.jpg", b"y" * 5000)]).read_bytes()
    path.write_bytes(data[:5000])


def damaged(path: Path) -> None:
    data = bytearray(write_tar(path, [(f"{n}.jpg", b"x" * 600) for n in range(9)]).read_bytes())
    data[1536 * 4 : 1536 * 4 + 8] = b"\1damaged"
    path.write_bytes(data)


def two_in_one(path: Path) -> None:
    one = write_tar(path, [("a.jpg", b"x")]).read_bytes()
    path.write_bytes(one + one)


BAD_TARS: list[tuple[Callable[[Path], object], str]] = [
    (gzipped, r"is compressed \(gzip\), .* unpack it once with `gunzip`"),
    (cut_off, "is cut off, its last member is not whole; copy it again"),
    (damaged, "has a damaged header, at byte 6,144; what comes after it cannot be found"),
    (two_in_one, "has another tar behind its end, at byte "),
    (lambda path: path.write_bytes(b""), "is empty, and no tar"),
    (lambda path: path.write_bytes(b"no tar at all" * 99), "not a tar, or damaged"),
    (
        lambda path: write_tar(path, [("1.tar", b"x"), ("2.tar", b"y")]),
        "holds 2 tars and no photos; unpack it once and name these",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD_TARS, ids=range(len(BAD_TARS)))
def test_a_bad_tar_is_one_line(
    make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    make(tmp_path / "x.tar")
    with pytest.raises(SourceError, match=rf"^\S*x\.tar: {message}"):
        open_source(tmp_path / "x.tar")


def test_odd_members_are_left_out_and_counted(tmp_path: Path) -> None:
    members = [
        *(("../out.jpg", b"1"), ("/abs.jpg", b"2"), ("._a.jpg", b"3"), ("a.jpg", b"4")),
        *(("a.jpg", b"five"), ("b.cr2", b"6"), ("c", b"7"), ("d.JPG", b"8")),
    ]
    path = write_tar(tmp_path / "x.tar", members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        tar.addfile(link)
    told: list[str] = []
    photos = read_photos(path, say=told.append)
    assert [photo.path for photo in photos] == ["x.tar/abs.jpg", "x.tar/a.jpg", "x.tar/d.JPG"]
    assert read_file(open_source(path).place("x.tar/a.jpg")) == b"five"  # as if unpacked
    for text in ("1 hidden", "1 with .. in the name", "1 .cr2", "1 links and special members"):
        assert text in told[0]
    assert "1 replaced by a later member of the same name" in told[0]


def captions_in(path: Path, **choices: Any) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    told: list[str] = []
    photos = read_photos(path, say=told.append, **choices)
    return {photo.path.partition("/")[2]: photo.captions for photo in photos}, told


def test_texts_of_a_tar_belong_to_the_photo_of_their_key(tmp_path: Path) -> None:
    members = [
        *(("1.jpg", b"1"), ("1.txt", b"One .\nUno ."), ("1.json", b'{"caption": "One ."}')),
        *(("2.left.jpg", b"2"), ("2.txt", b"Two .")),  # the only photo of its key
        *(("3.left.jpg", b"3"), ("3.right.jpg", b"3"), ("3.txt", b"Three .")),  # whose is it?
        *(("4.jpg", b"4"), ("4.depth.png", b"4"), ("4.txt", b"Four .")),
        *(("2019.06.a.jpg", b"5"), ("2019.06.a.txt", b"Five .")),  # dates have points, too
        *(("2019.06.b.jpg", b"6"), ("2019.06.b.txt", b"Six .")),
        *(("7.jpg", b"7"), ("7.json", json.dumps({"caption": "Seven .", "width": 3}).encode())),
        ("8.jpg", b"8"),
        *(("9.jpg", b"9"), ("9.txt", b"written_by_cap\nNine .")),
    ]
    found, told = captions_in(write_tar(tmp_path / "x.tar", members))
    assert found == {
        "1.jpg": ("One .", "Uno ."),
        "2.left.jpg": ("Two .",),
        "4.jpg": ("Four .",),
        "2019.06.a.jpg": ("Five .",),
        "2019.06.b.jpg": ("Six .",),
        "7.jpg": ("Seven .",),
    }
    text = "\n".join(told)
    assert "3 photos are left out because another photo has their key" in text
    assert "(first: x.tar/3.left.jpg)" in text
    assert "1 photos have no caption with them and are left out" in text
    assert "1 photos are left out because this program wrote their captions" in text


def test_fields_of_json_members_are_found_or_named(tmp_path: Path) -> None:
    def tar(*records: object) -> Path:
        members = []
        for number, record in enumerate(records):
            members.append((f"{number}.jpg", b"x"))
            members.append((f"{number}.json", json.dumps(record).encode()))
        return write_tar(tmp_path / "x.tar", members)

    nested = {"sentences": [{"raw": "A dog runs ."}, {"raw": "It runs ."}], "id": 3}
    assert captions_in(tar(nested, nested))[0]["1.jpg"] == ("A dog runs .", "It runs .")
    assert captions_in(tar(["A dog .", "It runs ."]))[0] == {"0.jpg": ("A dog .", "It runs .")}
    assert captions_in(tar({"label": 3}))[0] == {"0.jpg": ()}  # no captions, but photos
    both = {"first": "A dog runs .", "second": "A cat sleeps ."}
    with pytest.raises(DatasetError, match=r"x\.tar/0\.json: columns 'first' and 'second' both"):
        captions_in(tar(both, both))
    chosen, _ = captions_in(tar(both, both), caption_column="second")
    assert chosen["0.jpg"] == ("A cat sleeps .",)
    broken = write_tar(tmp_path / "b.tar", [("0.jpg", b"x"), ("0.json", b"{")])
    with pytest.raises(DatasetError, match=r"0\.json: not valid JSON"):
        captions_in(broken)


def test_photos_of_tars_come_as_they_lie_whatever_the_captions_file_says(
    photos: Path, tmp_path: Path
) -> None:
    images = as_tars(photos, tmp_path)
    lines = (photos / "captions.txt").read_text().splitlines()
    (tmp_path / "c.csv").write_text("\n".join([lines[0], *lines[:0:-1]]))
    found = read_photos(images, tmp_path / "c.csv")
    assert [photo.path[-5:] for photo in found] == [photo.name for photo in photos_of(photos)]
    assert [photo.path for photo in read_photos(images, limit=2)] == [
        "photos-000.tar/a.jpg",
        "photos-000.tar/b.jpg",
    ]


def test_parquet_files_of_many_kinds(photos: Path, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    data = [photo.read_bytes() for photo in photos_of(photos)[:3]]

    def written(**columns: object) -> Path:
        parquet.write_table(arrow.table(columns), path, row_group_size=2)
        return path

    def names() -> list[str]:
        return open_source(path).photos().paths

    written(jpg=arrow.array(data, arrow.large_binary()), file_name=["a", "x/b.jpg", "c"])
    assert names() == ["x.parquet/a", "x.parquet/x/b.jpg", "x.parquet/c"]
    source: Source = open_source(path)
    assert [read_file(source.place(name)) for name in names()] == data
    # Names that are missing, or stand for several rows, or lead elsewhere, are numbers instead.
    for bad in (["a", None, "c"], ["a", "a", "c"], ["a", "../b", "c"]):
        written(image=data, path=bad)
        assert names() == [f"x.parquet/{n:08d}" for n in range(3)]
    written(image=data, text=["One .", "Two .", "Three ."], split=["train", "val", "train"])
    assert captions_in(path, split="train")[0] == {
        "00000000": ("One .",),
        "00000002": ("Three .",),
    }
    with pytest.raises(DatasetError, match="no split test; it has train, val"):
        captions_in(path, split="test")
    written(image=[data[0], None, data[2]])
    assert read_file(open_source(path).place("x.parquet/00000000")) == data[0]
    written(image=[data[2], None, data[2]])  # nothing is kept of the file that was there before
    assert read_file(open_source(path).place("x.parquet/00000000")) == data[2]
    cell = open_source(path).place("x.parquet/00000001")
    assert bytes_of(cell) is None  # type: ignore[arg-type]
    written(first=data, second=data)
    with pytest.raises(SourceError, match="columns first and second both hold pictures; say"):
        index_parquet(str(path))
    assert index_parquet(str(path), "second").column == "second"
    written(url=["http://x/1.jpg"] * 3, n=[1, 2, 3])
    with pytest.raises(SourceError, match=r"no column holds pictures; columns: url \(string\), n"):
        index_parquet(str(path))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(SourceError, match=r"x\.parquet: not a Parquet file that can be read"):
        index_parquet(str(path))


def test_braces_and_the_folder_above_them() -> None:
    assert list(expanded("a-{08..11}.tar")) == [f"a-{n}.tar" for n in ("08", "09", "10", "11")]
    assert list(expanded("{b,a}/{2..1}.tar")) == ["b/2.tar", "b/1.tar", "a/2.tar", "a/1.tar"]
    assert list(expanded("{x}.tar")) == ["{x}.tar"]
    with pytest.raises(SourceError, match="means more than 1,000,000 files"):
        list(expanded("{0..9999999}.tar"))
    for pattern, root in (
        ("data/photos-{000..999}.tar", "data/"),
        ("photos.tar", ""),
        ("s3://bucket/a/*/x.tar", "s3://bucket/a/"),
        ("https://host/x.tar?sig=a/b", "https://host/"),
    ):
        assert root_of(pattern) == root
    assert not is_pattern("https://host/x.tar?sig=*")
    assert photos_at("s3://bucket/x") == "s3://bucket/x"
    assert photos_at("file:///a%20b/c.tar") == Path("/a b/c.tar")


def test_names_of_files_of_a_pattern_that_are_missing_are_told(
    photos: Path, tmp_path: Path
) -> None:
    as_tars(photos, tmp_path)
    with pytest.raises(SourceError, match=r"photos-002\.tar: no such file or folder, of .*\{000"):
        open_source(str(tmp_path / "photos-{000..003}.tar"))
    with pytest.raises(SourceError, match=r"\*\.parquet: matches nothing"):
        open_source(str(tmp_path / "*.parquet"))
    (tmp_path / "cap.txt").write_text("x")
    with pytest.raises(SourceError, match=r"cap.txt: is no folder, tar, Parquet file or photo"):
        open_source(str(tmp_path / "cap.txt"))
    with pytest.raises(DatasetError, match=rf"no photos found; .*--images '{tmp_path}/\*\.tar'"):
        read_photos(tmp_path)
    # Two tars of one name in folders that a glob means have names of their own.
    as_tars(photos, tmp_path / "sub" / "a", parts=1)
    as_tars(photos, tmp_path / "sub" / "b", parts=1)
    found = open_source(str(tmp_path / "sub" / "*" / "*.tar")).photos().paths
    assert (found[0], found[12]) == ("a/photos-000.tar/a.jpg", "b/photos-000.tar/a.jpg")


def test_the_command_takes_tars_and_says_what_is_wrong_in_one_line(
    photos: Path, tmp_path: Path
) -> None:
    images = as_tars(photos, tmp_path)
    small = ("--backbone", "resnet18", "--weights", "random", "--image-size", "32")
    out, _ = cap("extract-features", "--images", images, "--out", tmp_path / "x.h5", *small)
    assert "11 photos of 512 features x 1 views, 24 captions; 1 set aside" in out
    out, _ = cap("verify", tmp_path / "x.h5", "--images", images)
    assert "11 photos compared, 11 encoded again" in out
    out, _ = cap("info", photos / "captions.txt", "--images", images)
    assert "12 of 12 photos found" in out
    gzipped(tmp_path / "x.tar.gz")
    _, err = cap(
        "extract-features", "--images", tmp_path / "x.tar.gz", "--out", tmp_path / "y.h5", code=1
    )
    assert err.startswith(f"error: {tmp_path}/x.tar.gz: is compressed (gzip)")
    assert not (tmp_path / "y.h5").exists()


def test_secrets_of_addresses_are_not_shown() -> None:
    address = "https://me:word@host/a/x.tar?X-Amz-Signature=abc&b=c"
    assert without_secrets(address) == "https://host/a/x.tar"
    assert without_secrets(f"cannot open '{address}' now") == (
        "cannot open 'https://host/a/x.tar' now"
    )
    assert shown(Part(address, "1.jpg", 0, 1)) == "https://host/a/x.tar/1.jpg"


def test_a_tar_is_read_by_parts_and_not_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finding the photos touches headers only, however large the bodies are."""
    path = write_tar(tmp_path / "x.tar", [(f"{n}.jpg", bytes(3_000_000)) for n in range(4)])
    read = 0

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            nonlocal read
            count = super().readinto(buffer) or 0
            read += count
            return count

    monkeypatch.setattr(
        "pipeline.photos.sources.tars.open_container",
        lambda container: io.BufferedReader(Counted(container)),
    )
    assert len(index_tar(str(path))) == 4
    assert read < 400_000


def test_captions_that_lie_with_photos_can_be_asked_for(photos: Path, tmp_path: Path) -> None:
    images = as_tars(photos, tmp_path)
    found = read_photos(images, Path("sidecar"))
    assert found[0].captions == tuple(captions_of("a.jpg"))
    with pytest.raises(DatasetError, match="captions inside photos are read in folders only"):
        read_photos(images, Path("metadata"))
    bare = as_tars(photos, tmp_path / "bare", texts=None)
    with pytest.raises(DatasetError, match=r"no captions lie with the photos; 000\.txt or 000"):
        read_photos(bare, Path("sidecar"))
    assert read_photos(bare)[0].captions == ()


def test_bytes_for_a_gpu_are_those_of_the_file(tmp_path: Path) -> None:
    """Of baseline JPEGs with chroma of full resolution, which readers leave to a GPU."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    data = []
    for seed in range(4):
        write_photo(tmp_path / "x.jpg", seed)
        with Image.open(tmp_path / "x.jpg") as photo:
            photo.save(tmp_path / "x.jpg", quality=90, subsampling=0)
        data.append((tmp_path / "x.jpg").read_bytes())
    write_tar(tmp_path / "x.tar", [(f"{n}.jpg", each) for n, each in enumerate(data)])
    parquet.write_table(arrow.table({"image": data}), tmp_path / "x.parquet", row_group_size=3)
    sources = [open_source(tmp_path / "x.tar"), open_source(tmp_path / "x.parquet")]
    places = [source.place(name) for source in sources for name in source.photos().paths]
    loader = PhotoLoader(
        [BatchRequest(0, range(8))],
        places.__getitem__,
        batch_rows=8,
        image_size=32,
        views=("full",),
        readers=1,
        processes=True,
        files=True,
    )
    with loader:
        (batch,) = loader
        files = [batch.files[row] for row in range(8)]
        assert [ctypes.string_at(f.address, f.length) for f in files] == data * 2
        assert batch.digests.tolist() == [file_digest(each).tolist() for each in data * 2]


def test_a_parquet_table_is_a_captions_file(photos: Path, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    names = [photo.name for photo in photos_of(photos)] * 2
    texts = [captions_of(name)[n // 12] for n, name in enumerate(names)]
    table = arrow.table(
        {
            "file_name": names,
            "caption": texts,
            "thumbnail": [b"x"] * 24,
            "photo": [{"bytes": b"x", "path": "other.jpg"}] * 24,
        }
    )
    parquet.write_table(table, tmp_path / "c.parquet")
    assert read_photos(photos, tmp_path / "c.parquet") == read_photos(
        photos, photos / "captions.txt"
    )
    parquet.write_table(arrow.table({"a": [1, 2]}), tmp_path / "d.parquet")
    with pytest.raises(DatasetError, match=r"d\.parquet: no column names photos"):
        read_photos(photos, tmp_path / "d.parquet")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(SourceError, match=r"d\.parquet: not a Parquet file that can be read"):
        read_photos(photos, tmp_path / "d.parquet")
