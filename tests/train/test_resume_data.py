from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache.store import FeatureCache, open_cache
from cache.writer import open_writer
from tests.conftest import MakeCache, skeleton
from tests.train.runs import config
from train.captions.photo_split import split_photos
from train.fit.record.run_folder import TrainError
from train.fit.reports import Started
from train.fit.run import train


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"image_size": 96}, "features of image_size 64, .*other.h5 holds 96"),
        ({"preprocessing": "squash"}, "features of preprocessing none, .*holds squash"),
        ({"precision": "float16"}, "features of precision float32, .*holds float16"),
        ({"views": ("full", "flip")}, "features of views full, .*holds full,flip"),
        ({"backbone": "resnet50"}, "features of backbone resnet18, .*holds resnet50"),
        ({"weights_sha256": "cd" * 32}, "other weights of the backbone than .*other.h5 holds"),
        ({"digests": True}, r"other digests \(contents of the photo files\) than"),
        ({"features": True}, "other features of the same photos than .*other.h5 holds"),
        ({"unreadable": True}, r"other status of its photos \(which of them are extracted\) than"),
    ],
)
def test_a_run_goes_on_only_with_the_features_it_began_with(
    changes: dict[str, Any], found: str, cache: FeatureCache, tmp_path: Path, make_cache: MakeCache
) -> None:
    captions = cache.captions.by_row(len(cache))
    changes = dict(changes)
    files_change, unreadable = changes.pop("digests", False), changes.pop("unreadable", False)
    features = np.array(cache.features) if changes.pop("features", False) else None
    if features is not None:
        features[7, 0, 3] += 1
    other = make_cache(captions, features, name="other.h5", **changes)
    list(train(config(cache, tmp_path / "run", epochs=1)))
    if files_change or unreadable:
        made = skeleton(captions)
        digest = np.full(16, 7 if files_change else 0, np.uint8)
        with open_writer(other.path, made, library_versions={}) as writer:
            if unreadable:
                writer.set_unreadable(3, "not an image", digest)
            else:
                writer.write(np.array([3]), np.array(cache.features[3:4]), digest[None])
        other = open_cache(other.path)
    with pytest.raises(TrainError, match=f"run: was trained on {found}") as error:
        next(train(config(other, tmp_path / "run", epochs=2, resume=True)))
    assert str(error.value).endswith("; give the cache it began with, or another --out")


def test_photos_that_were_trained_on_do_not_validate(
    cache: FeatureCache, tmp_path: Path, make_cache: MakeCache
) -> None:
    """Neither photos of the training cache nor copies of them in another cache."""
    run = tmp_path / "run"
    val = make_cache([["a dog runs"], ["a cat sleeps"]], name="val.h5")
    list(train(config(cache, run, epochs=1, val_cache=val.path)))
    found = f"{run}: 6 of the 6 photos to validate on were trained on; give the --val-cache or "
    with pytest.raises(TrainError, match=found):
        next(train(config(cache, run, epochs=2, resume=True)))
    # Still possible: the same validation photos, and others that are new to the run.
    other = make_cache([["a bird sings"]] * 3, name="other.h5")
    list(train(config(cache, run, epochs=2, val_cache=val.path, resume=True)))
    list(train(config(cache, run, epochs=3, val_cache=other.path, resume=True)))


def test_a_list_of_ones_own_validates_and_a_resumed_run_keeps_to_it(
    cache: FeatureCache, tmp_path: Path
) -> None:
    run, names = tmp_path / "run", tmp_path / "val.txt"
    names.write_text("0003.jpg\n\n 0007.jpg \n0029.jpg\n")
    reports = list(train(config(cache, run, epochs=1, val_list=names)))
    assert isinstance(reports[0], Started)
    assert (reports[0].photos, reports[0].val_photos) == (27, 3)
    recorded = torch.load(run / "checkpoint.pt")["photos"]
    assert recorded["validation"].tolist() == [3, 7, 29]
    assert np.flatnonzero(~recorded["trained_on"].numpy()).tolist() == [3, 7, 29]
    found = f"{run}: . of the . photos to validate on were trained on; "
    with pytest.raises(TrainError, match=f"{found}give the --val-cache or --val-list it began"):
        next(train(config(cache, run, epochs=2, resume=True)))
    names.write_text("0003.jpg\n0007.jpg\n0001.jpg\n")
    with pytest.raises(TrainError, match=f"{found}use those it began with"):
        next(train(config(cache, run, epochs=2, val_list=names, resume=True)))
    names.write_text("0029.jpg\n0003.jpg\n0007.jpg\n")
    list(train(config(cache, run, epochs=2, val_list=names, resume=True)))


def test_copies_of_photos_that_were_trained_on_do_not_validate(
    cache: FeatureCache, tmp_path: Path, make_cache: MakeCache
) -> None:
    run, captions = tmp_path / "run", cache.captions.by_row(len(cache))
    numbered = skeleton(captions)
    digests = np.arange(1, 31, dtype=np.uint8)[:, None].repeat(16, 1)
    with open_writer(tmp_path / "numbered.h5", numbered, library_versions={}) as writer:
        writer.write(np.arange(30), np.array(cache.features), digests)
    numbered_cache = open_cache(tmp_path / "numbered.h5")
    list(train(config(numbered_cache, run, epochs=1)))
    training, held_out = split_photos(numbered_cache, held_out=0.2, seed=0)
    rows = np.array([training[0], training[1], held_out[0]])  # two of them were trained on
    few = skeleton([captions[row] for row in rows.tolist()])
    with open_writer(tmp_path / "few.h5", few, library_versions={}) as writer:
        writer.write(np.arange(3), np.array(cache.features[rows]), digests[rows])
    found = f"{run}: 2 of the 3 photos to validate on were trained on; use those it began with, or"
    with pytest.raises(TrainError, match=found):
        next(train(config(numbered_cache, run, 2, val_cache=tmp_path / "few.h5", resume=True)))


def test_photos_trained_on_in_any_part_of_a_run_are_remembered(
    cache: FeatureCache, tmp_path: Path, make_cache: MakeCache
) -> None:
    run = tmp_path / "run"
    list(train(config(cache, run, epochs=1)))
    val = make_cache([["a dog runs"], ["a cat sleeps"]], name="val.h5")
    # Now the photos that were held out are trained on, too.
    list(train(config(cache, run, epochs=2, val_cache=val.path, resume=True)))
    with pytest.raises(TrainError, match="6 of the 6 photos to validate on were trained on"):
        next(train(config(cache, run, epochs=3, resume=True)))


def test_an_epoch_ends_with_the_photos_it_began_with(
    cache: FeatureCache, tmp_path: Path, make_cache: MakeCache
) -> None:
    run = tmp_path / "run"
    reports = train(config(cache, run))
    for _ in itertools.islice(reports, 3):
        pass
    reports.close()
    val = make_cache([["a dog runs"], ["a cat sleeps"]], name="val.h5")
    found = f"{run}: was interrupted in an epoch over 24 photos, asked for 30 others;"
    with pytest.raises(TrainError, match=found):
        next(train(config(cache, run, val_cache=val.path, resume=True)))
