"""Runs are ranked among those that were judged on the same photos by the same captions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache.store import FeatureCache
from tests.conftest import MakeCache
from tests.train.runs import config
from train.fit.record.run_table import find_runs, runs_table
from train.fit.run import train
from train.fit.validation import ValidationPhotos
from train.model.bundle import load_bundle

CAPTIONS = [[f"a dog runs {n}", "the dog sleeps"] for n in range(6)]
Remake = Callable[[Path, dict[str, Any]], None]


def ids(*caches: FeatureCache) -> set[str]:
    return {ValidationPhotos(cache).content_sha256 for cache in caches}


def test_the_same_photos_are_the_same_in_any_cache(make_cache: MakeCache) -> None:
    digests = list(range(1, 7))
    here = make_cache(CAPTIONS, digests=digests)
    elsewhere = make_cache(  # of another encoder, in another order, under other names
        CAPTIONS[::-1],
        name="y.h5",
        ids=list("abcdef"),
        digests=digests[::-1],
        weights_sha256="cd" * 32,
    )
    assert len(ids(here, elsewhere)) == 1
    fewer = ValidationPhotos(here, rows=here.rows_with(1)[1:])
    assert fewer.content_sha256 not in ids(here)
    others = [
        make_cache(CAPTIONS, name="1.h5", digests=[*digests[1:], 99]),
        make_cache([*CAPTIONS[1:], ["other words"]], name="2.h5", digests=digests),
        make_cache(CAPTIONS, name="3.h5", digests=digests, tokenizer="whitespace"),
        make_cache(CAPTIONS, name="4.h5"),  # digests are not known: by ids
        make_cache(CAPTIONS, name="5.h5", ids=list("abcdef")),
    ]
    assert len(ids(here, *others)) == 6


@pytest.fixture
def remake(cache: FeatureCache, tmp_path: Path) -> Remake:
    """Copies of one trained run, with other facts about its training."""
    list(train(config(cache, tmp_path / "first", epochs=1)))
    model = load_bundle(tmp_path / "first" / "best.cap")

    def make(run: Path, facts: dict[str, Any]) -> None:
        run.mkdir(parents=True)
        training = {key: value for key, value in (dict(model.training) | facts).items() if value}
        dataclasses.replace(model, training=training).save(run / "best.cap")

    return make


def judged(count: int, cache: str, key: str, cider: float, select_by: str = "cider") -> Any:
    return {
        "judged_on": {"id": key, "cache": cache, "photos": count, "captions": 5 * count},
        "scores": {"cider": cider, "bleu_4": 0.1},
        "config": {"select_by": select_by},
    }


def test_a_run_that_was_judged_on_few_photos_is_not_ranked_above_others(
    remake: Remake, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    remake(runs / "lucky", judged(12, "small.h5", "s", 0.9))
    remake(runs / "base", judged(300, "train.h5", "t", 0.4))
    remake(runs / "better", judged(300, "other.h5", "t", 0.5))
    remake(runs / "beam", judged(300, "train.h5", "t", 0.8, "beam"))
    remake(runs / "old", {"judged_on": None, "scores": {"cider": 9.0, "bleu_4": 0.1}})
    found = find_runs(runs)
    assert [(run.path.name, run.group, run.rank) for run in found] == [
        ("better", 1, 1),
        ("base", 1, 2),
        ("beam", 2, 1),
        ("lucky", 3, 1),
        ("old", None, None),
    ]
    headlines = [part.splitlines()[0] for part in runs_table(found).split("\n\n")]
    assert headlines == [
        "judged on 300 photos (1,500 captions) of other.h5 and of train.h5, by greedy captions:",
        "judged on 300 photos (1,500 captions) of train.h5, by beam search's captions:",
        "judged on 12 photos (60 captions) of small.h5, by greedy captions:",
        "not recorded what these were judged on, so they are in no order:",
    ]


def test_a_run_of_an_earlier_version_is_grouped_by_its_checkpoint(
    cache: FeatureCache, remake: Remake, tmp_path: Path
) -> None:
    (new,) = find_runs(tmp_path / "first")
    before = load_bundle(tmp_path / "first" / "best.cap")
    facts = {k: v for k, v in before.training.items() if k not in ("judged_on", "trained_on")}
    dataclasses.replace(before, training=facts).save(tmp_path / "first" / "best.cap")
    (old,) = find_runs(tmp_path / "first")
    assert new.judged_on is not None
    assert old.judged_on is not None
    assert (old.judged_on.photos, old.judged_on.cache) == (new.judged_on.photos, None)
    assert "6 photos (of a cache that is not recorded), by greedy" in runs_table([old])
    (tmp_path / "first" / "checkpoint.pt").write_bytes(b"damaged")
    assert find_runs(tmp_path / "first")[0].judged_on is None


def test_a_run_records_what_it_was_trained_and_judged_on(
    cache: FeatureCache, make_cache: MakeCache, tmp_path: Path
) -> None:
    list(train(config(cache, tmp_path / "run", epochs=1)))
    (run,) = find_runs(tmp_path)
    assert run.judged_on is not None
    assert run.trained_on == {"cache": "x.h5", "photos": 24, "captions": 72}
    listed = json.loads(json.dumps(run.as_dict()))["judged_on"]
    assert listed.pop("id") == run.judged_on.id
    assert listed == {"search": "greedy", "photos": 6, "captions": 18, "cache": "x.h5"}
    # Judged anew on other photos, the run belongs elsewhere.
    other = make_cache([["a dog runs"], ["a cat sleeps"]] * 4, name="val.h5")
    again = config(cache, tmp_path / "run", epochs=1, resume=True, select_by="loss")
    again = dataclasses.replace(again, val_cache=other.path, val_share=None)
    list(train(again))
    (run,) = find_runs(tmp_path)
    assert run.judged_on is not None
    assert run.judged_on.id in ids(other)
    assert (run.judged_on.photos, run.judged_on.cache) == (8, "val.h5")


@pytest.mark.parametrize("facts", [7, ["x"], {"id": 3}, {"id": "x", "photos": "many"}], ids=str)
def test_facts_of_another_program_break_no_list(
    facts: object, remake: Remake, tmp_path: Path
) -> None:
    remake(tmp_path / "odd/run", {"judged_on": facts, "trained_on": facts, "config": facts})
    (run,) = find_runs(tmp_path / "odd")
    assert runs_table([run])
