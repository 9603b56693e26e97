from __future__ import annotations

import pytest

from train.scores.diversity import diversity


def test_a_collapsed_model_is_seen() -> None:
    found = diversity(["a dog runs"] * 9 + ["a <unk> cat"], vocabulary=1000)
    assert found.distinct == 2
    assert found.words_used == 4
    assert found.unk_share == pytest.approx(1 / 30)
    assert found.mean_length == 3
    assert (found.most_repeated, found.repeats) == ("a dog runs", 9)
    assert found.summary() == (
        "2 distinct captions of 10; 4 words used of 1,000 known, 3.3% of all words <unk>; "
        "3.0 words per caption; most frequent (9 times): a dog runs"
    )


def test_the_order_of_photos_does_not_matter() -> None:
    captions = ["b", "a", "a", "b", "c"]
    assert diversity(captions) == diversity(captions[::-1])
    assert diversity(captions).most_repeated == "a"


def test_empty_captions_are_counted() -> None:
    found = diversity(["", ""])
    assert (found.mean_length, found.unk_share, found.repeats) == (0, 0, 2)
