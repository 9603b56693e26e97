from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cache.derived.catalogue import write_catalogue
from cache.record import CacheError
from cache.store import DONE, open_cache
from cache.verify import verify
from pipeline.encoder.encoder import Encoder, QueuedFeatures
from pipeline.extraction import encode_batches
from pipeline.extraction.extract import extract
from pipeline.extraction.fill import Progress
from pipeline.photos.photo_loader import LoadedBatch
from tests.conftest import write_photo
from tests.pipeline.test_extract import config, run


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of photos in each batch that is encoded and not copied."""
    real, counts = encode_batches._encode, []

    def count(encoder: Encoder, batch: LoadedBatch) -> QueuedFeatures | None:
        counts.append(len(batch.decoded))
        return real(encoder, batch)

    monkeypatch.setattr(encode_batches, "_encode", count)
    return counts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty photos, of which old.h5 knows every second one."""
    folder = tmp_path / "photos"
    for seed in range(0, 20, 2):
        write_photo(folder / f"{seed:02d}.jpg", seed)
    run(folder, tmp_path / "old.h5", captions=None)
    for seed in range(1, 20, 2):
        write_photo(folder / f"{seed:02d}.jpg", seed)
    return folder


def test_rows_come_from_a_catalogue_of_several_caches(
    folder: Path, tmp_path: Path, encodings: list[int]
) -> None:
    only = tmp_path / "only.txt"
    only.write_text("".join(f"{seed:02d}.jpg\n" for seed in range(1, 9, 2)))
    run(folder, tmp_path / "more.h5", captions=None, only=only)
    listed = tmp_path / "known.catalogue"
    write_catalogue([tmp_path / "old.h5", tmp_path / "more.h5"], listed)
    encodings.clear()
    last, _ = run(folder, tmp_path / "x.h5", captions=None, reuse=listed)
    assert (last.done, last.new, last.copied) == (20, 6, 14)
    assert encodings == [4, 2]
    known, new = open_cache(listed), open_cache(tmp_path / "x.h5")
    rows = [new.paths[:].index(path) for path in known.paths]
    assert np.array_equal(new.features[:][rows], known.features[:])


def test_only_new_photos_are_encoded_in_full_batches(
    folder: Path, tmp_path: Path, encodings: list[int]
) -> None:
    last, notices = run(folder, tmp_path / "x.h5", captions=None, reuse=tmp_path / "old.h5")
    assert (last.done, last.new, last.copied) == (20, 10, 10)
    assert encodings == [4, 4, 2]
    assert notices == ["10 photos are known; encoding the others"]
    old, new = open_cache(tmp_path / "old.h5"), open_cache(tmp_path / "x.h5")
    assert np.array_equal(new.features[::2], old.features)
    run(folder, tmp_path / "fresh.h5", captions=None)
    fresh = open_cache(tmp_path / "fresh.h5")
    assert np.array_equal(new.digests, fresh.digests)
    assert np.abs(new.features - fresh.features).max() < 0.01  # other places of the batch


def test_bytes_decide_and_not_names(folder: Path, tmp_path: Path, encodings: list[int]) -> None:
    shutil.copy(folder / "00.jpg", folder / "zz.jpg")  # known under another name
    write_photo(folder / "02.jpg", 99)  # changed under a known one
    run(folder, tmp_path / "x.h5", captions=None, reuse=tmp_path / "old.h5")
    assert sum(encodings) == 11
    new = open_cache(tmp_path / "x.h5")
    assert np.array_equal(new.features[20], new.features[0])
    assert not np.array_equal(new.features[2], open_cache(tmp_path / "old.h5").features[1])


def test_an_interrupted_reuse_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "whole.h5", captions=None, reuse=tmp_path / "old.h5")
    settings = config(folder, tmp_path / "x.h5", captions=None, reuse=tmp_path / "old.h5")
    stopped_at = []
    for _ in range(4):
        reports: Iterator[object] = extract(settings)
        first = next(reports)
        assert isinstance(first, Progress)
        for report in reports:
            if isinstance(report, Progress) and report.new + report.copied and report.done < 20:
                stopped_at.append(report.done)
                break
        reports.close()  # type: ignore[attr-defined]
    assert len(set(stopped_at)) >= 2
    run(folder, tmp_path / "x.h5", captions=None, reuse=tmp_path / "old.h5")
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_damaged_and_unreadable_rows_are_not_reused(
    folder: Path, tmp_path: Path, encodings: list[int]
) -> None:
    old = open_cache(tmp_path / "old.h5")
    with (tmp_path / "old.h5").open("rb+") as file:
        file.seek(old.region("features").offset + 3)
        file.write(b"\x77")
    (folder / "04.jpg").write_bytes(b"no photo any more")
    last, _ = run(folder, tmp_path / "x.h5", captions=None, reuse=tmp_path / "old.h5")
    assert (last.done, last.unreadable) == (19, 1)
    assert sum(encodings) == 11
    assert open_cache(tmp_path / "x.h5").status[0] == DONE


def test_features_that_are_not_finite_are_not_reused(
    folder: Path, tmp_path: Path, encodings: list[int]
) -> None:
    """They match their checksum, as those of another program's cache would."""
    old = open_cache(tmp_path / "old.h5")
    features = np.array(old.features[2])
    features[0, 5] = np.inf
    with (tmp_path / "old.h5").open("rb+") as file:
        file.seek(old.region("features").offset + 2 * features.nbytes)
        file.write(features.tobytes())
        file.seek(old.region("checksums").offset + 4 * 2)
        checksum = old.checksum(2, old.digests[2], old.error_bytes[2], features)
        file.write(checksum.to_bytes(4, "little"))
    last, _ = run(folder, tmp_path / "x.h5", captions=None, reuse=tmp_path / "old.h5")
    assert last.done == 20
    assert sum(encodings) == 11
    assert verify(open_cache(tmp_path / "x.h5"))[0].ok


def test_another_encoders_rows_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"old\.h5: made with image_size 64, not 96; its rows"):
        run(folder, tmp_path / "x.h5", captions=None, image_size=96, reuse=tmp_path / "old.h5")
    with pytest.raises(
        CacheError, match=r"old\.h5: cannot be both --reuse .*; --update keeps what"
    ):
        run(folder, tmp_path / "old.h5", captions=None, reuse=tmp_path / "old.h5")
    assert not (tmp_path / "x.h5").exists()
    assert len(open_cache(tmp_path / "old.h5")) == 10
