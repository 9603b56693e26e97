"""`--update`: other captions and other photos, without encoding known ones again."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cache.merge import merge
from cache.record import CacheError
from cache.store import DONE, open_cache
from cache.verify import verify
from pipeline.extraction import update
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.digests import digest_or_none
from pipeline.extraction.extract import extract, prepare, read_asked
from pipeline.extraction.fill import Progress
from pipeline.extraction.update import bring_up_to_date
from pipeline.photos.sources.places import Place
from pipeline.photos.sources.source import Folder
from tests.conftest import write_photo
from tests.pipeline.test_extract import config, run
from tests.pipeline.test_reuse import encodings  # noqa: F401  (a fixture)
from train.option import SettingError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten photos, 0.jpg to 9.jpg, and their cache, old.h5."""
    for seed in range(10):
        write_photo(tmp_path / "photos" / f"{seed}.jpg", seed)
    run(tmp_path / "photos", tmp_path / "old.h5", captions=None)
    shutil.copy(tmp_path / "old.h5", tmp_path / "x.h5")
    return tmp_path / "photos"


def write_captions(path: Path, word: str) -> Path:
    path.write_text("image,caption\n" + "".join(f"{n}.jpg,A {word} {n} .\n" for n in range(10)))
    return path


def test_other_captions_alone_encode_nothing(
    folder: Path,
    tmp_path: Path,
    encodings: list[int],  # noqa: F811
) -> None:
    captions = write_captions(tmp_path / "captions.csv", "dog")
    run(folder, tmp_path / "whole.h5", captions=captions)
    encodings.clear()
    with pytest.raises(CacheError, match=r"x\.h5: written with other captions.* Use --update"):
        run(folder, tmp_path / "x.h5", captions=captions)
    last, notices = run(folder, tmp_path / "x.h5", captions=captions, update=True)
    assert not encodings
    assert (last.done, last.new) == (10, 0)
    # Before come two lines about what was understood of the captions file.
    assert notices[2:] == [f"{tmp_path}/x.h5: 10 photos kept; other captions"]
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_photos_that_are_new_changed_renamed_or_gone_are_brought_in(
    folder: Path,
    tmp_path: Path,
    encodings: list[int],  # noqa: F811
) -> None:
    write_photo(folder / "new.jpg", 20)
    write_photo(folder / "3.jpg", 21)
    (folder / "4.jpg").rename(folder / "renamed.jpg")
    (folder / "5.jpg").unlink()
    encodings.clear()
    last, notices = run(folder, tmp_path / "x.h5", captions=None, update=True)
    assert encodings == [2]
    assert (last.done, last.new, last.total) == (10, 2, 10)
    assert notices == [f"{tmp_path}/x.h5: 8 photos kept, 1 changed, 1 new, 1 gone"]
    run(folder, tmp_path / "fresh.h5", captions=None)
    old, new, fresh = (open_cache(tmp_path / f"{name}.h5") for name in ("old", "x", "fresh"))
    assert list(new.paths) == list(fresh.paths)
    assert np.array_equal(new.digests, fresh.digests)
    assert np.abs(new.features - fresh.features).max() < 0.01  # other places of the batch
    rows = {path: row for row, path in enumerate(new.paths)}
    assert np.array_equal(new.features[rows["renamed.jpg"]], old.features[4])
    assert np.array_equal(new.features[rows["9.jpg"]], old.features[9])
    assert verify(new)[0].ok


def test_a_cache_that_is_up_to_date_stays_as_it_is(folder: Path, tmp_path: Path) -> None:
    before = (tmp_path / "x.h5").stat()
    last, notices = run(folder, tmp_path / "x.h5", captions=None, update=True)
    assert (last.done, last.new) == (10, 0)
    assert notices == [f"{tmp_path}/x.h5: 10 photos kept"]
    after = (tmp_path / "x.h5").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_overwriting_with_reuse_of_the_same_cache_is_an_update(
    folder: Path,
    tmp_path: Path,
    encodings: list[int],  # noqa: F811
) -> None:
    write_photo(folder / "new.jpg", 20)
    encodings.clear()
    path = tmp_path / "x.h5"
    last, _ = run(folder, path, captions=None, overwrite=True, reuse=path)
    assert (last.done, last.new, encodings) == (11, 1, [1])


def test_an_interrupted_update_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for number in range(11):
        write_photo(folder / f"{number % 10}x{number}.jpg", 30 + number)
    shutil.copy(tmp_path / "old.h5", tmp_path / "whole.h5")
    run(folder, tmp_path / "whole.h5", captions=None, update=True)
    settings = config(folder, tmp_path / "x.h5", captions=None, update=True)
    stopped_at = []
    for _ in range(2):
        reports = extract(settings)
        for report in reports:
            if isinstance(report, Progress) and report.new >= 4:
                stopped_at.append(report.done)
                break
        reports.close()
    assert stopped_at == [14, 18]
    run(folder, tmp_path / "x.h5", captions=None, update=True)
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_a_photo_that_cannot_be_read_now_keeps_its_features(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest(place: Place) -> NDArray[np.uint8] | None:
        return None if str(place).endswith("/2.jpg") else digest_or_none(place)

    monkeypatch.setattr(update, "digest_or_none", digest)
    write_photo(folder / "new.jpg", 20)
    _, notices = run(folder, tmp_path / "x.h5", captions=None, update=True)
    assert notices == [
        f"{tmp_path}/x.h5: 9 photos kept, 1 new, 1 cannot be read now and stay as they are"
    ]
    assert np.array_equal(
        open_cache(tmp_path / "x.h5").features[2], open_cache(tmp_path / "old.h5").features[2]
    )


def test_damaged_rows_are_encoded_again(folder: Path, tmp_path: Path) -> None:
    features = open_cache(tmp_path / "x.h5").region("features")
    with (tmp_path / "x.h5").open("rb+") as file:
        file.seek(features.offset + 3)
        file.write(b"\x77")
    last, notices = run(folder, tmp_path / "x.h5", captions=None, update=True)
    assert (last.new, notices) == (1, [f"{tmp_path}/x.h5: 9 photos kept, 1 changed"])
    assert verify(open_cache(tmp_path / "x.h5"))[0].ok


def test_photos_set_aside_are_tried_again_if_they_have_changed(
    folder: Path, tmp_path: Path
) -> None:
    good = (folder / "3.jpg").read_bytes()
    (folder / "3.jpg").write_bytes(good[:200])
    last, _ = run(folder, tmp_path / "y.h5", captions=None)
    assert last.unreadable == 1
    last, _ = run(folder, tmp_path / "y.h5", captions=None, update=True)
    assert (last.unreadable, last.new) == (1, 0)
    (folder / "3.jpg").write_bytes(good)
    last, _ = run(folder, tmp_path / "y.h5", captions=None, update=True)
    assert (last.done, last.unreadable, last.new) == (10, 0, 1)


def test_updated_shards_merge_to_the_updated_whole(folder: Path, tmp_path: Path) -> None:
    old, new = (write_captions(tmp_path / f"{word}.csv", word) for word in ("dog", "cat"))
    for captions, number in itertools.product((old, new), (1, 2)):
        run(folder, tmp_path / f"{number}.h5", captions=captions, shard=(number, 2), update=True)
    merge([tmp_path / "1.h5", tmp_path / "2.h5"], tmp_path / "merged.h5")
    run(folder, tmp_path / "whole.h5", captions=new)
    assert (tmp_path / "merged.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_ids_that_have_become_numbers_are_brought_in(folder: Path, tmp_path: Path) -> None:
    asked = config(folder, tmp_path / "x.h5", captions=None)
    skeleton = prepare(asked, read_asked(asked)[0]).skeleton
    skeleton = replace(skeleton, numbered=np.ones(10, bool))
    assert not np.any(open_cache(tmp_path / "x.h5").numbered)
    list(bring_up_to_date(tmp_path / "x.h5", skeleton, Folder(folder), 2))
    cache = open_cache(tmp_path / "x.h5")
    assert np.all(cache.numbered)
    assert (cache.status == DONE).all()


def test_rows_of_another_encoder_are_not_kept(folder: Path, tmp_path: Path) -> None:
    before = (tmp_path / "x.h5").read_bytes()
    with pytest.raises(
        CacheError, match=r"x\.h5: written with image_size 64, not 96; nothing of it"
    ):
        run(folder, tmp_path / "x.h5", captions=None, image_size=96, update=True)
    assert (tmp_path / "x.h5").read_bytes() == before


def test_keeping_and_replacing_exclude_each_other() -> None:
    with pytest.raises(SettingError, match=r"--update keeps .*, --overwrite replaces"):
        ExtractConfig(images=Path(), out=Path("x.h5"), update=True, overwrite=True)
