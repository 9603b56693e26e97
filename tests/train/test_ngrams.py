"""The indexed scores against pycocoevalcap's own scorers."""

from __future__ import annotations

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from train.scores.bleu import BleuStatistics
from train.scores.ngrams import ReferenceNgrams, number_words


class TextNgrams:
    """Indexes texts as validation does."""

    def __init__(self, references: list[list[str]]) -> None:
        self.numbers: dict[str, int] = {}
        flat = number_words([text for texts in references for text in texts], self.numbers)
        self.index = ReferenceNgrams(flat, np.cumsum([0, *map(len, references)]))

    def score(
        self, captions: list[str], photos: list[int] | None = None
    ) -> tuple[BleuStatistics, np.ndarray]:
        """photos: of the captions, or None for one caption per photo."""
        rows = np.array(photos if photos is not None else range(len(captions)), np.int64)
        return self.index.score(rows, number_words(captions, dict(self.numbers)))


def expected(references: list[list[str]], captions: list[str]) -> tuple[list[float], list[float]]:
    truth = dict(enumerate(references))
    found = {i: [caption] for i, caption in enumerate(captions)}
    bleu, _ = Bleu(4).compute_score(truth, found, verbose=0)
    _, cider = Cider().compute_score(truth, found)
    return bleu, list(cider)


def check(references: list[list[str]], captions: list[str]) -> None:
    bleu, cider = TextNgrams(references).score(captions)
    wanted_bleu, wanted_cider = expected(references, captions)
    assert bleu.bleu() == pytest.approx(wanted_bleu, rel=1e-12, abs=1e-15)
    assert cider == pytest.approx(wanted_cider, rel=1e-12, abs=1e-15)


def sentences(random: np.random.Generator, words: int, longest: int, count: int) -> list[str]:
    """Sentences of few words, so that n-grams repeat within and between them."""
    return [
        " ".join(f"w{word}" for word in random.integers(words, size=random.integers(longest + 1)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_random_corpora_score_as_pycocoevalcap_scores_them(seed: int) -> None:
    random = np.random.default_rng(seed)
    references = [sentences(random, 5, 9, int(random.integers(1, 6))) for _ in range(30)]
    # With two words that no reference has. Some captions are empty, some longer than any reference.
    check(references, sentences(random, 7, 14, 30))


@pytest.mark.parametrize(
    ("references", "captions"),
    [
        ([["a"], ["b"]], ["a", "b"]),  # no 2-grams at all
        ([["a b"], [""]], ["a b", ""]),
        ([[""], ["b"]], ["a b c d", "a"]),
        ([["a b c d e"]], ["a b c d e"]),  # one photo: every idf is 0
        ([["a a a a"], ["b"]], ["a a a a a a", "new new words"]),
    ],
)
def test_corners_score_as_pycocoevalcap_scores_them(
    references: list[list[str]], captions: list[str]
) -> None:
    check(references, captions)


def test_one_index_scores_many_captions_alike() -> None:
    random = np.random.default_rng(0)
    references = [sentences(random, 5, 9, 3) for _ in range(20)]
    index = TextNgrams(references)
    for seed in range(3):
        captions = sentences(np.random.default_rng(seed), 6, 9, 20)
        _, cider = index.score(captions)
        assert cider.tolist() == TextNgrams(references).score(captions)[1].tolist()


def test_references_without_a_word_match_nothing() -> None:
    bleu, cider = TextNgrams([[""], [""]]).score(["a b c d", ""])
    assert bleu.correct.sum() == 0
    assert cider.tolist() == [0, 0]


def test_many_captions_of_some_photos_score_as_one_of_each() -> None:
    random = np.random.default_rng(5)
    references = [sentences(random, 5, 9, int(random.integers(1, 6))) for _ in range(20)]
    index = TextNgrams(references)
    captions = [sentences(random, 6, 9, 20) for _ in range(3)]  # of all photos, three times
    photos = random.permutation(60) % 20  # the captions of a photo are in no particular place
    nth = [int((photos[:i] == photo).sum()) for i, photo in enumerate(photos)]
    mixed = [captions[k][photo] for k, photo in zip(nth, photos, strict=True)]
    bleu, cider = index.score(mixed, photos.tolist())
    for k in range(3):
        of_round = [i for i, n in enumerate(nth) if n == k]
        alone = [int(photos[i]) for i in of_round]
        one_bleu, one_cider = index.score(captions[k])
        assert cider[of_round].tolist() == one_cider[alone].tolist()
        assert bleu.correct[of_round].tolist() == one_bleu.correct[alone].tolist()
        assert bleu.closest[of_round].tolist() == one_bleu.closest[alone].tolist()
    none, nothing = index.score([], [])
    assert none.correct.shape == (0, 4)
    assert nothing.shape == none.closest.shape == (0,)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="without references"):
        TextNgrams([["a"], []])
    with pytest.raises(ValueError, match="1 captions for 2 photos"):
        TextNgrams([["a"], ["b"]]).score(["a"], [0, 1])
