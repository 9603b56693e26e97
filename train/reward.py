"""CIDEr-D of sampled captions, as the reward of self-critical training.

The score is that of Vedantam et al. (2015), "CIDEr: Consensus-based image description evaluation",
section 6.1, and equals pycocoevalcap's (called `Cider` there): tf-idf vectors of 1- to 4-grams,
counts clipped to the reference's, cosine, a Gaussian penalty on the difference in length (sigma 6),
the mean over orders and references, times 10. As in Rennie et al. (2017), "Self-critical sequence
training", and the public code after it, document frequencies come from the training captions, a
document being all captions of one photo, and `<end>` is a word: without it, sentences that break
off ("a dog on a") would cost nothing.

Everything here is word numbers and arrays. An n-gram is one integer, its words the digits; tables
are sorted arrays; sums over n-grams are `bincount`s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.vocab import END, PAD

_ORDERS = 4
_SIGMA = 6.0  # words
_SCALE = 10.0


@dataclass(frozen=True)
class _Grams:
    """The n-grams of all references for one n. G distinct ones, R references, E entries."""

    keys: NDArray[np.uint64]  # (G,) ascending
    idf: NDArray[np.float64]  # (G,)
    unseen_idf: float  # of an n-gram that no reference has
    offsets: NDArray[np.int64]  # (R + 1,) cuts the entries by reference
    grams: NDArray[np.int32]  # (E,) numbers into `keys`, each once a reference
    counts: NDArray[np.int32]  # (E,) how often the reference has it
    norms: NDArray[np.float64]  # (R,) length of the reference's tf-idf vector

    def cosines(
        self,
        keys: NDArray[np.uint64],
        owners: NDArray[np.int64],
        samples: NDArray[np.int64],
        references: NDArray[np.int64],
        count: int,
    ) -> NDArray[np.float64]:
        """(P,) clipped cosine of samples[p] and references[p].

        keys, owners: the n-grams of all `count` samples, and which sample each is of.
        """
        if not len(keys) or not len(self.keys):
            return np.zeros(len(samples))
        distinct, places = np.unique(keys, return_inverse=True)
        numbers, known = _find(self.keys, distinct)
        idf = np.where(known, self.idf[numbers], self.unseen_idf)
        cells, tf = np.unique(owners * len(distinct) + places, return_counts=True)
        squares = (tf * idf[cells % len(distinct)]) ** 2
        norms = np.sqrt(np.bincount(cells // len(distinct), squares, count))

        # Every entry of every pair's reference, if any sample of the batch has its n-gram …
        pairs, entries = _ranges(self.offsets, references)
        found, here = _find(numbers[known], self.grams[entries])
        pairs, entries = pairs[here], entries[here]
        places = np.flatnonzero(known)[found[here]]
        # … and if the pair's own sample has it.
        found, here = _find(cells, samples[pairs] * len(distinct) + places)
        pairs, entries, tf = pairs[here], entries[here], tf[found[here]]
        theirs = self.counts[entries]
        products = np.minimum(tf, theirs) * theirs * self.idf[self.grams[entries]] ** 2
        dots = np.bincount(pairs, products, len(samples))
        lengths = norms[samples] * self.norms[references]
        return np.divide(dots, lengths, out=np.zeros(len(dots)), where=lengths > 0)


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
        evaluation drops. COCO (5 million words) takes 3 s and, for a while, 0.8 GB.
        """
        # Digits of a number: exact up to 65,535 words. A larger vocabulary overflows, and two
        # n-grams then share a key about once in 2^64 pairs.
        self._base = np.uint64(vocab_size | 1)
        self._vocab_size = vocab_size
        self._skipped = np.zeros(vocab_size, bool)
        self._skipped[list(skipped)] = True
        order = np.argsort(photos, kind="stable")
        self._photos, firsts = np.unique(photos[order], return_index=True)
        self._first = np.append(firsts, len(order))  # of each photo's references
        flat, cuts = self._sentences(*_with_end(words, offsets, order))
        self._lengths = np.diff(cuts)
        photo_of = np.repeat(np.arange(len(self._photos)), np.diff(self._first))
        self._orders = [
            self._table(keys, owners, photo_of) for keys, owners in _ngrams(flat, cuts, self._base)
        ]

    def _table(
        self, keys: NDArray[np.uint64], owners: NDArray[np.int64], photo_of: NDArray[np.int64]
    ) -> _Grams:
        distinct, grams = np.unique(keys, return_inverse=True)
        size = max(len(distinct), 1)
        cells, counts = np.unique(owners * size + grams, return_counts=True)
        owners, grams = np.divmod(cells, size)
        # Asked for counts, `unique` sorts; else it hashes, forty times slower at this size.
        mentions, _ = np.unique(photo_of[owners] * size + grams, return_counts=True)
        log_photos = float(np.log(len(self._photos)))
        idf = log_photos - np.log(np.bincount(mentions % size, minlength=len(distinct)))
        squares = (counts * idf[grams]) ** 2
        return _Grams(
            keys=distinct,
            idf=idf,
            unseen_idf=log_photos,
            offsets=np.searchsorted(owners, np.arange(len(photo_of) + 1)),
            grams=grams.astype(np.int32),
            counts=counts.astype(np.int32),
            norms=np.sqrt(np.bincount(owners, squares, len(photo_of))),
        )

    def score(self, photos: NDArray[np.int64], samples: NDArray[np.integer]) -> NDArray[np.float64]:
        """(M,) CIDEr-D of each sample, 0 to 10.

        photos: (M,) as given to the constructor; samples: (M, T) words, a sentence ending with its
        first `<end>` or before its first `<pad>`. Raises ValueError for a photo without references
        or a word outside the vocabulary.
        """
        rows, known = _find(self._photos, photos)
        if not known.all():
            raise ValueError(f"photo {photos[~known][0]} has no references")
        if samples.size and not 0 <= samples.min() <= samples.max() < self._vocab_size:
            raise ValueError(f"a word is outside the vocabulary of {self._vocab_size:,}")
        flat, cuts = self._sentences(*_until_end(samples))
        sample_of, references = _ranges(self._first, rows)
        gaps = np.diff(cuts)[sample_of] - self._lengths[references]
        cosines = np.zeros(len(references))
        for grams, (keys, owners) in zip(
            self._orders, _ngrams(flat, cuts, self._base), strict=True
        ):
            cosines += grams.cosines(keys, owners, sample_of, references, len(samples))
        scores = cosines * np.exp(-(gaps**2) / (2 * _SIGMA**2))
        sums = np.bincount(sample_of, scores, len(samples))
        return _SCALE / _ORDERS * sums / np.diff(self._first)[rows]

    def _sentences(
        self, flat: NDArray[np.int64], cuts: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Flat words and where to cut them, without the skipped ones."""
        kept = ~self._skipped[flat]
        before = np.zeros(len(flat) + 1, np.int64)
        np.cumsum(kept, out=before[1:])
        return flat[kept], before[cuts]


def _with_end(
    words: NDArray[np.int32], offsets: NDArray[np.int64], order: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The sentences in this order, each with `<end>`."""
    cuts = np.zeros(len(order) + 1, np.int64)
    np.cumsum(np.diff(offsets)[order] + 1, out=cuts[1:])
    flat = np.full(cuts[-1], END, np.int64)
    is_word = np.ones(len(flat), bool)
    is_word[cuts[1:] - 1] = False
    flat[is_word] = words[_ranges(offsets, order)[1]]
    return flat, cuts


def _until_end(samples: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The sentences of padded samples (M, T): up to and with `<end>`, or up to `<pad>`."""
    stops = (samples == END) | (samples == PAD)
    ended = np.cumsum(stops, axis=1)
    kept = (ended == 0) | ((ended == 1) & (samples == END))
    cuts = np.zeros(len(samples) + 1, np.int64)
    np.cumsum(kept.sum(1), out=cuts[1:])
    return samples[kept].astype(np.int64), cuts


def _ngrams(
    flat: NDArray[np.int64], cuts: NDArray[np.int64], base: np.uint64
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
    """For n from 1 to 4: the key of every n-gram, and the sentence it is in."""
    lengths = np.diff(cuts)
    owners = np.repeat(np.arange(len(lengths)), lengths)
    left = cuts[1:][owners] - np.arange(len(flat))  # words from here to the sentence's end
    words = flat.astype(np.uint64)
    starts = np.arange(len(flat))
    keys = np.zeros(len(flat), np.uint64)
    for n in range(1, _ORDERS + 1):
        fits = left[starts] >= n
        starts, keys = starts[fits], keys[fits]
        keys = keys * base + words[starts + (n - 1)]
        yield keys, owners[starts]


def _ranges(
    offsets: NDArray[np.int64], chosen: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All positions offsets[c] … offsets[c + 1] of each chosen c, and whose each is (0, 1, …)."""
    starts = offsets[chosen]
    counts = offsets[chosen + 1] - starts
    whose = np.repeat(np.arange(len(chosen)), counts)
    before = np.cumsum(counts) - counts
    return whose, np.arange(len(whose)) + (starts - before)[whose]


def _find(
    table: NDArray[np.generic], wanted: NDArray[np.generic]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(a place in the ascending table for each wanted value, whether the value is there)."""
    if not len(table):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    places = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return places, table[places] == wanted
