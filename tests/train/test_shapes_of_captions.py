"""Captions of every shape are trained on and predicted: few, many, short and long ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cache.store import FeatureCache
from pipeline.captioner.cached import caption_cache
from tests.conftest import MakeCache
from train.captions.vocabulary import Vocabulary, VocabularyError, build_vocabulary
from train.config import Recipe, SearchConfig, TrainConfig
from train.fit.reports import EpochLog
from train.fit.run import train
from train.model.bundle import load_bundle

SHORT = ["red dog runs", "black cat sleeps", "white bird sings", "big man eats"]
# Sixty words, of which no three in a row come twice.
LONG = [" ".join(f"{letter}{n}" for n in range(60)) for letter in "wxyz"]


def learned(cache: FeatureCache, folder: Path, epochs: int = 60) -> tuple[Vocabulary, list[str]]:
    """The vocabulary of a small run, and the words of its captions, photo by photo."""
    config = TrainConfig(
        from_cache=cache.path,
        out=folder / "run",
        val_share=0.3,
        recipe=Recipe(
            embedding_size=16,
            hidden_size=32,
            epochs=epochs,
            batch_size=16,
            learning_rate=0.02,
            min_count=1,
        ),
        select_by="loss",
        device="cpu",
        precision="float32",
    )
    reports = [report for report in train(config) if isinstance(report, EpochLog)]
    assert all(np.isfinite(report.val_loss) for report in reports)
    bundle = load_bundle(folder / "run")
    found = caption_cache(bundle, cache, SearchConfig(beam_size=2))
    return bundle.vocabulary, [" ".join(prediction.words) for prediction in found.values()]


def features(photos: int) -> np.ndarray:
    """(photos, 1, 8): photo n is near corner n % 4 of a cube."""
    noise = np.random.default_rng(0).normal(0, 0.1, (photos, 8))
    return (2 * np.eye(8)[np.arange(photos) % 4] + noise)[:, None]


@pytest.mark.parametrize(
    ("captions", "each"),
    [(SHORT, 1), (SHORT, 50), (["dog", "cat", "bird", "man"], 5)],
    ids=["one caption", "fifty captions", "one word"],
)
def test_short_captions_are_learned(
    captions: list[str], each: int, make_cache: MakeCache, tmp_path: Path
) -> None:
    cache = make_cache([[captions[n % 4]] * each for n in range(16)], features(16))
    _, said = learned(cache, tmp_path, epochs=60 if each < 50 else 8)
    assert said == [captions[n % 4] for n in range(16)]


@pytest.mark.slow
def test_long_captions_are_learned_whole(make_cache: MakeCache, tmp_path: Path) -> None:
    cache = make_cache([[LONG[n % 4]] * 2 for n in range(16)], features(16))
    vocabulary, said = learned(cache, tmp_path, epochs=50)
    assert vocabulary.longest == 60
    assert said == [LONG[n % 4] for n in range(16)]
    # Who asks for shorter ones gets them.
    bundle = load_bundle(tmp_path / "run")
    found = caption_cache(bundle, cache, SearchConfig(max_length=10)).values()
    assert {len(prediction.words) for prediction in found} == {10}


def test_one_long_caption_among_many_is_cut(make_cache: MakeCache) -> None:
    table = make_cache([SHORT] * 50 + [LONG[:1]]).captions
    assert build_vocabulary(table, 1).longest == 0
    assert build_vocabulary(table, 1, rows=np.array([50])).longest == 60
    endless = make_cache([[" ".join("ab" * 999)]], name="y.h5").captions
    assert build_vocabulary(endless, 1).longest == 400


@pytest.mark.parametrize("words", [26, 3000])
def test_vocabularies_of_any_size_are_trained_with(
    words: int, make_cache: MakeCache, tmp_path: Path
) -> None:
    """Three words are in every caption; the others are rare."""
    rare = np.array_split([f"w{n}" for n in range(words - 3)], 10)
    cache = make_cache([[" ".join(["a", "dog", "runs", *part])] for part in rare])
    assert len(build_vocabulary(cache.captions, 1)) == words + 4
    vocabulary, said = learned(cache, tmp_path, epochs=1)
    assert 0.5 * words < len(vocabulary) < words
    assert all(set(text.split()) <= set(vocabulary.words) for text in said)
    assert all(said)
    with pytest.raises(VocabularyError, match="no word occurs 9999 times"):
        build_vocabulary(cache.captions, 9999)
