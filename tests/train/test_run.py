from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache.record import CacheError
from cache.store import FeatureCache, open_cache
from cache.writer import open_writer
from tests.conftest import MakeCache, skeleton
from train.captions.caption_set import TrainingSetError, caption_set
from train.captions.photo_split import split_photos
from train.captions.tokenizer import tokenize
from train.captions.vocabulary import UNK, VocabularyError, build_vocabulary
from train.config import BEST, Recipe, SearchConfig, TrainConfig
from train.fit.best_epoch import BestEpochTracker, ValidatedEpoch
from train.fit.reports import EpochLog, OutOfPatience, Saved, Started, StepLog
from train.fit.run import train
from train.fit.run_folder import TrainError
from train.fit.trainer import Trainer
from train.fit.validation import ValidationPhotos
from train.model.bundle import load_bundle
from train.model.decoder import CaptionDecoder, DecoderConfig
from train.search.hypotheses import search

SMALL: dict[str, Any] = {"embedding_size": 8, "hidden_size": 16, "epochs": 3, "batch_size": 16}
WORDS = ("a", "the", "dog", "cat", "bird", "runs", "sleeps", "sings", "on", "under", "hill")


@pytest.fixture
def cache(make_cache: MakeCache) -> FeatureCache:
    random = np.random.default_rng(0)
    captions = [
        [" ".join(random.choice(WORDS, random.integers(2, 9))) for _ in range(3)] for _ in range(30)
    ]
    return make_cache(captions)


def config(
    cache: FeatureCache,
    out: Path,
    epochs: int = 3,
    recipe: Recipe | None = None,
    **changes: object,
) -> TrainConfig:
    """A small run. changes: fields of the recipe or of the run."""
    if recipe is None:
        recipe = Recipe(
            embedding_size=8, hidden_size=16, batch_size=16, learning_rate=0.01, epochs=epochs
        )
    fields = {field.name for field in dataclasses.fields(Recipe)}
    of_recipe = {name: value for name, value in changes.items() if name in fields}
    settings = {
        "from_cache": cache.path,
        "out": out,
        "val_share": 0.2,
        "recipe": dataclasses.replace(recipe, **of_recipe),  # type: ignore[arg-type]
        "min_count": 1,
        "save_every": 4,
        "log_every": 2,
        "device": "cpu",
    }
    rest = {name: value for name, value in changes.items() if name not in fields}
    return TrainConfig(**(settings | rest))  # type: ignore[arg-type]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_bundle(path).decoder.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_its_models_and_its_log(cache: FeatureCache, tmp_path: Path) -> None:
    reports = [report for report in train(config(cache, tmp_path / "run")) if report]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "best.cap",
        "last.cap",
        "checkpoint.pt",
        "metrics.jsonl",
        *(f"epoch-{epoch}-step-4.cap" for epoch in range(3)),
    }
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines if "loss" in line] == [
        (epoch, step) for epoch in range(3) for step in (2, 4, 5)
    ]
    logs = [report for report in reports if isinstance(report, StepLog)]
    assert logs[0].line().startswith("Epoch [0/3], Step [2/5], Loss: ")
    assert logs[0].perplexity == pytest.approx(math.exp(logs[0].loss))
    assert logs[-1].loss < logs[0].loss


@pytest.mark.parametrize(("pause_s", "saved"), [(1e9, 0), (0.0, 6)])
def test_by_default_a_run_saves_at_intervals_and_not_too_often(
    cache: FeatureCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pause_s: float,
    saved: int,
) -> None:
    monkeypatch.setattr("train.fit.run.SAVE_EVERY", 2)
    monkeypatch.setattr("train.fit.run.SAVE_PAUSE_S", pause_s)
    reports = list(train(config(cache, tmp_path / "run", save_every=None)))
    assert sum(isinstance(report, Saved) for report in reports) == saved


def test_losses_that_are_read_late_make_the_same_log(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, a step is logged after the next one; here also when the run is interrupted."""
    for _ in train(config(cache, tmp_path / "soon", log_every=1)):
        pass
    monkeypatch.setattr("train.fit.run._reads_losses_late", lambda device: True)
    reports = train(config(cache, tmp_path / "late", log_every=1))
    for _ in itertools.islice(reports, 8):
        pass
    reports.close()
    for _ in train(config(cache, tmp_path / "late", log_every=1, resume=True)):
        pass
    soon, late = (
        (tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("soon", "late")
    )
    assert late == soon
    assert same(weights(tmp_path / "soon/last.cap"), weights(tmp_path / "late/last.cap"))


@pytest.mark.parametrize(
    ("stop_after", "changes"),
    [
        (2, {"dropout": 0.3}),
        (5, {"dropout": 0.3, "plain": True}),
        (8, {"dropout": 0.3, "num_layers": 2, "precision": "float32"}),
        (16, {"self_critical_epochs": 1, "self_critical_photos": 4, "average_decay": 0.9}),
        (9, dataclasses.asdict(dataclasses.replace(BEST, **SMALL)) | {"scheduled_sampling": 0.2}),
    ],
)
def test_a_resumed_run_reaches_the_same_weights_bit_for_bit(
    cache: FeatureCache, tmp_path: Path, stop_after: int, changes: dict[str, Any]
) -> None:
    for _ in train(config(cache, tmp_path / "whole", **changes)):
        pass
    reports = train(config(cache, tmp_path / "run", **changes))
    for count, _ in enumerate(reports):
        if count == stop_after:
            break
    reports.close()
    torch.manual_seed(99)  # the state of torch's generator must not matter
    for _ in train(config(cache, tmp_path / "run", resume=True, **changes)):
        pass
    for name in ("last.cap", "best.cap", "epoch-2-step-4.cap"):
        assert same(weights(tmp_path / "whole" / name), weights(tmp_path / "run" / name)), name
    assert load_bundle(tmp_path / "whole").training == load_bundle(tmp_path / "run").training

    def positions(run: str) -> list[object]:
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "loss"} for line in lines]

    assert positions("whole") == positions("run")


def test_a_run_interrupted_before_its_first_step_can_be_resumed(
    cache: FeatureCache, tmp_path: Path
) -> None:
    reports = train(config(cache, tmp_path / "run", epochs=1))
    next(reports)  # the report before the first step
    reports.close()
    for resume, out in ((True, "run"), (False, "whole")):
        for _ in train(config(cache, tmp_path / out, epochs=1, resume=resume)):
            pass
    assert same(weights(tmp_path / "whole/last.cap"), weights(tmp_path / "run/last.cap"))


def test_a_killed_run_goes_on_from_its_last_checkpoint(cache: FeatureCache, tmp_path: Path) -> None:
    """As after SIGKILL: the generator does not clean up, and the last log line is incomplete."""
    for _ in train(config(cache, tmp_path / "whole")):
        pass
    reports = train(config(cache, tmp_path / "run"))
    for count, _ in enumerate(reports):
        if count == 7:  # past the checkpoint at the end of the first epoch
            break
    kept = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    reports.close()
    for path, data in kept.items():
        path.write_bytes(data)
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"epoch": 1, "st')
    for _ in train(config(cache, tmp_path / "run", resume=True)):
        pass
    assert same(weights(tmp_path / "whole/last.cap"), weights(tmp_path / "run/last.cap"))
    whole = (tmp_path / "whole/metrics.jsonl").read_text()
    assert (tmp_path / "run/metrics.jsonl").read_text() == whole


def test_more_epochs_can_be_added(cache: FeatureCache, tmp_path: Path) -> None:
    for _ in train(config(cache, tmp_path / "whole", epochs=4)):
        pass
    for _ in train(config(cache, tmp_path / "run", epochs=2)):
        pass
    for _ in train(config(cache, tmp_path / "run", epochs=4, resume=True)):
        pass
    assert same(weights(tmp_path / "whole/last.cap"), weights(tmp_path / "run/last.cap"))
    for _ in train(config(cache, tmp_path / "falling", epochs=2, decay="cosine")):
        pass
    with pytest.raises(TrainError, match="was trained with epochs 2, asked for 4"):
        next(train(config(cache, tmp_path / "falling", epochs=4, decay="cosine", resume=True)))


def test_a_run_is_not_overwritten_nor_mixed_up(
    cache: FeatureCache, tmp_path: Path, make_cache: MakeCache
) -> None:
    run = tmp_path / "run"
    with pytest.raises(TrainError, match="nothing to resume"):
        next(train(config(cache, run, resume=True)))
    for _ in train(config(cache, run, epochs=1)):
        pass
    with pytest.raises(TrainError, match="already holds a run"):
        next(train(config(cache, run)))
    with pytest.raises(TrainError, match="was trained with hidden_size 16, asked for 32"):
        next(train(config(cache, run, resume=True, hidden_size=32)))
    other = make_cache([["a dog"]] * 30, name="other.h5")
    with pytest.raises(TrainError, match="was trained on other captions"):
        next(train(config(other, run, resume=True)))
    (run / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(TrainError, match="cannot read"):
        next(train(config(cache, run, resume=True)))
    for _ in train(config(cache, run, epochs=1, overwrite=True)):
        pass
    assert not list(run.glob(".*"))


def test_validation_may_come_from_its_own_cache(
    cache: FeatureCache, tmp_path: Path, make_cache: MakeCache
) -> None:
    val = make_cache([["a dog runs"], ["zebra"]], name="val.h5")
    logs = list(train(config(cache, tmp_path / "run", epochs=1, val_cache=val.path)))
    assert isinstance(logs[-1], EpochLog)
    foreign = make_cache([["a dog"]], name="foreign.h5", weights_sha256="cd" * 32)
    with pytest.raises(CacheError, match=r"foreign\.h5: made with weights cdcdcdcdcdcd…"):
        next(train(config(cache, tmp_path / "run2", val_cache=foreign.path)))


def start_line(made: TrainConfig) -> str:
    started = next(train(made))
    assert isinstance(started, Started)
    return started.summary()


def test_the_vocabulary_counts_only_what_is_trained_on(
    tmp_path: Path, make_cache: MakeCache
) -> None:
    random = np.random.default_rng(0)
    captions = [
        [f"own{n} own{n} " + " ".join(random.choice(WORDS, 4)), "a dog runs " * 20]
        for n in range(30)
    ]
    cache = make_cache(captions)
    changes: dict[str, Any] = {"min_count": 2, "max_length": 45}
    list(train(config(cache, tmp_path / "run", epochs=1, **changes)))
    vocabulary = load_bundle(tmp_path / "run/best.cap").vocabulary
    rows, held_out = split_photos(cache, held_out=0.2, seed=0)
    counts = collections.Counter(
        word for row in rows.tolist() for text in captions[row] for word in tokenize(text)[:45]
    )
    expected = sorted((-count, word) for word, count in counts.items() if count >= 2)
    assert list(zip(vocabulary.words, vocabulary.counts, strict=True)) == [
        (word, -count) for count, word in expected
    ]
    assert all(vocabulary.number(f"own{row}") == UNK for row in held_out)
    assert all(vocabulary.number(f"own{row}") != UNK for row in rows)


def test_copies_are_on_one_side_and_the_start_line_says_how_many(
    tmp_path: Path, make_cache: MakeCache
) -> None:
    twins = make_cache([["a dog runs"]] * 40, digests=[*range(1, 21)] * 2)
    line = start_line(config(twins, tmp_path / "a"))
    assert "\n20 photos are copies of others; a photo and its copies are either " in line
    assert "validation photos are also" not in line
    assert "\n" not in start_line(config(make_cache([["a dog"]] * 9, name="y.h5"), tmp_path / "b"))
    one = make_cache([["a dog"]] * 5, name="z.h5", digests=[7] * 5)
    with pytest.raises(TrainError, match=r"z\.h5: the 5 photos with captions are copies of one"):
        next(train(config(one, tmp_path / "c")))


def test_a_run_of_0_1_0_keeps_its_split_and_says_what_is_wrong_with_it(
    tmp_path: Path, make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    twins = make_cache([["a dog runs"]] * 40, digests=[*range(1, 21)] * 2)
    with monkeypatch.context() as patch:
        patch.setattr("train.fit.run.DATA_RULES", 1)
        list(train(config(twins, run, epochs=1)))
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert state.pop("data_rules") == 1
    state["validated_on"] = " ".join(state["validated_on"].split()[:3])
    torch.save(state, run / "checkpoint.pt")
    old = split_photos(twins, held_out=0.2, seed=0, split_copies=True)
    both = len({row % 20 for row in old[0]} & {row % 20 for row in old[1]})
    assert both
    reports = list(train(config(twins, run, epochs=2, resume=True)))
    assert isinstance(reports[0], Started)
    assert reports[0].photos == len(old[0])
    assert reports[0].val_photos == len(old[1]) == 8
    assert f"\n{reports[0].val_photos_trained_on} of 8 validation photos" in reports[0].summary()
    assert "copies" not in reports[0].summary()
    assert torch.load(run / "checkpoint.pt", weights_only=True)["data_rules"] == 1


def test_validation_photos_that_are_trained_on_are_counted(
    tmp_path: Path, make_cache: MakeCache
) -> None:
    cache = make_cache([["a dog runs"]] * 8 + [[]], digests=range(1, 10))
    ids = [str(n) for n in range(5)]
    # 3 and 8 are trained on. 9 has no captions in training, and 0 is unknown.
    val = make_cache([["a cat"]] * 5, name="val.h5", ids=ids, digests=[3, 8, 9, 0, 77])
    line = start_line(config(cache, tmp_path / "a", val_cache=val.path))
    assert line.splitlines()[1:] == [
        "2 of 5 validation photos are also trained on, so the validation scores are too good"
    ]
    other = make_cache([["a cat"]] * 2, name="other.h5", ids=["x", "y"], digests=[77, 78])
    assert "\n" not in start_line(config(cache, tmp_path / "b", val_cache=other.path))
    copy = tmp_path / "copy.h5"
    copy.write_bytes(cache.path.read_bytes())
    for same_cache in (cache.path, copy):
        with pytest.raises(
            TrainingSetError, match="holds the photos and captions that are trained"
        ):
            next(train(config(cache, tmp_path / "c", val_cache=same_cache)))
    # Other photos with the same names and captions are another cache.
    namesakes = make_cache([["a dog runs"]] * 8 + [[]], name="namesakes.h5", digests=range(11, 20))
    assert "\n" not in start_line(config(cache, tmp_path / "d", val_cache=namesakes.path))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, make_cache: MakeCache) -> None:
    cache = make_cache([["a dog"]] * 9)
    with pytest.raises(TrainError, match=r"the loss is nan at epoch \d, step 1; .*learning-rate"):
        for _ in train(config(cache, tmp_path / "run", learning_rate=1e30)):
            pass


def test_a_run_that_diverges_at_once_can_be_repeated(cache: FeatureCache, tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = (
        rf"{run}: the (loss is|weights are) .* at epoch 0, step \d; lower --learning-rate and run "
        r"the command again \(nothing was saved\)"
    )
    with pytest.raises(TrainError, match=found):
        list(train(config(cache, run, learning_rate=1e30)))
    list(train(config(cache, run, epochs=1)))


def test_self_critical_epochs_that_diverge_can_be_tried_at_a_lower_rate(
    cache: FeatureCache, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings: dict[str, Any] = {"epochs": 1, "self_critical_epochs": 1, "self_critical_photos": 8}

    def diverge(*_: object) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(1.0), torch.tensor(math.nan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.fit.self_critical.SelfCritical.gradients", diverge)
        with pytest.raises(TrainError) as error:
            list(train(config(cache, run, **settings)))
    assert str(error.value) == (
        f"{run}: the loss is nan at epoch 1, step 2; "
        "go on with --resume and a lower --self-critical-rate"
    )
    list(train(config(cache, run, **settings, self_critical_rate=1e-6, resume=True)))


@pytest.mark.parametrize("interrupted", [True, False])
def test_weights_that_are_not_finite_replace_no_checkpoint(
    interrupted: bool, cache: FeatureCache, tmp_path: Path
) -> None:
    """Also if the run is interrupted before the loss is logged."""
    run = tmp_path / "run"
    list(train(config(cache, run, epochs=1)))
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["settings"]["learning_rate"] = 1e30
    torch.save(state, run / "checkpoint.pt")
    before = {path.name: path.read_bytes() for path in run.glob("*.[cp]*")}
    reports = train(
        config(cache, run, 2, learning_rate=1e30, log_every=99, save_every=99, resume=True)
    )
    found = (
        rf"{run}: the (loss is|weights are) .* at epoch 1, step \d; begin with a lower "
        r"--learning-rate and another --out \(the checkpoint of epoch 1, step 0 is kept\)"
    )
    if interrupted:
        assert list(itertools.islice(reports, 5))[1:] == [None] * 4
        with pytest.raises(TrainError, match=found):
            reports.close()
    else:
        with pytest.raises(TrainError, match=found):
            list(reports)
    assert {path.name: path.read_bytes() for path in run.glob("*.[cp]*")} == before


def test_a_run_interrupted_before_it_judges_anew_judges_later(
    cache: FeatureCache, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    list(train(config(cache, run, epochs=1)))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    reports = train(config(cache, run, epochs=2, select_by="loss", resume=True))
    next(reports)
    reports.close()
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("in_validation", [False, True])
def test_damaged_rows_are_named_before_training(
    in_validation: bool, cache: FeatureCache, make_cache: MakeCache, tmp_path: Path
) -> None:
    """In the training cache or in that of the validation photos."""
    other = make_cache([["a dog"], [], ["a cat"]], name="other.h5")
    damaged, row = (other, 2) if in_validation else (cache, 7)
    place = damaged.region("features").offset + row * damaged.features[0].nbytes
    data = bytearray(damaged.path.read_bytes())
    data[place] ^= 1
    damaged.path.write_bytes(data)
    run = config(cache, tmp_path / "run", val_cache=other.path)
    with pytest.raises(CacheError) as caught:
        next(train(run))
    assert str(caught.value) == (
        f"{damaged.path}: 1 of {2 if in_validation else 30} photos are damaged "
        f"(first: {row:04d}.jpg, row {row}, does not match its checksum); "
        f"`cap verify {damaged.path}` names them, extract them again"
    )
    assert not list((tmp_path / "run").glob("*"))


def test_damage_in_a_row_without_captions_disturbs_nobody(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    features = np.ones((4, 1, 8))
    features[1] = np.nan
    cache = make_cache([["a dog"], [], ["a cat"], ["a bird"]], features)
    for _ in train(config(cache, tmp_path / "run", epochs=1)):
        pass


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_named_before_training(
    make_cache: MakeCache, tmp_path: Path, value: float
) -> None:
    features = np.ones((9, 1, 8))
    features[4, 0, 3] = value
    cache = make_cache([["a dog"]] * 9, features)
    with pytest.raises(CacheError, match=r"x\.h5: 1 of . photos .*0004\.jpg, row 4, .* finite"):
        next(train(config(cache, tmp_path / "run")))
    assert not list((tmp_path / "run").glob("*"))


def test_overwriting_a_run_keeps_files_of_others(cache: FeatureCache, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    others = ("mine.cap", "epoch-final-step-last.cap", "notes.txt", "val.scores.json")
    for name in others:
        (run / name).write_text("mine")
    first = list(train(config(cache, run, epochs=2)))  # the folder holds no run yet
    assert first
    assert (run / "epoch-1-step-4.cap").exists()
    with pytest.raises(TrainError, match="already holds a run"):
        next(train(config(cache, run)))
    for _ in train(config(cache, run, epochs=1, overwrite=True)):
        pass
    assert not (run / "epoch-1-step-4.cap").exists()
    assert {(run / name).read_text() for name in others} == {"mine"}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_all_files_of_a_run_have_the_same_mode(
    umask: int, mode: int, cache: FeatureCache, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        for _ in train(config(cache, tmp_path / "run", epochs=1)):
            pass
    finally:
        os.umask(before)
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").iterdir()}
    assert {"best.cap", "last.cap", "checkpoint.pt", "metrics.jsonl"} <= set(files)
    assert set(files.values()) == {mode}


def test_self_critical_epochs_can_be_added_to_a_finished_run(
    cache: FeatureCache, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"epochs": 2, "decay": "cosine", "average_decay": 0.9}
    for _ in train(config(cache, tmp_path / "run", **settings)):
        pass
    more = settings | {"self_critical_epochs": 2, "self_critical_photos": 8, "resume": True}
    logs = [report for report in train(config(cache, tmp_path / "run", **more)) if report]
    steps = [report for report in logs if isinstance(report, StepLog)]
    assert {step.epoch for step in steps} == {2, 3}
    assert all("Reward: " in step.line() for step in steps)
    with pytest.raises(TrainError, match="was trained with self_critical_epochs 2, asked for 3"):
        next(train(config(cache, tmp_path / "run", **(more | {"self_critical_epochs": 3}))))


@pytest.mark.parametrize("select_by", ["cider", "beam", "loss"])
def test_the_best_model_is_the_one_selection_asks_for(
    select_by: str, cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = BestEpochTracker(by_loss=select_by == "loss")
    expected: list[bool] = []

    def update(_: BestEpochTracker, newest: ValidatedEpoch) -> bool:
        expected.append(BestEpochTracker.update(tracker, newest))
        return expected[-1]

    watched = type("Watched", (BestEpochTracker,), {"update": update})
    monkeypatch.setattr("train.fit.run.BestEpochTracker", watched)
    reports = train(config(cache, tmp_path / "run", epochs=6, select_by=select_by))
    logs = [report for report in reports if isinstance(report, EpochLog)]
    assert [log.best for log in logs] == expected
    bundle = load_bundle(tmp_path / "run/best.cap")
    best = max(n for n, log in enumerate(logs) if log.best)
    assert bundle.training["epoch"] == best
    _, held_out = split_photos(cache, held_out=0.2, seed=0)
    search = SearchConfig(beam_size=3 if select_by == "beam" else 1)
    scores = ValidationPhotos(cache, rows=held_out).score(bundle.decoder, bundle.vocabulary, search)
    assert scores.cider == pytest.approx(logs[best].cider)
    if select_by == "loss":
        assert logs[best].val_loss == min(log.val_loss for log in logs)


def test_with_another_select_by_the_model_so_far_is_validated_again(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    settings: dict[str, Any] = {"epochs": 2}
    list(train(config(cache, run, **settings)))
    standing = load_bundle(run / "best.cap").training["epoch"]
    seen: list[ValidatedEpoch] = []

    def update(tracker: BestEpochTracker, newest: ValidatedEpoch) -> bool:
        seen.append(newest)
        return BestEpochTracker.update(tracker, newest)

    watched = type("Watched", (BestEpochTracker,), {"update": update})
    monkeypatch.setattr("train.fit.run.BestEpochTracker", watched)
    # Without learning, the next epoch gets the same scores as the model so far.
    more = settings | {"self_critical_epochs": 1, "self_critical_rate": 0.0, "resume": True}
    list(train(config(cache, run, select_by="beam", **more)))
    best = load_bundle(run / "best.cap").training
    # The best model so far, the present one, and the one after the next epoch.
    assert [epoch.epoch for epoch in seen] == [standing, 1, 2]
    assert seen[1].ciders.tolist() == seen[2].ciders.tolist()
    assert best["config"]["select_by"] == "beam"
    assert best["scores"]["cider"] == pytest.approx(seen[best["epoch"] - standing].ciders.mean())


def test_epochs_can_be_added_until_self_critical_ones_have_begun(
    cache: FeatureCache, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"average_decay": 0.9, "self_critical_photos": 8}
    run = tmp_path / "run"
    list(train(config(cache, run, epochs=1, **settings)))
    more = settings | {"resume": True}
    list(train(config(cache, run, epochs=2, **more)))
    more["self_critical_epochs"] = 1
    list(train(config(cache, run, epochs=2, **more)))
    with pytest.raises(TrainError, match="was trained with epochs 2, asked for 3"):
        next(train(config(cache, run, epochs=3, **more)))


def test_with_other_validation_photos_the_model_so_far_is_validated_again(
    cache: FeatureCache, tmp_path: Path, make_cache: MakeCache
) -> None:
    run = tmp_path / "run"
    list(train(config(cache, run, epochs=1)))
    other = make_cache([["a cat sleeps on a hill"]] * 3, name="other.h5")
    logs = list(train(config(cache, run, epochs=2, val_cache=other.path, resume=True)))
    (log,) = (report for report in logs if isinstance(report, EpochLog))
    best = load_bundle(run / "best.cap").training
    assert best["scores"]["count"] == 3
    assert best["epoch"] == (1 if log.best else 0)


def test_patience_ends_a_run_that_gets_no_better(cache: FeatureCache, tmp_path: Path) -> None:
    # Without learning, only BatchNorm's running statistics change, and those settle soon.
    stuck = config(cache, tmp_path / "run", epochs=60, patience=2, learning_rate=0.0)
    logs = [report for report in train(stuck) if isinstance(report, EpochLog)]
    assert logs[0].best
    assert len(logs) < 60
    best = max(n for n, log in enumerate(logs) if log.best)
    assert len(logs) == best + 3


def test_out_of_memory_names_a_smaller_batch(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_small(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate …")

    monkeypatch.setattr("train.step.cpu.objective.CpuObjective.loss_and_gradients", too_small)
    with pytest.raises(TrainError, match="batches of 16 captions; try --batch-size 8"):
        for _ in train(config(cache, tmp_path / "run")):
            pass


def test_one_photo_is_too_few_and_a_last_batch_of_one_is_not(
    tmp_path: Path, make_cache: MakeCache
) -> None:
    with pytest.raises(TrainError, match="only one photo has captions"):
        next(train(config(make_cache([["a dog"]]), tmp_path / "a")))
    cache = make_cache([["a dog"]] * 18, name="y.h5")
    # One photo is held out: 17 captions make a batch of 16 and one of 1.
    for _ in train(config(cache, tmp_path / "b", val_share=0.05)):
        pass
    assert all(w.isfinite().all() for w in weights(tmp_path / "b/last.cap").values())


def test_a_cache_without_captions_says_so(tmp_path: Path, make_cache: MakeCache) -> None:
    with pytest.raises(VocabularyError, match=r"holds no captions; extract .* with --captions"):
        next(train(config(make_cache([[], []]), tmp_path / "run")))


def test_four_captions_are_learned_by_heart(tmp_path: Path, make_cache: MakeCache) -> None:
    # Captions of equal length, so that batches mix the photos, as BatchNorm needs.
    sentences = [
        "a dog runs on the grass",
        "two cats sleep under a tree",
        "the bird sings near the hill",
        "grass grass grass and more grass",
    ]
    cache = make_cache([[sentence] * 25 for sentence in sentences])
    val = make_cache([[sentence] for sentence in sentences], name="val.h5")
    recipe = Recipe(embedding_size=8, hidden_size=32, epochs=20, batch_size=20, learning_rate=0.02)
    for report in train(config(cache, tmp_path / "run", recipe=recipe, val_cache=val.path)):
        last = report
    assert isinstance(last, EpochLog)
    assert last.val_loss < 0.02
    bundle = load_bundle(tmp_path / "run")
    features = torch.from_numpy(np.array(cache.features[:, 0]))
    for beam_size in (1, 3):
        found = search(bundle.decoder, features, SearchConfig(beam_size=beam_size))
        assert [bundle.vocabulary.decode(h.words) for h in found] == sentences


def test_a_checkpoint_holds_each_number_once(cache: FeatureCache, tmp_path: Path) -> None:
    list(train(config(cache, tmp_path / "run", epochs=1, average_decay=0.9)))
    path = tmp_path / "run/checkpoint.pt"
    trainer = torch.load(path, weights_only=True)["trainer"]
    optimizer = trainer["optimizer"]
    parts = [trainer["parameters"], trainer["buffers"], trainer["average"]]
    parts += [optimizer["mean"], optimizer["mean_of_squares"]]
    numbers = [tensor for part in parts for tensor in part.values()]
    held = sum(tensor.untyped_storage().nbytes() for tensor in numbers)
    assert held == sum(tensor.nbytes for tensor in numbers)


def test_the_state_of_a_trainer_does_not_follow_its_training(cache: FeatureCache) -> None:
    vocabulary = build_vocabulary(cache.captions, 1)
    decoder = CaptionDecoder(DecoderConfig(8, len(vocabulary), embedding_size=8, hidden_size=16))
    recipe = Recipe(embedding_size=8, hidden_size=16, batch_size=16, average_decay=0.9)
    captions = caption_set(cache, vocabulary, device=torch.device("cpu"), max_length=50)
    trainer = Trainer(decoder, captions, recipe, seed=0)
    before = weights_of(trainer)
    state = trainer.state()
    list(trainer.epoch(0))
    assert not same(before, weights_of(trainer))
    trainer.load(state)
    assert same(before, weights_of(trainer))


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    assert trainer.average is not None
    average = {f"average of {name}": value for name, value in trainer.average.state().items()}
    values = trainer.decoder.state_dict() | average
    return {name: value.clone() for name, value in values.items()}


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
        ({"unreadable": True}, r"other status of its photos \(which of them are extracted\) than"),
    ],
)
def test_a_run_goes_on_only_with_the_features_it_began_with(
    changes: dict[str, Any], found: str, cache: FeatureCache, tmp_path: Path, make_cache: MakeCache
) -> None:
    captions = cache.captions.by_row(len(cache))
    changes = dict(changes)
    files_change, unreadable = changes.pop("digests", False), changes.pop("unreadable", False)
    other = make_cache(captions, name="other.h5", **changes)
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


def test_two_runs_do_not_share_a_folder(cache: FeatureCache, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = train(config(cache, run))
    for _ in itertools.islice(first, 8):  # past the first checkpoint
        pass
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    asked: list[dict[str, Any]] = [{}, {"resume": True}, {"overwrite": True}]
    for changes in asked:
        with pytest.raises(TrainError) as error:
            next(train(config(cache, run, **changes)))
        assert str(error.value) == (
            f"{run}: another process is training into it; wait until it ends, or name another --out"
        )
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    first.close()
    assert not (run / "run.lock").exists()
    list(train(config(cache, run, resume=True)))
    list(train(config(cache, tmp_path / "whole")))
    assert same(weights(tmp_path / "whole/last.cap"), weights(run / "last.cap"))


def test_an_error_or_a_kill_leaves_no_folder_locked(cache: FeatureCache, tmp_path: Path) -> None:
    run = tmp_path / "run"
    list(train(config(cache, run, epochs=1)))
    with pytest.raises(TrainError, match="hidden_size"):
        next(train(config(cache, run, resume=True, hidden_size=32)))
    (run / "run.lock").touch()  # as a kill leaves it
    list(train(config(cache, run, epochs=2, resume=True)))
    assert not (run / "run.lock").exists()


def test_a_model_without_a_checkpoint_is_not_to_be_resumed(
    cache: FeatureCache, tmp_path: Path
) -> None:
    list(train(config(cache, tmp_path / "run", epochs=1)))
    (tmp_path / "run/checkpoint.pt").unlink()
    with pytest.raises(TrainError, match="already holds a model; replace it with --overwrite, or"):
        next(train(config(cache, tmp_path / "run")))


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


@pytest.mark.parametrize("spoiled", ["checkpoint.pt", "best.cap"])
@pytest.mark.parametrize("by", ["select_by", "photos"])
def test_the_best_model_stays_unless_the_present_one_is_better(
    spoiled: str, by: str, cache: FeatureCache, tmp_path: Path, make_cache: MakeCache
) -> None:
    run = tmp_path / "run"
    settings: dict[str, Any] = {"epochs": 4, "select_by": "cider" if by == "select_by" else "loss"}
    list(train(config(cache, run, **settings)))
    if spoiled == "checkpoint.pt":
        state = torch.load(run / spoiled, weights_only=True)
        state["trainer"]["parameters"]["head.weight"].mul_(-9)
        torch.save(state, run / spoiled)
        expected = weights(run / "best.cap")
    else:
        best = load_bundle(run / spoiled)
        with torch.no_grad():
            best.decoder.head.weight.mul_(-9)
        best.save(run / spoiled)
        expected = weights(run / "last.cap")
    changes: dict[str, Any] = {"select_by": "loss"}
    if by == "photos":
        changes["val_cache"] = make_cache([["a cat"], ["the dog runs"]], name="val.h5").path
    logs = list(train(config(cache, run, **(settings | changes), resume=True)))
    assert not any(isinstance(log, EpochLog) for log in logs)  # nothing was trained
    assert same(weights(run / "best.cap"), expected)
    facts = load_bundle(run / "best.cap").training
    assert facts["config"]["select_by"] == "loss"
    assert facts["scores"]["count"] == (2 if by == "photos" else 6)
    # A further resumption compares with these scores.
    choice = torch.load(run / "checkpoint.pt", weights_only=True)["choice"]
    assert choice["best"]["val_loss"] == facts["val_loss"]


def test_a_run_is_not_resumed_with_fewer_epochs_than_it_has_begun(
    cache: FeatureCache, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    reports = train(config(cache, run, epochs=4))
    for report in reports:
        if isinstance(report, StepLog) and (report.epoch, report.step) == (2, 2):
            break
    reports.close()
    for epochs, more in (1, 0), (2, 1):
        found = f"{run}: has begun 3 epochs, asked for {epochs}; give --epochs 3 or more"
        asked = config(cache, run, epochs, self_critical_epochs=more, resume=True)
        with pytest.raises(TrainError, match=found):
            next(train(asked))
    list(train(config(cache, run, epochs=3, resume=True)))


def test_self_critical_epochs_follow_when_patience_has_ended_the_others(
    cache: FeatureCache, tmp_path: Path
) -> None:
    def trained(**changes: Any) -> list[int]:
        settings = {"epochs": 9, "patience": 1, "learning_rate": 0.0} | changes
        reports = train(config(cache, tmp_path / "run", **settings))
        return [report.epoch for report in reports if isinstance(report, EpochLog)]

    early = trained()
    assert early[-1] < 8
    more = {"self_critical_epochs": 2, "self_critical_rate": 0.0, "self_critical_photos": 8}
    assert trained(**more, resume=True)[0] == 9
    assert trained(**more, resume=True, patience=None)[:1] in ([], [10])
    assert trained(**more, overwrite=True)[: len(early) + 1] == [*early, 9]


def test_self_critical_epochs_that_go_astray_are_an_error(
    cache: FeatureCache, tmp_path: Path
) -> None:
    """Their loss stays finite, but the model has unlearned everything."""
    run = tmp_path / "run"
    settings: dict[str, Any] = {"epochs": 1, "self_critical_epochs": 1, "self_critical_photos": 8}
    with pytest.raises(TrainError) as error:
        list(train(config(cache, run, **settings, self_critical_rate=1e4)))
    assert re.fullmatch(
        rf"{run}: the validation loss is [\de.+]+ at epoch 1, step 3; "
        "go on with --resume and a lower --self-critical-rate",
        str(error.value),
    )
    assert load_bundle(run / "best.cap").training["epoch"] == 0
    list(train(config(cache, run, **settings, self_critical_rate=1e-6, resume=True)))


def test_a_run_says_which_epochs_patience_leaves_out(cache: FeatureCache, tmp_path: Path) -> None:
    stopped = config(cache, tmp_path / "a", epochs=9, patience=1, select_by="loss")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "validation_loss", lambda *_: 1.0)
        reports = list(train(stopped))
    assert isinstance(reports[-1], OutOfPatience)
    assert reports[-1].line() == (
        "no better model within --patience, so epochs 2 to 8 are left out"
    )


@pytest.mark.parametrize(("save_every", "kept"), [(None, 3), (2, 6)])
def test_a_few_models_within_epochs_are_kept_unless_asked_for(
    save_every: int | None,
    kept: int,
    cache: FeatureCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("train.fit.run.SAVE_EVERY", 2)
    monkeypatch.setattr("train.fit.run.SAVE_PAUSE_S", 0.0)
    run = tmp_path / "run"
    reports = list(train(config(cache, run, epochs=3, save_every=save_every)))
    saved = [report.path.name for report in reports if isinstance(report, Saved)]
    assert len(saved) == 6
    assert sorted(path.name for path in run.glob("epoch-*.cap")) == sorted(saved[-kept:])


def test_a_decoder_too_large_for_the_memory_is_one_line(
    cache: FeatureCache, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match="out of memory for a decoder of hidden size 30000000, "):
        next(train(config(cache, tmp_path / "run", hidden_size=30_000_000)))
    assert not (tmp_path / "run").exists()
