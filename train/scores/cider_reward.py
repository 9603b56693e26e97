"""CIDEr-D of sampled captions, as the reward of self-critical training.

As in Rennie et al. (2017), "Self-critical sequence training", and the public code after it,
document frequencies come from the training captions, and `<end>` is a word: without it, sentences
that break off ("a dog on a") would cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from train.captions.vocabulary import END, PAD
from train.scores.ngrams import ReferenceNgrams, Sentences, find, ranges


class CiderReward:
    """Scores samples against the references of their photos. Build once a run."""

    def __init__(
        self,
        words: NDArray[np.int32],
        offsets: NDArray[np.int64],
        photos: NDArray[np.int64],
        *,
        vocab_size: int,
        skipped: Sequence[int] = (),
    ) -> None:
        """words: the R references one after the other, without `<end>`; offsets: (R + 1,) into
        them; photos: (R,) the photo of each, in any order.

        skipped: words that count for nothing, in references and samples, as the punctuation that
        evaluation drops.
        """
        self._skipped = np.zeros(vocab_size, bool)
        self._skipped[list(skipped)] = True
        order = np.argsort(photos, kind="stable")
        self._photos, firsts = np.unique(photos[order], return_index=True)
        self._ngrams = ReferenceNgrams(
            self._without_skipped(_with_end(words, offsets, order)), np.append(firsts, len(order))
        )

    def score(self, photos: NDArray[np.int64], samples: NDArray[np.integer]) -> NDArray[np.float64]:
        """(M,) CIDEr-D of each sample, 0 to 10.

        photos: (M,) as given to the constructor; samples: (M, T) words, a sentence ending with its
        first `<end>` or before its first `<pad>`. Raises ValueError for a photo without references
        or a word outside the vocabulary.
        """
        rows, known = find(self._photos, photos)
        if not known.all():
            raise ValueError(f"photo {photos[~known][0]} has no references")
        vocab_size = len(self._skipped)
        if samples.size and not 0 <= samples.min() <= samples.max() < vocab_size:
            raise ValueError(f"a word is outside the vocabulary of {vocab_size:,}")
        _, cider = self._ngrams.score(rows, self._without_skipped(_until_end(samples)))
        return cider

    def _without_skipped(self, sentences: Sentences) -> Sentences:
        kept = ~self._skipped[sentences.words]
        before = np.zeros(len(kept) + 1, np.int64)
        np.cumsum(kept, out=before[1:])
        return Sentences(sentences.words[kept], before[sentences.cuts])


def _with_end(
    words: NDArray[np.int32], offsets: NDArray[np.int64], order: NDArray[np.int64]
) -> Sentences:
    """The sentences in this order, each with `<end>`."""
    cuts = np.zeros(len(order) + 1, np.int64)
    np.cumsum(np.diff(offsets)[order] + 1, out=cuts[1:])
    flat = np.full(cuts[-1], END, np.int64)
    is_word = np.ones(len(flat), bool)
    is_word[cuts[1:] - 1] = False
    flat[is_word] = words[ranges(offsets, order)[1]]
    return Sentences(flat, cuts)


def _until_end(samples: NDArray[np.integer]) -> Sentences:
    """The sentences of padded samples (M, T): up to and with `<end>`, or up to `<pad>`."""
    stops = (samples == END) | (samples == PAD)
    ended = np.cumsum(stops, axis=1)
    kept = (ended == 0) | ((ended == 1) & (samples == END))
    cuts = np.zeros(len(samples) + 1, np.int64)
    np.cumsum(kept.sum(1), out=cuts[1:])
    return Sentences(samples[kept].astype(np.int64), cuts)
