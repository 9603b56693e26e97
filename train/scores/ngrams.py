"""BLEU and CIDEr-D against references that stay: their n-grams indexed once, scored often.

Validation scores one caption of every photo after each epoch, self-critical training many samples
of a few photos at each step. The numbers are pycocoevalcap's (`tests/train/test_ngrams.py` holds
the two together), whose dictionaries cost seconds and gigabytes at COCO's size.

CIDEr-D is that of Vedantam et al. (2015), "CIDEr: Consensus-based image description evaluation",
section 6.1: tf-idf vectors of 1- to 4-grams, counts clipped to the reference's, cosine, a Gaussian
penalty on the difference in length (sigma 6), the mean over orders and references, times 10.
Document frequencies are those of the references, a document being all references of one photo.

Words are numbers, an n-gram is one integer; tables are sorted arrays; sums are `bincount`s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.scores.bleu import ORDERS, BleuStatistics

# An n-gram's key is a polynomial of its words at this number, modulo 2^64. Chosen among those of
# L'Ecuyer (1999), "Tables of linear congruential generators of different sizes and good lattice
# structure", because no two 4-grams of a vocabulary of 50,000 words share a key (the shortest
# vector of its lattice says so); of a larger one, two do about once in 2^64 pairs.
_MULTIPLIER = np.uint64(3935559000370003845)
_SIGMA = 6.0  # words
_SCALE = 10.0


@dataclass(frozen=True)
class Sentences:
    """Word numbers of S sentences, one after the other."""

    words: NDArray[np.int64]  # all of them; the numbers are 0 or more
    cuts: NDArray[np.int64]  # (S + 1,) sentence s is words[cuts[s] : cuts[s + 1]]

    def __len__(self) -> int:
        return len(self.cuts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(S,) words of each."""
        return np.diff(self.cuts)

    def ngrams(self) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
        """For n from 1 to 4: the key of every n-gram, and the sentence it is in."""
        owners = np.repeat(np.arange(len(self)), self.lengths)
        left = self.cuts[1:][owners] - np.arange(len(owners))  # words to the sentence's end
        words = self.words.astype(np.uint64)
        starts = np.arange(len(owners))
        keys = np.zeros(len(owners), np.uint64)
        for n in range(1, ORDERS + 1):
            fits = left[starts] >= n
            starts, keys = starts[fits], keys[fits]
            keys = keys * _MULTIPLIER + words[starts + (n - 1)]
            yield keys, owners[starts]


def number_words(captions: Iterable[str], numbers: dict[str, int]) -> Sentences:
    """Captions of words between spaces. New words are added to `numbers`."""
    words: list[int] = []
    cuts = [0]
    for caption in captions:
        words += [numbers.setdefault(word, len(numbers)) for word in caption.split()]
        cuts.append(len(words))
    return Sentences(np.array(words, np.int64), np.array(cuts, np.int64))


@dataclass(frozen=True)
class _Pairs:
    """P pairs of a caption and one of its photo's references."""

    captions: NDArray[np.int64]  # (P,)
    references: NDArray[np.int64]  # (P,)


@dataclass(frozen=True)
class _Order:
    """The references' n-grams for one n. G distinct ones, R references, E entries."""

    keys: NDArray[np.uint64]  # (G,) ascending
    idf: NDArray[np.float64]  # (G,) log(photos / photos whose references have it)
    unseen_idf: float  # of an n-gram that no reference has
    entries: NDArray[np.int64]  # (E,) reference * G + number into `keys`, ascending
    counts: NDArray[np.int32]  # (E,) how often the reference has it
    norms: NDArray[np.float64]  # (R,) length of the reference's tf-idf vector

    def compare(
        self, keys: NDArray[np.uint64], owners: NDArray[np.int64], count: int, pairs: _Pairs
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(count,) matches of each caption, and (P,) clipped cosine of each pair.

        keys, owners: the n-grams of all `count` captions, and which caption each is of. An n-gram
        matches at most as often as one reference of its photo has it.
        """
        if not len(keys) or not len(self.keys):
            return np.zeros(count), np.zeros(len(pairs.captions))
        distinct, places = np.unique(keys, return_inverse=True)
        numbers, known = find(self.keys, distinct)
        idf = np.where(known, self.idf[numbers], self.unseen_idf)
        cells, tf = np.unique(owners * len(distinct) + places, return_counts=True)
        owners, places = np.divmod(cells, len(distinct))
        norms = np.sqrt(np.bincount(owners, (tf * idf[places]) ** 2, count))

        # Every known n-gram of a caption is looked for in each of its photo's references.
        own = np.flatnonzero(known[places])
        grams = numbers[places[own]]
        offsets = np.searchsorted(owners[own], np.arange(count + 1))
        whose, cells = ranges(offsets, pairs.captions)
        entries, here = find(self.entries, pairs.references[whose] * len(self.keys) + grams[cells])
        whose, cells, theirs = whose[here], cells[here], self.counts[entries[here]]
        products = np.minimum(tf[own[cells]], theirs) * theirs * self.idf[grams[cells]] ** 2
        dots = np.bincount(whose, products, len(pairs.captions))
        lengths = norms[pairs.captions] * self.norms[pairs.references]
        cosines = np.divide(dots, lengths, out=np.zeros(len(dots)), where=lengths > 0)
        most = np.zeros(len(own), theirs.dtype)  # by any reference of the photo
        np.maximum.at(most, cells, theirs)
        matches = np.bincount(owners[own], np.minimum(tf[own], most), count)
        return matches.astype(np.float64), cosines


class ReferenceNgrams:
    """The n-grams of the references of N photos."""

    def __init__(self, references: Sentences, firsts: NDArray[np.int64]) -> None:
        """references: photo by photo; firsts: (N + 1,) cuts them by photo, none without any.

        COCO (5 million words) takes 3 s and, for a while, 0.8 GB.
        """
        per_photo = np.diff(firsts)
        if (per_photo < 1).any():
            raise ValueError("a photo without references")
        self._firsts = firsts
        self._lengths = references.lengths
        photo_of = np.repeat(np.arange(len(per_photo)), per_photo)
        self._orders = [_index(keys, owners, photo_of) for keys, owners in references.ngrams()]

    def score(
        self, photos: NDArray[np.int64], captions: Sentences
    ) -> tuple[BleuStatistics, NDArray[np.float64]]:
        """BLEU's statistics and the CIDEr-D (M,), 0 to 10, of M captions.

        photos: (M,) which photo, 0 … N - 1, each caption is of.
        """
        if len(photos) != len(captions):
            raise ValueError(f"{len(captions)} captions for {len(photos)} photos")
        pairs = _Pairs(*ranges(self._firsts, photos))
        lengths = captions.lengths
        correct = np.zeros((len(captions), ORDERS))
        cosines = np.zeros(len(pairs.captions))
        for n, (order, ngrams) in enumerate(zip(self._orders, captions.ngrams(), strict=True)):
            correct[:, n], similar = order.compare(*ngrams, len(captions), pairs)
            cosines += similar
        gaps = lengths[pairs.captions] - self._lengths[pairs.references]
        scores = cosines * np.exp(-(gaps**2) / (2 * _SIGMA**2))
        sums = np.bincount(pairs.captions, scores, len(captions))
        statistics = BleuStatistics(
            correct=correct,
            guesses=np.maximum(lengths[:, None] - np.arange(ORDERS), 0).astype(np.float64),
            lengths=lengths.astype(np.float64),
            closest=self._closest(gaps, pairs),
        )
        return statistics, _SCALE / ORDERS * sums / np.diff(self._firsts)[photos]

    def _closest(self, gaps: NDArray[np.int64], pairs: _Pairs) -> NDArray[np.float64]:
        """(M,) length of the reference closest to the caption's, the shorter of two as close."""
        if not len(gaps):
            return np.zeros(0)
        theirs = self._lengths[pairs.references]
        base = int(theirs.max()) + 1
        starts = np.flatnonzero(np.diff(pairs.captions, prepend=-1))
        best = np.minimum.reduceat(np.abs(gaps) * base + theirs, starts)
        return (best % base).astype(np.float64)


def _index(
    keys: NDArray[np.uint64], owners: NDArray[np.int64], photo_of: NDArray[np.int64]
) -> _Order:
    """photo_of: (R,) the photo of each reference, ascending."""
    photos = int(photo_of[-1]) + 1 if len(photo_of) else 0
    distinct, grams = np.unique(keys, return_inverse=True)
    size = max(len(distinct), 1)
    cells, counts = np.unique(owners * size + grams, return_counts=True)
    owners, grams = np.divmod(cells, size)
    # Asked for counts, `unique` sorts; else it hashes, forty times slower at this size.
    mentions, _ = np.unique(photo_of[owners] * size + grams, return_counts=True)
    log_photos = float(np.log(max(photos, 1)))
    idf = log_photos - np.log(np.bincount(mentions % size, minlength=len(distinct)))
    squares = (counts * idf[grams]) ** 2
    return _Order(
        keys=distinct,
        idf=idf,
        unseen_idf=log_photos,
        entries=cells,
        counts=counts.astype(np.int32),
        norms=np.sqrt(np.bincount(owners, squares, len(photo_of))),
    )


def ranges(
    offsets: NDArray[np.int64], chosen: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All positions offsets[c] … offsets[c + 1] of each chosen c, and whose each is (0, 1, …)."""
    starts = offsets[chosen]
    counts = offsets[chosen + 1] - starts
    whose = np.repeat(np.arange(len(chosen)), counts)
    before = np.cumsum(counts) - counts
    return whose, np.arange(len(whose)) + (starts - before)[whose]


def find(
    table: NDArray[np.generic], wanted: NDArray[np.generic]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(a place in the ascending table for each wanted value, whether the value is there)."""
    if not len(table):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    places = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return places, table[places] == wanted
