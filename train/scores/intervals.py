"""Confidence intervals: how much corpus scores depend on which photos happen to be in the corpus.

Photos are drawn with replacement, as many as there are, and the corpus scores are recomputed from
the statistics of each photo (Efron's bootstrap; Koehn, 2004, for BLEU). Captions and references
stay the same, and so do CIDEr's document frequencies, which are those of all photos.
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
_CHUNK = 4_000_000  # counts drawn at a time, to limit memory
_Score = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def intervals(
    photos: PhotoScores,
    *,
    resamplings: int = RESAMPLINGS,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """For each score's name, the central interval that contains `level` of the resampled scores.

    As fractions. METEOR is included if it was computed.
    """
    bleu, count = photos.bleu, len(photos.cider)

    def mean(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        return sums / count

    # For the names of M scores: the statistics of the photos (N,) or (N, K), and how R sums of them
    # (R, K) become scores (R,) or (R, M).
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
    statistics = np.column_stack([values for values, _ in parts.values()])
    random = np.random.default_rng(seed)
    sums = []
    missing, most = resamplings, max(1, _CHUNK // count)
    while missing:
        drawn = random.multinomial(count, np.full(count, 1 / count), min(missing, most))  # (R, N)
        sums.append(drawn @ statistics)
        missing -= len(drawn)
    widths = [values[0].size for values, _ in parts.values()]
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
