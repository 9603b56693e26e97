"""How likely a sentence is for each of many photos, and for which photos it is likeliest.

The photos of a sentence are those that give it the highest probability (Vinyals et al., 2015, «Show
and Tell», section 4.3.3: ranking). Three things make that fast and leave the result as it is:

- All photos read the same word at a step. Its part in the sums that enter the LSTM's gates is
  computed once, and the photo's own part, if it is read with every word, once for all words.
- A softmax over all words, for each photo and each word of the sentence, would be most of the work.
  A sum over the exponentials of some words is at most that over all, so a softmax over the first
  words of the vocabulary, the most frequent ones, gives an upper bound of a log-probability. It is
  computed first, and only photos whose bound is good enough get the whole softmax.
- A log-probability is at most 0, so the sum over the first words is a bound for the whole sentence:
  as soon as it is below the last of the best so far, the photo is out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train import private_torch
from train.model.decoder import CaptionDecoder, DecoderState

_LOGITS_BYTES = 1 << 22  # of a piece, which stays in the processor's cache for the softmax
_BOUND_WORDS = 1024  # with ids from 0 on, of which a first softmax is taken
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
    total = torch.full((len(features),), -torch.inf, device=features.device)
    photos = decoder.read_photo(features)
    rows = torch.arange(len(features), device=features.device)
    if floor > -torch.inf and decoder.config.vocab_size > 2 * _BOUND_WORDS:
        rows, _ = _summed(decoder, photos, rows, words, floor, _BOUND_WORDS)
        if not len(rows):
            return total
    rows, sums = _summed(decoder, photos, rows, words, floor, decoder.config.vocab_size)
    total[rows] = sums
    return total


def _summed(
    decoder: CaptionDecoder,
    photos: Tensor,
    rows: Tensor,
    words: Sequence[int],
    floor: float,
    softmax_words: int,
) -> tuple[Tensor, Tensor]:
    """(those of the rows that are not below the floor, their sums over the words).

    photos: (N, E), from `read_photo`. rows: (R,) of them. softmax_words: over how many words of the
    vocabulary the softmax is taken, from the first on, besides the word itself. If these are not
    all, the sums are upper bounds of the log-probabilities.
    """
    reader = _Reader(decoder)
    photos = photos[rows]
    sums = torch.zeros(len(rows), device=rows.device)
    hidden, state = decoder.step_hidden(photos, None)
    part = reader.photo_part(photos)
    for place, word in enumerate(words):
        if place:
            hidden, state = reader.read(words[place - 1], state, part)
        sums = sums + _log_probs(decoder, hidden, word, softmax_words)
        likely = sums >= floor - _ROUNDING
        if not bool(likely.all()):
            index = likely.nonzero()[:, 0]
            rows, sums, state = rows[index], sums[index], state.rows(index)
            part = None if part is None else part[index]
            if not len(rows):
                break
    return rows, sums


class _Reader:
    """The steps of a decoder in eval mode where all its captions read the same word."""

    def __init__(self, decoder: CaptionDecoder) -> None:
        self._decoder = decoder
        self._weights = decoder.lstm.all_weights  # of each layer: input, hidden, and two biases

    def photo_part(self, photos: Tensor) -> Tensor | None:
        """(B, E) photos → (B, 4H): what they add to the first layer's gates at every word."""
        if not self._decoder.config.photo_every_step:
            return None
        return _product(photos, self._weights[0][0])

    def read(
        self, word: int, state: DecoderState, photo_part: Tensor | None
    ) -> tuple[Tensor, DecoderState]:
        """The last layer's outputs (B, H) and the state after the word, as of `step_hidden`."""
        hiddens: list[Tensor] = []
        cells: list[Tensor] = []
        for layer, (of_inputs, of_hidden, *biases) in enumerate(self._weights):
            gates = _product(state.hidden[layer], of_hidden)
            if layer:
                gates += _product(hiddens[-1], of_inputs)
                gates += sum(biases)
            else:
                gates += self._decoder.embed.weight[word] @ of_inputs.t() + sum(biases)
                if photo_part is not None:
                    gates += photo_part
            i, f, g, o = gates.chunk(4, 1)
            cell = i.sigmoid_().mul_(g.tanh_()).addcmul_(f.sigmoid_(), state.cell[layer])
            cells.append(cell.clone())  # of its own memory, so that the gates can go
            hiddens.append(o.sigmoid_() * cell.tanh_())
        return hiddens[-1], DecoderState(torch.stack(hiddens), torch.stack(cells), state.photo)


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """inputs (B, K) @ weight (N, K)ᵀ + bias (N,), by the faster library on a CPU."""
    if inputs.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return private_torch.linear(inputs, weight.t(), bias)
    return torch.nn.functional.linear(inputs, weight, bias)


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


def _log_probs(
    decoder: CaptionDecoder, hidden: Tensor, word: int, softmax_words: int | None = None
) -> Tensor:
    """(B, H) outputs of the LSTM → (B,) log-probability of this word.

    softmax_words: see `_summed`; None for all words.
    """
    weight, bias = decoder.head.weight.detach(), decoder.head.bias.detach()
    if softmax_words is not None and softmax_words < len(weight):
        some_weight, some_bias = weight[:softmax_words], bias[:softmax_words]
        if word >= softmax_words:
            some_weight = torch.cat([some_weight, weight[word : word + 1]])
            some_bias = torch.cat([some_bias, bias[word : word + 1]])
            word = softmax_words
        weight, bias = some_weight, some_bias
    rows = max(1, _LOGITS_BYTES // (4 * len(weight)))
    pieces = decoder.transform(hidden).split(rows)
    return torch.cat([_product(piece, weight, bias).log_softmax(1)[:, word] for piece in pieces])


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
