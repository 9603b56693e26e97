"""Training that starts from a trained model keeps what that has learned."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.errors import CapError
from cache.store import FeatureCache
from tests.conftest import MakeCache
from train.captions.vocabulary import SPECIALS, Vocabulary, build_vocabulary
from train.config import BEST, Recipe, TrainConfig
from train.fit.data_recipe import data_recipe
from train.fit.reports import EpochLog, Started, StartScores
from train.fit.run import train
from train.model.bundle import Bundle, load_bundle
from train.model.start_model import StartModel, new_decoder

RECIPE = Recipe(
    embedding_size=8, hidden_size=16, tie_embeddings=True, photo_every_step=True, epochs=30,
    batch_size=8, min_count=1, learning_rate=0.02,
)  # fmt: skip


def run(cache: FeatureCache, out: Path, recipe: Recipe = RECIPE, **changes: object) -> list[object]:
    config = TrainConfig(cache.path, out, recipe=recipe, device="cpu", **changes)  # type: ignore[arg-type]
    return list(train(config))


@pytest.fixture
def dogs(make_cache: MakeCache, tmp_path: Path) -> Bundle:
    """A model that says «a dog runs» of every photo, in tmp_path/dogs."""
    run(make_cache([["a dog runs"]] * 12, name="dogs.h5"), tmp_path / "dogs")
    return load_bundle(tmp_path / "dogs")


def test_known_words_keep_their_numbers_and_new_ones_follow(dogs: Bundle) -> None:
    start = StartModel(dogs, "")
    new = Vocabulary(words=("zebra", "a", "cat"), counts=(9, 4, 2), min_count=2)
    joined = start.vocabulary(new)
    assert joined.words == (*dogs.vocabulary.words, "zebra", "cat")
    counts = dict(zip(dogs.vocabulary.words, dogs.vocabulary.counts, strict=True))
    assert joined.counts == (*(counts[w] + 4 * (w == "a") for w in dogs.vocabulary.words), 9, 2)
    assert joined.min_count == 2


def test_the_ways_that_words_are_written_are_joined(dogs: Bundle) -> None:
    known = dataclasses.replace(dogs.vocabulary, cases={"dog": "Dog", "a": "A"}, longest=60)
    start = StartModel(dataclasses.replace(dogs, vocabulary=known), "")
    new = Vocabulary(("dog", "paris"), (3, 1), 1, cases={"dog": "DOG", "paris": "Paris"})
    joined = start.vocabulary(new)
    assert joined.cases == {"dog": "DOG", "a": "A", "paris": "Paris"}
    assert joined.longest == 60


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_with_more_words_predicts_the_known_ones_as_before(
    make_cache: MakeCache, tmp_path: Path, tied: bool
) -> None:
    recipe = dataclasses.replace(RECIPE, tie_embeddings=tied, dropout=0.5)
    run(make_cache([["a dog runs"]] * 12), tmp_path / "run", recipe)
    before = load_bundle(tmp_path / "run")
    start = StartModel(before, "")
    vocabulary = start.vocabulary(Vocabulary(("cat", "dog"), (5, 1), 1))
    decoder = start.decoder(dataclasses.replace(RECIPE, dropout=0.3), vocabulary).eval()  # type: ignore[arg-type]
    assert (decoder.config.dropout, decoder.config.tie_embeddings) == (0.3, tied)
    known = len(before.vocabulary)
    assert decoder.config.vocab_size == known + 1
    features = torch.randn(3, before.decoder.config.feature_dim)
    words = torch.tensor([[1, 4, 5]] * 3)
    with torch.no_grad():
        expected, found = before.decoder(features, words), decoder(features, words)
    torch.testing.assert_close(found[..., :known], expected)
    bias = decoder.head.bias[len(SPECIALS) : known]
    torch.testing.assert_close(decoder.head.bias[known], bias.mean())


def test_a_model_goes_on_from_what_it_has_learned(
    dogs: Bundle, make_cache: MakeCache, tmp_path: Path
) -> None:
    same = make_cache([["a dog runs"]] * 12, name="same.h5")
    few = dataclasses.replace(RECIPE, epochs=1, learning_rate=1e-5)
    reports = run(same, tmp_path / "on", few, from_model=tmp_path / "dogs")
    (before,) = [report for report in reports if isinstance(report, StartScores)]
    (after,) = [report for report in reports if isinstance(report, EpochLog)]
    assert before.val_loss < 0.5
    assert after.val_loss == pytest.approx(before.val_loss, rel=0.05)
    assert before.line().startswith(f"Before training: Validation loss: {before.val_loss:.4f}, ")


def test_a_model_that_nothing_improves_on_is_the_best_one(
    dogs: Bundle, make_cache: MakeCache, tmp_path: Path
) -> None:
    same = make_cache([["a dog runs"]] * 12, name="same.h5")
    ruinous = dataclasses.replace(RECIPE, epochs=2, learning_rate=0.3)
    run(same, tmp_path / "on", ruinous, from_model=tmp_path / "dogs")
    best = load_bundle(tmp_path / "on/best.cap")
    assert best.training["epoch"] == -1
    expected = dogs.decoder.state_dict()
    assert all(torch.equal(v, expected[n]) for n, v in best.decoder.state_dict().items())


def test_new_words_are_learned(dogs: Bundle, make_cache: MakeCache, tmp_path: Path) -> None:
    cats = make_cache([["a cat sleeps"]] * 12, name="cats.h5")
    reports = run(cats, tmp_path / "cats", from_model=tmp_path / "dogs")
    started = reports[0]
    assert isinstance(started, Started)
    assert started.vocab_size == len(SPECIALS) + len(dogs.vocabulary.words) + 2
    last = [report for report in reports if isinstance(report, EpochLog)][-1]
    assert isinstance(last, EpochLog)
    assert last.val_loss < 0.5


def test_a_model_of_other_features_is_refused(
    dogs: Bundle, make_cache: MakeCache, tmp_path: Path
) -> None:
    other = make_cache([["a dog runs"]] * 12, name="other.h5", feature_dim=5)
    with pytest.raises(CapError, match=r"best\.cap: trained on features with feature_dim \d+, not"):
        run(other, tmp_path / "run", from_model=tmp_path / "dogs")
    assert not (tmp_path / "run/checkpoint.pt").exists()
    split = make_cache([["a dog runs"]] * 12, name="split.h5", tokenizer="whitespace")
    with pytest.raises(CapError, match="holds those of whitespace; extract with --tokenizer tree"):
        run(split, tmp_path / "run", from_model=tmp_path / "dogs")


def test_a_run_goes_on_only_with_the_model_it_started_from(
    dogs: Bundle, make_cache: MakeCache, tmp_path: Path
) -> None:
    cache, out = make_cache([["a cat runs"]] * 12, name="cats.h5"), tmp_path / "run"
    one = dataclasses.replace(RECIPE, epochs=1)
    run(cache, out, one, from_model=tmp_path / "dogs")
    with pytest.raises(CapError, match=r"started from the model whose SHA-256 begins .* for none;"):
        run(cache, out, RECIPE, resume=True)
    reports = run(cache, out, RECIPE, resume=True, from_model=tmp_path / "dogs")
    assert not any(isinstance(report, StartScores) for report in reports)
    run(cache, tmp_path / "own", one)
    with pytest.raises(CapError, match="did not start from a model, asked for "):
        run(cache, tmp_path / "own", RECIPE, resume=True, from_model=tmp_path / "dogs")


@pytest.mark.parametrize(
    ("captions", "changes", "expected"),
    [
        (699, {}, 0.2),
        (700, {}, 1.0),
        (10, {"tie_embeddings": False}, 1.0),
        (10, {"photo_every_step": False}, 1.0),
    ],
)
def test_the_photo_begins_faint_where_there_are_few_captions(
    captions: int, changes: dict[str, Any], expected: float, make_cache: MakeCache
) -> None:
    cache = make_cache([["a dog runs"]])
    recipe = data_recipe(dataclasses.replace(BEST, **changes), captions)
    vocabulary = build_vocabulary(cache.captions, 1)
    decoder = new_decoder(recipe, cache, vocabulary, None, captions)
    assert decoder.normalize.weight.tolist() == pytest.approx([expected] * 512)
