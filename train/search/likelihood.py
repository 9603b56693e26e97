"""How likely a sentence is for each of many photos, and for which photos it is likeliest.

The photos of a sentence are those that give it the highest probability (Vinyals et al., 2015, «Show
and Tell», section 4.3.3: ranking). A photo costs a softmax over all words for each word of the
sentence, which is nearly all of the work. A log-probability is at most 0, so the sum over the first
words is a bound for the whole sentence: as soon as it is below the last of the best so far, the
photo is out. That leaves the result as it is and saves most of the later words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.model.decoder import CaptionDecoder

_LOGITS_BYTES = 1 << 22  # of a piece, which stays in the processor's cache for the softmax
# A bound in float32 may lie this much below the sum that it bounds.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Likeliest:
    """The rows with the highest log-probabilities, best first; equals by ascending row."""

    rows: NDArray[np.int64]  # (K,)
    log_probs: NDArray[np.float32]  # (K,)


@torch.inference_mode()
def log_likelihoods(
    decoder: CaptionDecoder, features: Tensor, words: Sequence[int], floor: float = -torch.inf
) -> Tensor:
    """(N,) float32: the log-probability of a sentence for each photo; -inf for those below `floor`.

    decoder: in eval mode. features: (N, D) on its device. words: numbers of the vocabulary, and
    `<end>` if the sentence is to end there; otherwise it is the beginning of a caption.
    """
    count = len(features)
    total = torch.full((count,), -torch.inf, device=features.device)
    rows = torch.arange(count, device=features.device)
    inputs, state, sums = decoder.read_photo(features), None, torch.zeros_like(total)
    for place, word in enumerate(words):
        hidden, state = decoder.step_hidden(inputs, state)
        sums = sums + _log_probs(decoder, hidden, word)
        likely = sums >= floor - _ROUNDING
        if not bool(likely.all()):
            index = likely.nonzero()[:, 0]
            rows, sums, state = rows[index], sums[index], state.rows(index)
            if not len(rows):
                return total
        if place + 1 < len(words):
            number = torch.tensor([word], device=features.device)
            inputs = decoder.embed(number).expand(len(rows), -1)
    total[rows] = sums
    return total


@torch.inference_mode()
def word_log_probs(decoder: CaptionDecoder, features: Tensor, words: Sequence[int]) -> Tensor:
    """(N, T) float32: the log-probability of each word for each photo, given the words before it.

    decoder: in eval mode. features: (N, D) on its device. words: T numbers of the vocabulary.
    """
    given = torch.tensor(words, device=features.device)
    inputs = given[None, :-1].expand(len(features), -1)
    hidden = decoder.hidden(features, inputs)  # (N, T, H)
    places = [_log_probs(decoder, hidden[:, place], word) for place, word in enumerate(words)]
    return torch.stack(places, dim=1)


def _log_probs(decoder: CaptionDecoder, hidden: Tensor, word: int) -> Tensor:
    """(B, H) outputs of the LSTM → (B,) log-probability of this word."""
    rows = max(1, _LOGITS_BYTES // (4 * decoder.config.vocab_size))
    pieces = hidden.split(rows)
    return torch.cat([decoder.logits(piece).float().log_softmax(1)[:, word] for piece in pieces])


def likeliest(
    decoder: CaptionDecoder,
    blocks: Iterable[tuple[NDArray[np.int64], Tensor]],
    words: Sequence[int],
    count: int,
) -> Likeliest:
    """The `count` photos for which a sentence is likeliest.

    blocks: (rows (B,), their features (B, D) on the decoder's device), such as parts of a cache.
    words: as for `log_likelihoods`.
    """
    best = np.empty(0, np.float32)
    of = np.empty(0, np.int64)
    for rows, features in blocks:
        floor = float(best[-1]) if len(best) == count else -torch.inf
        found = log_likelihoods(decoder, features, words, floor).cpu().numpy()
        best, of = np.concatenate([best, found]), np.concatenate([of, rows])
        order = np.lexsort((of, -best))[:count]
        best, of = best[order], of[order]
    return Likeliest(of, best)
