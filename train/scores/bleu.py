"""Corpus BLEU (Papineni et al., 2002) from the counts of each photo."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ORDERS = 4  # n-grams of 1 to 4 words
_TINY, _SMALL = 1e-15, 1e-9  # pycocoevalcap adds them to avoid dividing by zero


@dataclass(frozen=True)
class BleuStatistics:
    """The counts that BLEU is computed from, photo by photo. Corpus BLEU takes their sums."""

    correct: NDArray[np.float64]  # (N, 4) clipped matches of 1- to 4-grams
    guesses: NDArray[np.float64]  # (N, 4) n-grams of the caption
    lengths: NDArray[np.float64]  # (N,) words of the caption
    closest: NDArray[np.float64]  # (N,) words of the reference whose length is closest

    def bleu(self) -> NDArray[np.float64]:
        """(4,) corpus BLEU-1 to 4."""
        return corpus_bleu(
            self.correct.sum(0), self.guesses.sum(0), self.lengths.sum(), self.closest.sum()
        )


def corpus_bleu(
    correct: NDArray[np.float64],
    guesses: NDArray[np.float64],
    lengths: NDArray[np.float64] | np.float64,
    closest: NDArray[np.float64] | np.float64,
) -> NDArray[np.float64]:
    """BLEU-1 to 4 (…, 4) from summed counts (…, 4), (…, 4), (…,), (…,): see `BleuStatistics`.

    As in pycocoevalcap, a corpus without a match scores nearly 0, not nan.
    """
    precision = (correct + _TINY) / (guesses + _SMALL)
    geometric = np.cumprod(precision, -1) ** (1 / np.arange(1, ORDERS + 1))
    ratio = (lengths + _TINY) / (closest + _SMALL)
    brevity: NDArray[np.float64] = np.exp(np.minimum(0, 1 - 1 / ratio))
    scores: NDArray[np.float64] = geometric * brevity[..., None]
    return scores
