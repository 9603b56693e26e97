from __future__ import annotations

import numpy as np
import pytest

from tests.train.test_ngrams import sentences
from train.scores.intervals import intervals
from train.scores.metrics import Scores, score


def corpus(photos: int, seed: int = 0) -> Scores:
    random = np.random.default_rng(seed)
    hypotheses = {str(i): s for i, s in enumerate(sentences(random, 6, 9, photos))}
    references = {str(i): ["w0 w1 w2", *sentences(random, 6, 9, 3)] for i in range(photos)}
    return score(hypotheses, references, java=False)


def test_intervals_are_those_of_scores_resampled_by_hand() -> None:
    scores = corpus(20)
    photos, count = scores.photos, 20
    random = np.random.default_rng(3)
    by_hand: dict[str, list[float]] = {"bleu_1": [], "bleu_2": [], "rouge_l": [], "cider": []}
    for times in random.multinomial(count, np.full(count, 1 / count), 40):
        drawn = np.repeat(np.arange(count), times)
        matches, guesses = photos.bleu.correct[drawn].sum(0), photos.bleu.guesses[drawn].sum(0)
        shorter = photos.bleu.closest[drawn].sum() / photos.bleu.lengths[drawn].sum()
        brevity = np.exp(min(0, 1 - shorter))
        by_hand["bleu_1"].append(matches[0] / guesses[0] * brevity)
        by_hand["bleu_2"].append(np.prod((matches / guesses)[:2]) ** 0.5 * brevity)
        by_hand["rouge_l"].append(photos.rouge_l[drawn].mean())
        by_hand["cider"].append(photos.cider[drawn].mean())
    found = intervals(photos, resamplings=40, level=0.9, seed=3)
    for name, values in by_hand.items():
        assert found[name] == pytest.approx(np.quantile(values, [0.05, 0.95]), rel=1e-6), name


def test_intervals_hold_the_scores_and_shrink_with_more_photos() -> None:
    widths = []
    for photos in (50, 800):
        scores = corpus(photos)
        found = intervals(scores.photos)
        assert found == intervals(scores.photos)  # seeded
        assert found != intervals(scores.photos, seed=1)
        for name, (low, high) in found.items():
            assert low < getattr(scores, name) < high
        widths.append(found["cider"][1] - found["cider"][0])
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.3)  # by the square root of 800 / 50


def test_equal_photos_leave_no_doubt() -> None:
    texts = {str(i): "a b c d e" for i in range(9)}
    scores = score(texts, {image: [text] for image, text in texts.items()}, java=False)
    assert intervals(scores.photos)["bleu_4"] == pytest.approx((1, 1))


def test_large_corpora_are_resampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    photos = corpus(30).photos
    whole = intervals(photos, resamplings=50)
    monkeypatch.setattr("train.scores.intervals._CHUNK", 30 * 7)
    parts = intervals(photos, resamplings=50)
    assert parts.keys() == whole.keys()
    for name in whole:
        assert parts[name] == pytest.approx(whole[name])
