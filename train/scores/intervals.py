"""How much the scores of a corpus depend on which photos happen to be in it.

The photos are drawn anew with replacement, as many as there are, and the corpus scores recomputed
from what each photo contributes (Efron's bootstrap; Koehn, 2004, for BLEU). What stays fixed: the
captions, the references, and CIDEr's document frequencies, which are those of all the photos.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from train.scores.bleu import ORDERS, corpus_bleu
from train.scores.meteor import corpus_meteor
from train.scores.metrics import PhotoScores

RESAMPLINGS = 1000
LEVEL = 0.95
_CHUNK = 4_000_000  # drawn counts in memory at once
_Score = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def intervals(
    photos: PhotoScores,
    *,
    resamplings: int = RESAMPLINGS,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """The central interval that holds `level` of the resampled scores, by the scores' names.

    As fractions; METEOR's and SPICE's where they were computed.
    """
    bleu, count = photos.bleu, len(photos.cider)

    def mean(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        return sums / count

    # By the names of scores: what photos add to them (N, K); sums of that (R, K) to scores (R, M).
    parts: dict[tuple[str, ...], tuple[NDArray[np.float64], _Score]] = {
        ("bleu_1", "bleu_2", "bleu_3", "bleu_4"): (
            np.column_stack([bleu.correct, bleu.guesses, bleu.lengths, bleu.closest]),
            _bleu,
        ),
        ("rouge_l",): (photos.rouge_l, mean),
        ("cider",): (photos.cider, mean),
    }
    if photos.meteor is not None:
        parts["meteor",] = (photos.meteor, corpus_meteor)
    if photos.spice is not None:
        parts["spice",] = (photos.spice, mean)
    contributions = np.column_stack([added for added, _ in parts.values()])
    random = np.random.default_rng(seed)
    sums = []
    left, most = resamplings, max(1, _CHUNK // count)
    while left:
        drawn = random.multinomial(count, np.full(count, 1 / count), min(left, most))  # (R, N)
        sums.append(drawn @ contributions)
        left -= len(drawn)
    widths = [added[0].size for added, _ in parts.values()]
    by_part = np.split(np.concatenate(sums), np.cumsum(widths)[:-1], axis=1)
    tail = (1 - level) / 2
    found: dict[str, tuple[float, float]] = {}
    for (names, (_, score)), total in zip(parts.items(), by_part, strict=True):
        low, high = np.quantile(score(total).reshape(resamplings, -1), [tail, 1 - tail], axis=0)
        found |= {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)}
    return found


def _bleu(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    correct, guesses, lengths = np.split(sums, [ORDERS, 2 * ORDERS], axis=1)
    return corpus_bleu(correct, guesses, lengths[:, 0], lengths[:, 1])
