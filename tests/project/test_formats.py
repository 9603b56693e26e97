"""Files that an earlier version wrote are read by this one: a cache, its shards, a model, a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache.merge import merge
from cache.store import DONE, PENDING, open_cache
from cache.verify import verify
from cache.writer import open_writer
from pipeline.captioner.cached import caption_cache
from tests.conftest import ROOT
from tests.formats.make import PHOTOS, RECIPE, skeleton
from train.config import SearchConfig, TrainConfig
from train.fit.record.run_table import find_runs
from train.fit.reports import EpochLog, Started
from train.fit.run import train
from train.model.bundle import load_bundle

VERSIONS = sorted(path.parent for path in (ROOT / "tests" / "formats").glob("*/expected.json"))


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the files that one version wrote."""
    return Path(shutil.copytree(request.param, tmp_path / "written"))


@pytest.fixture
def expected(written: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((written / "expected.json").read_text(encoding="utf-8"))
    return content


def test_a_cache_is_read_whole(written: Path, expected: dict[str, Any]) -> None:
    cache = open_cache(written / "cache.h5")
    assert verify(cache)[0].ok
    assert list(cache.image_ids) == expected["image_ids"]
    assert list(cache.paths) == expected["paths"]
    assert [list(pair) for pair in cache.errors()] == expected["errors"]
    assert cache.features[cache.rows_with(DONE)].astype(float) == pytest.approx(
        np.array(expected["features"]), abs=1e-4
    )
    assert list(cache.captions.texts) == expected["texts"]
    assert list(cache.captions.words) == expected["words"]
    assert cache.captions.counts.tolist() == expected["counts"]


def test_an_interrupted_cache_is_filled_on(written: Path) -> None:
    """By the writer of today, which finds the same photos and captions in it."""
    whole = open_cache(written / "cache.h5")
    with open_writer(written / "pending.h5", skeleton(), library_versions={}) as writer:
        rows = np.flatnonzero(writer.status == PENDING)
        assert len(rows)
        writer.write(rows, whole.features[rows], whole.digests[rows])
    finished = open_cache(written / "pending.h5")
    assert np.array_equal(
        finished.features[finished.rows_with(DONE)], whole.features[whole.rows_with(DONE)]
    )


def test_shards_are_merged_into_the_whole(written: Path) -> None:
    merge([written / "shard-2.h5", written / "shard-1.h5"], written / "merged.h5")
    merged, whole = open_cache(written / "merged.h5"), open_cache(written / "cache.h5")
    assert len(merged) == PHOTOS
    assert np.array_equal(
        merged.features[merged.rows_with(DONE)], whole.features[whole.rows_with(DONE)]
    )
    assert list(merged.captions.words) == list(whole.captions.words)


@pytest.mark.parametrize("name", ["best.cap", "last.cap"])
def test_a_model_says_what_it_said(name: str, written: Path, expected: dict[str, Any]) -> None:
    model, cache = load_bundle(written / "run" / name), open_cache(written / "cache.h5")
    found = caption_cache(model, cache, SearchConfig(beam_size=1))
    assert {key: " ".join(one.words) for key, one in found.items()} == expected["captions"][name]
    assert model.encoder == cache.encoder


def test_a_run_is_listed_and_goes_on(written: Path) -> None:
    (run,) = find_runs(written)
    assert run.path == written / "run"
    config = TrainConfig(
        from_cache=written / "cache.h5",
        out=written / "run",
        recipe=RECIPE,
        val_share=0.25,
        device="cpu",
        precision="float32",
        select_by="loss",
        resume=True,
    )
    before = load_bundle(written / "run" / "last.cap")
    reports = list(train(config))
    started = reports[0]
    assert isinstance(started, Started)
    assert started.epoch == 60
    epochs = [report for report in reports if isinstance(report, EpochLog)]
    assert [report.epoch for report in epochs] == list(range(60, started.epochs))
    assert all(torch.isfinite(torch.tensor(report.val_loss)) for report in epochs)
    # The words have the numbers they had, and the best model is not judged anew by other photos.
    after = load_bundle(written / "run" / "last.cap")
    assert after.vocabulary == before.vocabulary
    assert after.training["captions"] == before.training["captions"]
