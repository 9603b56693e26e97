"""BLEU and CIDEr-D against references whose n-grams are indexed once, for scoring many times.

Validation scores one caption of every photo after each epoch. Self-critical training scores many
samples of a few photos at each step. The scores equal pycocoevalcap's, as
`tests/train/test_ngrams.py` checks, but its dictionaries take seconds and gigabytes at COCO's size.

CIDEr-D is that of Vedantam et al. (2015), "CIDEr: Consensus-based image description evaluation",
section 6.1: tf-idf vectors of 1- to 4-grams, counts clipped to the reference's, cosine, a Gaussian
penalty on the difference in length (sigma 6), the mean over orders and references, times 10.
Document frequencies are those of the references; a document is all references of one photo.

Words are numbers, n-grams are single integers, tables are sorted arrays, and `bincount` adds up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.scores.bleu import ORDERS, BleuStatistics

# The key of an n-gram is a polynomial in this number, modulo 2^64, with the words as coefficients.
# The number is one of L'Ecuyer (1999), "Tables of linear congruential generators of different sizes
# and good lattice structure". It was chosen because no two 4-grams of a vocabulary of 50,000 words
# share a key, which follows from the shortest vector of its lattice. In a larger vocabulary a pair
# shares one with a probability of about 2^-64.
_MULTIPLIER = np.uint64(3935559000370003845)
_SIGMA = 6.0  # words
_SCALE = 10.0


@dataclass(frozen=True)
class Sentences:
    """Word numbers of S sentences, one after the other."""

    words: NDArray[np.int64]  # of all sentences; not negative
    offsets: NDArray[np.int64]  # (S + 1,) sentence s is words[offsets[s] : offsets[s + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(S,) number of words of each."""
        return np.diff(self.offsets)

    def ngrams(self) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
        """For n from 1 to 4: the keys of all n-grams, and the sentence of each."""
        sentence_of = np.repeat(np.arange(len(self)), self.lengths)
        remaining = self.offsets[1:][sentence_of] - np.arange(len(sentence_of))  # in the sentence
        words = self.words.astype(np.uint64)
        starts = np.arange(len(sentence_of))
        keys = np.zeros(len(sentence_of), np.uint64)
        for n in range(1, ORDERS + 1):
            fits = remaining[starts] >= n
            starts, keys = starts[fits], keys[fits]
            keys = keys * _MULTIPLIER + words[starts + (n - 1)]
            yield keys, sentence_of[starts]


def number_words(captions: Iterable[str], numbers: dict[str, int]) -> Sentences:
    """Number the words of captions, which are separated by spaces. Adds new words to `numbers`."""
    words: list[int] = []
    offsets = [0]
    for caption in captions:
        words += [numbers.setdefault(word, len(numbers)) for word in caption.split()]
        offsets.append(len(words))
    return Sentences(np.array(words, np.int64), np.array(offsets, np.int64))


@dataclass(frozen=True)
class _Pairs:
    """P pairs of a caption and one of its photo's references."""

    captions: NDArray[np.int64]  # (P,)
    references: NDArray[np.int64]  # (P,)


@dataclass(frozen=True)
class _ReferenceTable:
    """The n-grams of R references for one n: G distinct ones, E entries (reference, n-gram)."""

    keys: NDArray[np.uint64]  # (G,) ascending
    idf: NDArray[np.float64]  # (G,) log(photos / photos whose references have the n-gram)
    unseen_idf: float  # of n-grams that no reference has
    entries: NDArray[np.int64]  # (E,) reference * G + index into `keys`, ascending
    counts: NDArray[np.int32]  # (E,) how often the reference has the n-gram
    norms: NDArray[np.float64]  # (R,) length of the reference's tf-idf vector

    def compare(
        self, keys: NDArray[np.uint64], caption_of: NDArray[np.int64], count: int, pairs: _Pairs
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(count,) matches of each caption, and (P,) clipped cosine of each pair.

        keys: the n-grams of all `count` captions. caption_of: the caption of each. An n-gram can
        match as often as the one of the photo's references that has it most often.
        """
        if not len(keys) or not len(self.keys):
            return np.zeros(count), np.zeros(len(pairs.captions))
        # The distinct n-grams of each caption, and how often it has them (tf).
        distinct, grams = np.unique(keys, return_inverse=True)
        places, known = find_sorted(self.keys, distinct)
        idf = np.where(known, self.idf[places], self.unseen_idf)
        counted, tf = np.unique(caption_of * len(distinct) + grams, return_counts=True)
        caption_of, grams = np.divmod(counted, len(distinct))
        norms = np.sqrt(np.bincount(caption_of, (tf * idf[grams]) ** 2, count))

        # Look up each known n-gram of a caption in each reference of its photo. `pair` and `gram`
        # are the pair and the n-gram of each lookup, at first of all, then of those that succeed.
        known_only = known[grams]
        caption_of, tf = caption_of[known_only], tf[known_only]
        places = places[grams[known_only]]
        offsets = np.searchsorted(caption_of, np.arange(count + 1))
        pair, gram = expand_ranges(offsets, pairs.captions)
        wanted = pairs.references[pair] * len(self.keys) + places[gram]
        entries, found = find_sorted(self.entries, wanted)
        pair, gram, reference_tf = pair[found], gram[found], self.counts[entries[found]]
        products = np.minimum(tf[gram], reference_tf) * reference_tf * self.idf[places[gram]] ** 2
        dots = np.bincount(pair, products, len(pairs.captions))
        lengths = norms[pairs.captions] * self.norms[pairs.references]
        cosines = np.divide(dots, lengths, out=np.zeros(len(dots)), where=lengths > 0)
        most = np.zeros(len(tf), reference_tf.dtype)  # in any one reference of the photo
        np.maximum.at(most, gram, reference_tf)
        matches = np.bincount(caption_of, np.minimum(tf, most), count)
        return matches.astype(np.float64), cosines


class ReferenceNgrams:
    """The n-grams of the references of N photos, to score captions against."""

    def __init__(self, references: Sentences, photo_offsets: NDArray[np.int64]) -> None:
        """references: of each photo in turn. photo_offsets: (N + 1,) the references of photo p are
        those from photo_offsets[p] to photo_offsets[p + 1], at least one.

        COCO (5 million words) takes 3 s and, temporarily, 0.8 GB.
        """
        per_photo = np.diff(photo_offsets)
        if (per_photo < 1).any():
            raise ValueError("a photo without references")
        self._photo_offsets = photo_offsets
        self._lengths = references.lengths
        photo_of = np.repeat(np.arange(len(per_photo)), per_photo)
        self._tables = [
            _build_table(keys, reference_of, photo_of) for keys, reference_of in references.ngrams()
        ]

    def score(
        self, photos: NDArray[np.int64], captions: Sentences
    ) -> tuple[BleuStatistics, NDArray[np.float64]]:
        """BLEU's statistics and CIDEr-D (M,), 0 to 10, of M captions.

        photos: (M,) the photo of each caption, 0 … N - 1.
        """
        if len(photos) != len(captions):
            raise ValueError(f"{len(captions)} captions for {len(photos)} photos")
        pairs = _Pairs(*expand_ranges(self._photo_offsets, photos))
        lengths = captions.lengths
        correct = np.zeros((len(captions), ORDERS))
        cosines = np.zeros(len(pairs.captions))
        for n, (table, ngrams) in enumerate(zip(self._tables, captions.ngrams(), strict=True)):
            correct[:, n], order_cosines = table.compare(*ngrams, len(captions), pairs)
            cosines += order_cosines
        gaps = lengths[pairs.captions] - self._lengths[pairs.references]
        scores = cosines * np.exp(-(gaps**2) / (2 * _SIGMA**2))
        sums = np.bincount(pairs.captions, scores, len(captions))
        statistics = BleuStatistics(
            correct=correct,
            guesses=np.maximum(lengths[:, None] - np.arange(ORDERS), 0).astype(np.float64),
            lengths=lengths.astype(np.float64),
            closest=self._closest(gaps, pairs),
        )
        return statistics, _SCALE / ORDERS * sums / np.diff(self._photo_offsets)[photos]

    def _closest(self, gaps: NDArray[np.int64], pairs: _Pairs) -> NDArray[np.float64]:
        """(M,) the reference length closest to the caption's, the shorter if two are as close."""
        if not len(gaps):
            return np.zeros(0)
        lengths = self._lengths[pairs.references]
        # One number compares gaps first, then lengths.
        base = int(lengths.max()) + 1
        first_pairs = np.flatnonzero(np.diff(pairs.captions, prepend=-1))
        best = np.minimum.reduceat(np.abs(gaps) * base + lengths, first_pairs)
        return (best % base).astype(np.float64)


def _build_table(
    keys: NDArray[np.uint64], reference_of: NDArray[np.int64], photo_of: NDArray[np.int64]
) -> _ReferenceTable:
    """keys: of all n-grams. reference_of: the reference of each. photo_of: (R,) the photo of each
    reference, ascending.
    """
    photos = int(photo_of[-1]) + 1 if len(photo_of) else 0
    distinct, grams = np.unique(keys, return_inverse=True)
    size = max(len(distinct), 1)
    entries, counts = np.unique(reference_of * size + grams, return_counts=True)
    reference_of, grams = np.divmod(entries, size)
    # Without `return_counts`, `unique` would hash instead of sort, which takes forty times as long.
    mentions, _ = np.unique(photo_of[reference_of] * size + grams, return_counts=True)
    log_photos = float(np.log(max(photos, 1)))
    idf = log_photos - np.log(np.bincount(mentions % size, minlength=len(distinct)))
    squares = (counts * idf[grams]) ** 2
    return _ReferenceTable(
        keys=distinct,
        idf=idf,
        unseen_idf=log_photos,
        entries=entries,
        counts=counts.astype(np.int32),
        norms=np.sqrt(np.bincount(reference_of, squares, len(photo_of))),
    )


def expand_ranges(
    offsets: NDArray[np.int64], chosen: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """List the positions from offsets[c] to offsets[c + 1] for each c of `chosen`.

    Returns (index into `chosen`, position) for each: with offsets [0, 2, 5] and chosen [1, 0],
    these are [0, 0, 0, 1, 1] and [2, 3, 4, 0, 1].
    """
    starts = offsets[chosen]
    counts = offsets[chosen + 1] - starts
    index = np.repeat(np.arange(len(chosen)), counts)
    before = np.cumsum(counts) - counts
    return index, np.arange(len(index)) + (starts - before)[index]


def find_sorted(
    table: NDArray[np.generic], wanted: NDArray[np.generic]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(an index into the ascending table for each wanted value, whether the value is there)."""
    if not len(table):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    places = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return places, table[places] == wanted
