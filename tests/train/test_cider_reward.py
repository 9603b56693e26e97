"""The self-critical reward equals CIDEr-D, from the textbook and from pycocoevalcap."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.cider.cider_scorer import CiderScorer

from train.captions.numbering import build_caption_table
from train.captions.vocabulary import END, PAD, UNK, build_vocabulary
from train.scores.cider_reward import CiderReward

References = dict[int, list[list[int]]]  # by photo, word numbers without <end>


def reward_of(references: References, vocab_size: int, **options: Sequence[int]) -> CiderReward:
    """A reward whose references are in an order that mixes the photos."""
    captions = [(photo, words) for photo, texts in references.items() for words in texts]
    captions = captions[::2] + captions[1::2]
    offsets = np.cumsum([0, *(len(words) for _, words in captions)])
    return CiderReward(
        np.array([word for _, words in captions for word in words], np.int32),
        offsets,
        np.array([photo for photo, _ in captions]),
        vocab_size=vocab_size,
        **options,
    )


def padded(sentences: Sequence[Sequence[int]]) -> np.ndarray:
    longest = max(len(sentence) for sentence in sentences)
    return np.array([[*s, *[PAD] * (longest - len(s))] for s in sentences])


def textbook(references: References, photo: int, sample: Sequence[int]) -> float:
    """CIDEr-D with dictionaries, sentence by sentence. sample: with its <end>, if it has one."""

    def ngrams(words: Sequence[int], n: int) -> Counter[tuple[int, ...]]:
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    ended = {p: [[*words, END] for words in texts] for p, texts in references.items()}
    total = 0.0
    for n in range(1, 5):
        frequency: Counter[tuple[int, ...]] = Counter()
        for texts in ended.values():
            frequency.update(set().union(*(ngrams(words, n) for words in texts)))

        def vector(
            words: Sequence[int], n: int = n, frequency: Counter[tuple[int, ...]] = frequency
        ) -> dict[tuple[int, ...], float]:
            return {
                gram: count * math.log(len(references) / max(1, frequency[gram]))
                for gram, count in ngrams(words, n).items()
            }

        for words in ended[photo]:
            a, b = vector(sample), vector(words)
            norms = math.hypot(*a.values(), 0) * math.hypot(*b.values(), 0)
            dot = sum(min(a[gram], b[gram]) * b[gram] for gram in a.keys() & b.keys())
            penalty = math.exp(-((len(sample) - len(words)) ** 2) / 72)
            if norms:
                total += dot / norms * penalty / len(ended[photo])
    return 10 * total / 4


def random_references(photos: int, vocab_size: int, seed: int) -> References:
    random = np.random.default_rng(seed)
    return {
        7 * photo: [
            random.integers(3, vocab_size, random.integers(1, 9)).tolist()
            for _ in range(random.integers(1, 6))
        ]
        for photo in range(photos)
    }


@pytest.mark.parametrize("vocab_size", [6, 12, 40_000])
def test_the_reward_is_the_textbooks_cider_d(vocab_size: int) -> None:
    references = random_references(30, vocab_size, seed=vocab_size)
    random = np.random.default_rng(1)
    photos, samples = [], []
    for photo, texts in references.items():
        photos += [photo] * 4
        samples.append([*texts[0], END])  # a reference itself
        samples.append([*texts[0], *texts[-1]])  # broken off, no <end>
        samples.append([*random.integers(3, vocab_size, 5).tolist(), END])
        samples.append([texts[0][0]] * 6)  # repeated: clipped
    scores = reward_of(references, vocab_size).score(np.array(photos), padded(samples))
    expected = [textbook(references, p, s) for p, s in zip(photos, samples, strict=True)]
    np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-12)
    assert scores.max() > 1


def test_the_reward_is_pycocoevalcaps_on_real_captions(sample_data: Path) -> None:
    with (sample_data / "flickr8k/captions.txt").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    grouped: dict[str, list[str]] = {}
    for row in rows[:4000]:
        grouped.setdefault(row["image"], []).append(row["caption"])
    table = build_caption_table(list(grouped.values()))
    vocabulary = build_vocabulary(table, min_count=2)
    words = vocabulary.numbers_for(table)[table.tokens]
    sentences = [words[a:b].tolist() for a, b in pairwise(table.token_offsets.tolist())]
    reward = CiderReward(
        words, table.token_offsets, table.rows.astype(np.int64), vocab_size=len(vocabulary)
    )
    # Samples: one of the photo's own captions, another photo's, half a caption, two joined.
    last_of = np.flatnonzero(np.diff(table.rows, append=-1))
    for photo_samples in (
        [sentences[i] for i in last_of],
        [sentences[i - 4] for i in last_of],
        [sentences[i][: len(sentences[i]) // 2] for i in last_of],
        [sentences[i] + sentences[i - 1] for i in last_of],
        [sentences[(i + 5) % len(sentences)] for i in last_of],
    ):
        scorer = CiderScorer(n=4, sigma=6.0)
        for photo, sample in enumerate(photo_samples):
            own = [sentences[i] for i in np.flatnonzero(table.rows == photo)]
            scorer += (as_text(sample), [as_text(caption) for caption in own])
        _, official = scorer.compute_score()
        scores = reward.score(
            np.arange(len(photo_samples)), padded([[*s, END] for s in photo_samples])
        )
        np.testing.assert_allclose(scores, official, rtol=1e-6, atol=1e-6)
        assert scores.max() > 0.5


def as_text(words: Sequence[int]) -> str:
    return " ".join(str(word) for word in [*words, END])


def test_words_after_the_end_do_not_count() -> None:
    reward = reward_of({1: [[4, 5, 6]], 2: [[7, 8]]}, 9)
    scores = reward.score(
        np.array([1, 1, 1, 1]),
        np.array([[4, 5, 6, END, 7], [4, 5, 6, END, PAD], [4, 5, 6, PAD, 7], [4, 5, END, END, 6]]),
    )
    assert scores[0] == scores[1] == pytest.approx(10)
    assert scores[2] < 10
    assert scores[3] == pytest.approx(textbook({1: [[4, 5, 6]], 2: [[7, 8]]}, 1, [4, 5, END]))


def test_a_sentence_that_breaks_off_earns_less_than_one_that_ends() -> None:
    references = {1: [[4, 5, 6, 7]], 2: [[8, 9, 4]], 3: [[5, 9]]}
    complete, broken = reward_of(references, 10).score(
        np.array([1, 1]), padded([[4, 5, 6, 7, END], [4, 5, 6, 7]])
    )
    assert broken < complete


def test_skipped_words_count_for_nothing() -> None:
    dot = 5
    references = {1: [[4, 6, dot], [7, 4]], 2: [[8, dot, 9]]}
    bare = {p: [[w for w in words if w != dot] for words in t] for p, t in references.items()}
    photos, samples = np.array([1, 1, 2]), padded([[4, 6, END], [4, dot, 6, dot, END], [8, 9, END]])
    with_dots = reward_of(references, 10, skipped=[dot]).score(photos, samples)
    expected = [textbook(bare, 1, [4, 6, END])] * 2 + [textbook(bare, 2, [8, 9, END])]
    np.testing.assert_allclose(with_dots, expected)


def test_samples_that_say_nothing_known_earn_nothing() -> None:
    reward = reward_of({1: [[4, 5]], 2: [[6]]}, 12)
    scores = reward.score(np.array([1, 1, 2]), padded([[PAD], [UNK, 10, 11], [END]]))
    assert scores.tolist() == [0, 0, 0]  # <end> is in every document, so its weight is 0
    assert reward.score(np.zeros(0, np.int64), np.zeros((0, 5), np.int64)).shape == (0,)
    # One photo: every n-gram is in every document.
    assert reward_of({1: [[4]]}, 5).score(np.array([1]), np.array([[4, END]])).tolist() == [0]


def test_scores_do_not_depend_on_the_batch() -> None:
    references = random_references(12, 9, seed=3)
    reward = reward_of(references, 9)
    photos = np.array(list(references))
    samples = padded([[*texts[-1], END] for texts in references.values()])
    alone = [reward.score(photos[i : i + 1], samples[i : i + 1])[0] for i in range(len(photos))]
    np.testing.assert_allclose(reward.score(photos, samples), alone, rtol=1e-12)


def test_unknown_photos_and_words_are_refused() -> None:
    reward = reward_of({1: [[4]], 3: [[5]]}, 6)
    with pytest.raises(ValueError, match="photo 2 has no references"):
        reward.score(np.array([1, 2]), np.array([[4], [4]]))
    with pytest.raises(ValueError, match="outside the vocabulary of 6"):
        reward.score(np.array([1]), np.array([[6]]))
