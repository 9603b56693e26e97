"""Photos of a real store of S3's kind on this machine: slow, failing, and cut off in the middle."""

from __future__ import annotations

import http.server
import importlib
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.store import DONE, PENDING, UNREADABLE, FeatureCache, open_cache
from pipeline.extraction.extract import extract
from pipeline.extraction.fill import Progress
from pipeline.extraction.verify import verify_cache
from pipeline.photos.sources import remote
from pipeline.photos.sources.ahead import Ahead
from pipeline.photos.sources.errors import SourceError
from pipeline.photos.sources.places import Part, StoredObject
from pipeline.photos.sources.source import open_source
from tests.pipeline.faulty_store import BUCKET, Faults, FaultyStore, served
from tests.pipeline.making_sources import as_parquet, as_tars, photos_of, write_tar
from tests.pipeline.test_extract import config, run
from tests.pipeline.test_sources import assert_same

pytest.importorskip("s3fs")
fsspec = pytest.importorskip("fsspec")

Store = tuple[str, FaultyStore]


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    yield from served()


@pytest.fixture
def store(server: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A bucket of its own, with credentials and endpoint in the environment, as users have them."""
    address, app = server
    app.faults = Faults()
    for name, value in (
        ("AWS_ENDPOINT_URL", address),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "very-secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(remote, "_LONGEST_WAIT_S", 0.05)
    remote._filesystem.cache_clear()
    # fsspec keeps its file systems by their arguments, and the endpoint is none of them: the server
    # of an earlier run of this module, where tests move between processes, would still be asked.
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    fs, _ = remote.filesystem(f"s3://{BUCKET}/")
    fs.mkdir(BUCKET)
    yield address, app
    app.faults = Faults()
    fs.invalidate_cache()
    fs.rm(BUCKET, recursive=True)
    remote._filesystem.cache_clear()


def put(files: dict[str, bytes]) -> None:
    fs, _ = remote.filesystem(f"s3://{BUCKET}/")
    for name, data in files.items():
        fs.pipe_file(f"{BUCKET}/{name}", data)


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    out = tmp_path_factory.mktemp("whole") / "x.h5"
    run(photos, out)
    return open_cache(out)


def now_and_then(path: str, number: int) -> str:
    """The first request of every object fails in one of four ways, others of some of them, too."""
    kind = sum(path.encode()) % 4
    return ("500", "cut off", "503", "fine")[(kind + number) % 4] if number < 2 else "fine"


@pytest.mark.parametrize("kind", ["tars", "parquet", "objects"])
def test_a_slow_and_failing_store_gives_the_bytes_of_the_folder(
    kind: str, photos: Path, whole: FeatureCache, store: Store, tmp_path: Path
) -> None:
    captions = None
    if kind == "tars":
        as_tars(photos, tmp_path)
        put({path.name: path.read_bytes() for path in tmp_path.glob("*.tar")})
        images = f"s3://{BUCKET}/photos-*.tar"
    elif kind == "parquet":
        put({"a.parquet": as_parquet(photos, tmp_path / "a.parquet").read_bytes()})
        images = f"s3://{BUCKET}/a.parquet"
    else:
        put({f"sub/{path.name}": path.read_bytes() for path in photos_of(photos)})
        put({"sub/readme.md": b"x", "sub/.hidden.jpg": b"x"})
        images, captions = f"s3://{BUCKET}/sub", photos / "captions.txt"
    store[1].faults = Faults(slow_s=0.02, fate=now_and_then)
    last, _ = run(photos, tmp_path / "x.h5", images=images, captions=captions)
    assert (last.done, last.unreadable) == (11, 1)
    assert_same(open_cache(tmp_path / "x.h5"), whole)
    assert max(store[1].faults.requests.values()) > 1  # something did fail
    if kind == "objects":
        assert store[1].faults.most_at_once >= 4
        assert verify_cache(tmp_path / "x.h5", images).ok


def test_a_fault_that_lasts_ends_the_run_and_sets_no_photo_aside(
    photos: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PATIENCE_S", 0.3)
    images = f"s3://{BUCKET}/sub/"
    put({f"sub/{path.name}": path.read_bytes() for path in photos_of(photos)})
    run(photos, tmp_path / "whole.h5", images=images, captions=None)
    store[1].faults = Faults(fate=lambda path, _: "503" if path > f"/{BUCKET}/sub/i" else "fine")
    reports = extract(config(photos, tmp_path / "x.h5", images=images, captions=None))
    with pytest.raises(SourceError, match=r"s3://photos/sub/[ijkl]\.jpg: cannot read .* attempts"):
        for _ in reports:
            pass
    cache = open_cache(tmp_path / "x.h5", allow_pending=True)
    assert (cache.status[8:] == PENDING).all()
    assert not (cache.status == UNREADABLE).any() or cache.errors()[0][0] == "e.jpg"
    assert (cache.status == DONE).sum() >= 4
    pending = int((cache.status == PENDING).sum())
    store[1].faults = Faults()
    last, _ = run(photos, tmp_path / "x.h5", images=images, captions=None)
    assert last.new == pending
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_one_missing_object_is_set_aside_and_a_missing_tar_is_not(
    photos: Path, store: Store, tmp_path: Path
) -> None:
    put({f"sub/{path.name}": path.read_bytes() for path in photos_of(photos)})
    fs, _ = remote.filesystem(f"s3://{BUCKET}/")
    asked = config(photos, tmp_path / "x.h5", images=f"s3://{BUCKET}/sub", captions=None)
    reports = extract(asked)
    for report in reports:
        if isinstance(report, Progress) and report.done == 0 and fs.exists(f"{BUCKET}/sub/k.jpg"):
            fs.rm(f"{BUCKET}/sub/k.jpg")
    reports.close()
    assert ("k.jpg", "file not found") in open_cache(tmp_path / "x.h5").errors()
    as_tars(photos, tmp_path)
    put({path.name: path.read_bytes() for path in tmp_path.glob("*.tar")})
    images = f"s3://{BUCKET}/photos-{{000..001}}.tar"
    reports = extract(config(photos, tmp_path / "y.h5", images=images, captions=None))

    def take_away() -> None:
        for report in reports:
            if isinstance(report, Progress) and fs.exists(f"{BUCKET}/photos-001.tar"):
                fs.rm(f"{BUCKET}/photos-001.tar")

    with pytest.raises(SourceError, match=r"s3://photos/photos-001\.tar: cannot be read any more"):
        take_away()
    cache = open_cache(tmp_path / "y.h5", allow_pending=True)
    assert not (cache.status[6:] == UNREADABLE).any()


def test_wrong_addresses_are_one_line(store: Store) -> None:
    for images, message in (
        (f"s3://{BUCKET}/absent.tar", "s3://photos/absent.tar: cannot open (no such object)"),
        (f"s3://{BUCKET}/nothing/", "s3://photos/nothing/: no such object, and nothing below it"),
        (f"s3://{BUCKET}/*.tar", "s3://photos/*.tar: matches nothing"),
        ("nonsense://x/y", "nonsense://: fsspec knows no such addresses"),
    ):
        with pytest.raises(SourceError) as caught:
            open_source(images)
        assert str(caught.value).startswith(message)


def test_a_refusal_is_not_tried_again_and_shows_no_secret(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store[1].faults = Faults(fate=lambda *_: "403")
    address = store[0].replace("://", "://me:word@") + "/photos/a.jpg?X-Amz-Signature=abc"
    with pytest.raises(SourceError) as caught:
        remote.fetch(address)
    assert "403" in str(caught.value)
    assert not {"word", "abc", "Signature"} & set(str(caught.value).replace("/", " ").split())
    assert "word" not in str(caught.value)
    assert "abc" not in str(caught.value)
    assert sum(store[1].faults.requests.values()) == 1


def test_a_tar_over_http_is_read_by_parts_with_a_signed_address(
    photos: Path, whole: FeatureCache, store: Store, tmp_path: Path
) -> None:
    as_tars(photos, tmp_path, parts=1)
    put({"x.tar": (tmp_path / "photos-000.tar").read_bytes()})
    images = f"{store[0]}/{BUCKET}/x.tar?X-Amz-Signature=abc"
    run(photos, tmp_path / "x.h5", images=images, captions=None)
    cache = open_cache(tmp_path / "x.h5")
    assert_same(cache, whole)
    assert cache.paths[0] == "x.tar/a.jpg"
    assert b"Signature" not in (tmp_path / "x.h5").read_bytes()


class WithoutRanges(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_a_server_without_ranges_is_refused_before_a_tar_is_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.jpg", b"x")])
    handler = partial(WithoutRanges, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(SourceError, match="sends whole files only, and no parts of them"):
            open_source(f"{address}/x.tar")
        server.shutdown()


def test_neighbours_are_one_request_and_only_parts_of_a_tar_are_held(store: Store) -> None:
    photo = np.random.default_rng(0).bytes(700_000)
    put({"x.bin": photo})
    parts: list[Any] = [Part(f"s3://{BUCKET}/x.bin", str(n), n * 1000, 900) for n in range(8)]
    far = Part(f"s3://{BUCKET}/x.bin", "far", 600_000, 5000)
    fetched = Ahead().begin([*parts, far, Path("a.jpg")])
    assert fetched is not None
    for part in [*parts, far]:
        assert fetched.take(part) == photo[part.start : part.start + part.size]
    assert fetched.take(far) is None
    assert store[1].faults.requests[f"/{BUCKET}/x.bin"] == 2
    assert store[1].faults.served_bytes == 7900 + 5000
    assert Ahead().begin([Path("a.jpg"), Part("/x.tar", "a", 0, 1)]) is None


def test_what_is_not_taken_is_given_back(store: Store) -> None:
    """Else, after some interrupted runs in one process, nothing more would be asked for ahead."""
    put({"a.jpg": b"x" * 100})
    ahead = Ahead()
    for _ in range(3):
        fetched = ahead.begin([StoredObject(f"s3://{BUCKET}/a.jpg", 100 << 20)])
        assert fetched is not None
        assert ahead.begin([StoredObject(f"s3://{BUCKET}/a.jpg", 100 << 20)]) is None
        fetched.close()


def test_a_fault_of_http_is_not_a_missing_object(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsspec says of any fault that the file is not found."""
    monkeypatch.setattr(remote, "PATIENCE_S", 0.1)
    with pytest.raises(SourceError, match=r"127\.0\.0\.1:1/x\.tar: cannot read \(Cannot con"):
        open_source("http://127.0.0.1:1/x.tar")
    with pytest.raises(SourceError, match=r"cannot open \(no such object"):
        open_source(f"{store[0]}/{BUCKET}/absent.tar")


@pytest.mark.parametrize(
    ("module", "images", "message"),
    [
        ("fsspec", "s3://b/x.tar", r"remote addresses need fsspec; `pip install 'cap\[remote\]'`"),
        ("s3fs", "s3://b/x.tar", r"a package that is missing; `pip install 'cap\[remote\]'`"),
        ("pyarrow", "x.parquet", r"Parquet files need pyarrow; `pip install 'cap\[parquet\]'`"),
    ],
)
def test_a_missing_package_is_one_line_with_its_extra(
    module: str,
    images: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remote._filesystem.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    if module == "s3fs":  # fsspec keeps what it has imported
        monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3", False)
    if "://" not in images:
        images = str(tmp_path / images)
        Path(images).write_bytes(b"PAR1")
    with pytest.raises(SourceError, match=message):
        open_source(images)


def test_looking_into_tars_is_shown_while_it_takes_long(
    photos: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_tars(photos, tmp_path, parts=4)
    put({path.name: path.read_bytes() for path in tmp_path.glob("*.tar")})
    store[1].faults = Faults(slow_s=0.2)
    monkeypatch.setattr("pipeline.extraction.extract._LOOK_S", 0.05)
    reports = extract(config(photos, tmp_path / "x.h5", images=f"s3://{BUCKET}/*.tar"))
    first = next(reports)
    reports.close()
    assert isinstance(first, Progress)
    assert (first.stage, first.total, first.new) == ("looking", 4, 0)
