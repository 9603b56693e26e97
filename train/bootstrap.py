"""How much the scores of a corpus depend on which photos happen to be in it.

The photos are drawn anew with replacement, as many as there are, and the corpus scores recomputed
from what each photo contributes (Efron's bootstrap; Koehn, 2004, for BLEU). What stays fixed: the
captions, the references, and CIDEr's document frequencies, which are those of all the photos.
"""

from __future__ import annotations

import numpy as np

from train.bleu import ORDERS, corpus_bleu
from train.metrics import PhotoScores

RESAMPLINGS = 1000
LEVEL = 0.95
_CHUNK = 4_000_000  # drawn counts in memory at once


def intervals(
    photos: PhotoScores,
    *,
    resamplings: int = RESAMPLINGS,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """The central interval that holds `level` of the resampled scores, by the scores' names.

    BLEU-1 to 4, ROUGE-L and CIDEr, as fractions. METEOR and SPICE have none: their programs keep
    to themselves what a photo contributes.
    """
    bleu = photos.bleu
    contributions = np.column_stack(
        [bleu.correct, bleu.guesses, bleu.lengths, bleu.closest, photos.rouge_l, photos.cider]
    )  # (N, 12)
    count = len(contributions)
    random = np.random.default_rng(seed)
    sums = []
    left, most = resamplings, max(1, _CHUNK // count)
    while left:
        drawn = random.multinomial(count, np.full(count, 1 / count), min(left, most))  # (R, N)
        sums.append(drawn @ contributions)
        left -= len(drawn)
    total = np.concatenate(sums)  # (R, 12)
    scores = np.column_stack(
        [
            corpus_bleu(total[:, :ORDERS], total[:, ORDERS : 2 * ORDERS], total[:, 8], total[:, 9]),
            total[:, 10:] / count,
        ]
    )
    tail = (1 - level) / 2
    low, high = np.quantile(scores, [tail, 1 - tail], axis=0)
    names = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")
    return {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)}
