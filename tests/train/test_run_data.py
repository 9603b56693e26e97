from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache.record import CacheError
from cache.store import FeatureCache
from tests.conftest import MakeCache
from tests.train.runs import WORDS, config
from train.captions.caption_set import TrainingSetError
from train.captions.photo_split import split_photos
from train.captions.tokenizer import tokenize
from train.captions.vocabulary import UNK, VocabularyError
from train.config import TrainConfig
from train.fit.record.run_folder import TrainError
from train.fit.reports import EpochLog, Started
from train.fit.run import train
from train.model.bundle import load_bundle


def test_validation_may_come_from_its_own_cache(
    cache: FeatureCache, tmp_path: Path, make_cache: MakeCache
) -> None:
    val = make_cache([["a dog runs"], ["zebra"]], name="val.h5")
    logs = list(train(config(cache, tmp_path / "run", epochs=1, val_cache=val.path)))
    assert any(isinstance(log, EpochLog) for log in logs)
    split = make_cache([["a dog"]], name="split.h5", tokenizer="whitespace")
    with pytest.raises(CacheError, match=r"split\.h5: made with tokenizer whitespace, not treeb"):
        next(train(config(cache, tmp_path / "run1", val_cache=split.path)))
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
    changes: dict[str, Any] = {"min_count": 2, "max_length": 45}  # half of them are longer
    list(train(config(cache, tmp_path / "run", epochs=1, **changes)))
    vocabulary = load_bundle(tmp_path / "run/best.cap").vocabulary
    rows, held_out = split_photos(cache, held_out=0.2, seed=0)
    counts = collections.Counter(
        word for row in rows.tolist() for text in captions[row] for word in tokenize(text)
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
    assert "copies" not in start_line(
        config(make_cache([["a dog"]] * 9, name="y.h5"), tmp_path / "b")
    )
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
    assert line.splitlines()[2:] == [
        "2 of 5 validation photos are also trained on, so the validation scores are too good"
    ]
    other = make_cache([["a cat"]] * 2, name="other.h5", ids=["x", "y"], digests=[77, 78])
    assert "also trained on" not in start_line(config(cache, tmp_path / "b", val_cache=other.path))
    copy = tmp_path / "copy.h5"
    copy.write_bytes(cache.path.read_bytes())
    for same_cache in (cache.path, copy):
        with pytest.raises(
            TrainingSetError, match="holds the photos and captions that are trained"
        ):
            next(train(config(cache, tmp_path / "c", val_cache=same_cache)))
    # Other photos with the same names and captions are another cache.
    namesakes = make_cache([["a dog runs"]] * 8 + [[]], name="namesakes.h5", digests=range(11, 20))
    assert "also trained on" not in start_line(
        config(cache, tmp_path / "d", val_cache=namesakes.path)
    )


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


def test_a_cache_without_captions_says_so(tmp_path: Path, make_cache: MakeCache) -> None:
    with pytest.raises(VocabularyError, match=r"holds no captions; extract .* with --captions"):
        next(train(config(make_cache([[], []]), tmp_path / "run")))
