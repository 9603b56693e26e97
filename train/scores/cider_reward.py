"""CIDEr-D of sampled captions, the reward of self-critical training.

As in Rennie et al. (2017), "Self-critical sequence training", and its published code, document
frequencies come from the training captions, and `<end>` counts as a word. Otherwise captions that
break off ("a dog on a") would not be penalized.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cache.record import offsets_of
from train.captions.vocabulary import END, PAD
from train.scores.ngrams import ReferenceNgrams, Sentences, expand_ranges, find_sorted


class CiderReward:
    """Scores samples against the references of their photos. Made once per run."""

    def __init__(
        self,
        words: NDArray[np.int32],
        offsets: NDArray[np.int64],
        photos: NDArray[np.int64],
        *,
        vocab_size: int,
        skipped: Sequence[int] = (),
    ) -> None:
        """words: of the R references one after the other, without `<end>`. offsets: (R + 1,) where
        each begins. photos: (R,) the photo of each, in any order. skipped: words that are ignored
        in references and samples, such as the punctuation that evaluation drops.
        """
        self._skipped = np.zeros(vocab_size, bool)
        self._skipped[list(skipped)] = True
        order = np.argsort(photos, kind="stable")
        self._photos, first_references = np.unique(photos[order], return_index=True)
        self._ngrams = ReferenceNgrams(
            self._without_skipped(_with_end(words, offsets, order)),
            np.append(first_references, len(order)),
        )

    def score(self, photos: NDArray[np.int64], samples: NDArray[np.integer]) -> NDArray[np.float64]:
        """(M,) CIDEr-D of each sample, 0 to 10.

        photos: (M,) as in the constructor. samples: (M, T) words; a sample ends with its first
        `<end>` or before its first `<pad>`. Raises ValueError for a photo without references or a
        word outside the vocabulary.
        """
        rows, known = find_sorted(self._photos, photos)
        if not known.all():
            raise ValueError(f"photo {photos[~known][0]} has no references")
        vocab_size = len(self._skipped)
        if samples.size and not 0 <= samples.min() <= samples.max() < vocab_size:
            raise ValueError(f"a word is outside the vocabulary of {vocab_size:,}")
        _, cider = self._ngrams.score(rows, self._without_skipped(_until_end(samples)))
        return cider

    def _without_skipped(self, sentences: Sentences) -> Sentences:
        kept = ~self._skipped[sentences.words]
        return Sentences(sentences.words[kept], offsets_of(kept)[sentences.offsets])


def _with_end(
    words: NDArray[np.int32], offsets: NDArray[np.int64], order: NDArray[np.int64]
) -> Sentences:
    """The sentences in this order, each with `<end>`."""
    new_offsets = offsets_of(np.diff(offsets)[order] + 1)
    flat = np.full(new_offsets[-1], END, np.int64)
    is_word = np.ones(len(flat), bool)
    is_word[new_offsets[1:] - 1] = False
    flat[is_word] = words[expand_ranges(offsets, order)[1]]
    return Sentences(flat, new_offsets)


def _until_end(samples: NDArray[np.integer]) -> Sentences:
    """The words of padded samples (M, T): up to and with `<end>`, or up to but without `<pad>`."""
    stops = np.cumsum((samples == END) | (samples == PAD), axis=1)
    kept = (stops == 0) | ((stops == 1) & (samples == END))
    return Sentences(samples[kept].astype(np.int64), offsets_of(kept.sum(1)))
