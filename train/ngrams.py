"""BLEU and CIDEr of one caption a photo against references that stay: indexed once, scored often.

The same numbers as pycocoevalcap's scorers, whose dictionaries cost seconds and gigabytes at COCO's
size, from sorted arrays of n-gram numbers (`tests/test_ngrams.py` holds the two together).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

ORDERS = 4
_WORD_BITS = 31  # an n-gram's key: the number of its first n - 1 words, then its last word
_UNKNOWN = -1  # an n-gram of no reference
_SIGMA = 6.0  # of CIDEr-D's length penalty
_TINY, _SMALL = 1e-15, 1e-9  # pycocoevalcap's guards against dividing by nothing


@dataclass(frozen=True)
class BleuStatistics:
    """What corpus BLEU is made of, photo by photo: all of it adds up."""

    correct: NDArray[np.float64]  # (N, 4) clipped matches of 1- to 4-grams
    guesses: NDArray[np.float64]  # (N, 4) n-grams of the caption
    lengths: NDArray[np.float64]  # (N,) words of the caption
    closest: NDArray[np.float64]  # (N,) words of the reference closest in length

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
    """BLEU-1 to 4 (…, 4) of summed statistics (…, 4), (…, 4), (…,), (…,): Papineni et al. (2002).

    With pycocoevalcap's guards, so a corpus without a match scores about nothing, not nan.
    """
    precision = (correct + _TINY) / (guesses + _SMALL)
    geometric = np.cumprod(precision, -1) ** (1 / np.arange(1, ORDERS + 1))
    ratio = (lengths + _TINY) / (closest + _SMALL)
    brevity: NDArray[np.float64] = np.exp(np.minimum(0, 1 - 1 / ratio))
    scores: NDArray[np.float64] = geometric * brevity[..., None]
    return scores


@dataclass(frozen=True)
class _Counted:
    """How often each n-gram of one order stands in each caption; entries ordered by both."""

    captions: NDArray[np.int64]  # (E,)
    grams: NDArray[np.int64]  # (E,)
    counts: NDArray[np.float64]  # (E,)


@dataclass(frozen=True)
class _Order:
    """The references' n-grams of one order n. G distinct ones, numbered by their sorted keys."""

    keys: NDArray[np.int64]  # (G,)
    idf: NDArray[np.float64]  # (G,) log(photos / photos whose references have it)
    photo_entries: NDArray[np.int64]  # (P,) photo * G + gram, ascending
    most: NDArray[np.float64]  # (P,) the most often one reference of the photo has it
    caption_entries: NDArray[np.int64]  # (E,) reference * G + gram, ascending
    weights: NDArray[np.float64]  # (E,) tf-idf
    norms: NDArray[np.float64]  # (R,) of each reference's tf-idf vector

    def numbers(self, prefixes: NDArray[np.int64], words: NDArray[np.int64]) -> NDArray[np.int64]:
        """Gram numbers of (number of the first n - 1 words, last word); or _UNKNOWN."""
        known, at = _find(self.keys, prefixes << _WORD_BITS | words)
        return np.where(known & (prefixes != _UNKNOWN), at, _UNKNOWN)


class ReferenceNgrams:
    """The n-grams of the references of N photos.

    references: for each photo its captions (one or more), tokens separated by spaces. CIDEr's
    document frequencies come from these references, as in the official evaluation.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        if not all(references):
            raise ValueError("a photo without references")
        self._photos = len(references)
        per_photo = np.array([len(captions) for captions in references], np.int64)
        self._first = np.cumsum(per_photo) - per_photo  # (N,) the photo's first reference
        self._per_photo = per_photo
        self._numbers: dict[str, int] = {}
        words, lengths = _flat_words(chain.from_iterable(references), self._numbers)
        self._lengths = lengths  # (R,)
        photo_of = np.repeat(np.arange(self._photos), per_photo)  # (R,)
        caption_of = np.repeat(np.arange(len(lengths)), lengths)
        left = _words_left(lengths)
        grams = np.zeros(len(words), np.int64)  # of order 0: the empty one
        self._orders: list[_Order] = []
        for n in range(1, ORDERS + 1):
            starts = np.flatnonzero(left >= n)
            spelled = grams[starts] << _WORD_BITS | words[starts + n - 1]
            keys, inverse = np.unique(spelled, return_inverse=True)
            grams[starts] = inverse
            counted = _count(caption_of[starts], inverse.astype(np.int64), len(keys))
            self._orders.append(_index(keys, counted, photo_of, self._photos))

    def score(self, captions: Sequence[str]) -> tuple[BleuStatistics, NDArray[np.float64]]:
        """BLEU's statistics and the CIDEr-D (N,) of one tokenized caption for each photo.

        CIDEr is on pycocoevalcap's scale: 10 for a photo whose references are the caption.
        """
        if len(captions) != self._photos:
            raise ValueError(f"{len(captions)} captions for {self._photos} photos")
        fresh = dict(self._numbers)  # words of no reference get numbers too, for their counts
        words, lengths = _flat_words(captions, fresh)
        photo_of = np.repeat(np.arange(self._photos), lengths)
        left = _words_left(lengths)
        own = np.zeros(len(words), np.int64)  # numbers among these captions' n-grams
        known = np.zeros(len(words), np.int64)  # numbers among the references'
        correct = np.zeros((self._photos, ORDERS))
        similarity = np.zeros(len(self._lengths))  # (R,) summed over the orders
        for n, order in enumerate(self._orders, 1):
            starts = np.flatnonzero(left >= n)
            last = words[starts + n - 1]
            keys, places, inverse = np.unique(
                own[starts] << _WORD_BITS | last, return_index=True, return_inverse=True
            )
            among_references = order.numbers(known[starts[places]], last[places])
            own[starts], known[starts] = inverse, among_references[inverse]
            counted = _count(photo_of[starts], inverse.astype(np.int64), len(keys))
            entries = among_references[counted.grams]
            correct[:, n - 1] = self._matches(order, counted, entries)
            similarity += self._similarity(order, counted, entries)
        # pycocoevalcap measures the gap of lengths in 2-grams.
        gap = np.repeat(np.maximum(lengths - 1, 0), self._per_photo) - np.maximum(
            self._lengths - 1, 0
        )
        similarity *= np.exp(-(gap**2) / (2 * _SIGMA**2))
        cider = np.add.reduceat(similarity, self._first) / self._per_photo * (10 / ORDERS)
        statistics = BleuStatistics(
            correct=correct,
            guesses=np.maximum(lengths[:, None] - np.arange(ORDERS), 0).astype(np.float64),
            lengths=lengths.astype(np.float64),
            closest=self._closest(lengths),
        )
        return statistics, cider

    def _matches(
        self, order: _Order, counted: _Counted, grams: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """(N,) the captions' n-grams, each counted at most as often as one reference has it."""
        found, at = _find(order.photo_entries, counted.captions * len(order.keys) + grams)
        found &= grams != _UNKNOWN
        matches = np.minimum(counted.counts[found], order.most[at[found]])
        return _sum_by(counted.captions[found], matches, self._photos)

    def _similarity(
        self, order: _Order, counted: _Counted, grams: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """(R,) clipped tf-idf cosine of each reference with its photo's caption."""
        # A word of no reference is as rare as can be.
        idf = np.full(len(grams), np.log(float(self._photos)))
        idf[grams != _UNKNOWN] = order.idf[grams[grams != _UNKNOWN]]
        weights = counted.counts * idf
        norms = np.sqrt(_sum_by(counted.captions, weights**2, self._photos))
        # Every known n-gram of a caption is looked for in each of its photo's references.
        entries = np.flatnonzero(grams != _UNKNOWN)
        repeats = self._per_photo[counted.captions[entries]]
        entries = np.repeat(entries, repeats)
        nth = np.arange(len(entries)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        reference = self._first[counted.captions[entries]] + nth
        found, at = _find(order.caption_entries, reference * len(order.keys) + grams[entries])
        theirs = order.weights[at[found]]
        products = np.minimum(weights[entries[found]], theirs) * theirs
        dots = _sum_by(reference[found], products, len(self._lengths))
        scale = np.repeat(norms, self._per_photo) * order.norms
        np.divide(dots, scale, out=dots, where=scale != 0)  # without a norm there is no product
        return dots

    def _closest(self, lengths: NDArray[np.int64]) -> NDArray[np.float64]:
        """(N,) length of the reference closest to the caption's, the shorter of two as close."""
        gaps = np.abs(self._lengths - np.repeat(lengths, self._per_photo))
        base = int(self._lengths.max(initial=0)) + 1
        best = np.minimum.reduceat(gaps * base + self._lengths, self._first)
        return (best % base).astype(np.float64)


def _flat_words(
    captions: Iterable[str], numbers: dict[str, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(all words as numbers, words of each caption); new words are added to `numbers`."""
    flat: list[int] = []
    lengths = []
    for caption in captions:
        words = caption.split()
        lengths.append(len(words))
        flat.extend([numbers.setdefault(word, len(numbers)) for word in words])
    return np.array(flat, np.int64), np.array(lengths, np.int64)


def _words_left(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """For every word of every caption: how many words there are from it to the caption's end."""
    ends = np.cumsum(lengths)
    return np.repeat(ends, lengths) - np.arange(int(lengths.sum()))


def _count(captions: NDArray[np.int64], grams: NDArray[np.int64], distinct: int) -> _Counted:
    entries, counts = np.unique(captions * distinct + grams, return_counts=True)
    captions, grams = np.divmod(entries, max(distinct, 1))
    return _Counted(captions, grams, counts.astype(np.float64))


def _index(
    keys: NDArray[np.int64], counted: _Counted, photo_of: NDArray[np.int64], photos: int
) -> _Order:
    distinct = len(keys)
    entries = photo_of[counted.captions] * distinct + counted.grams
    photo_entries, inverse = np.unique(entries, return_inverse=True)
    most = np.zeros(len(photo_entries))
    np.maximum.at(most, inverse, counted.counts)
    frequency = np.bincount(photo_entries % max(distinct, 1), minlength=distinct)
    idf = np.log(float(photos)) - np.log(np.maximum(1.0, frequency))
    weights = counted.counts * idf[counted.grams]
    return _Order(
        keys=keys,
        idf=idf,
        photo_entries=photo_entries,
        most=most,
        caption_entries=counted.captions * distinct + counted.grams,
        weights=weights,
        norms=np.sqrt(_sum_by(counted.captions, weights**2, len(photo_of))),
    )


def _sum_by(
    groups: NDArray[np.int64], values: NDArray[np.float64], count: int
) -> NDArray[np.float64]:
    """(count,) the sum of the values of each group."""
    # Of nothing, bincount makes integers.
    return np.bincount(groups, values, count).astype(np.float64, copy=False)


def _find(
    ordered: NDArray[np.int64], wanted: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """(whether each is there, where)."""
    at = np.minimum(np.searchsorted(ordered, wanted), max(len(ordered) - 1, 0))
    if not len(ordered):
        return np.zeros(len(wanted), np.bool_), at
    return ordered[at] == wanted, at
