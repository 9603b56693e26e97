"""From features to sentences: greedy and beam search over many photos at once.

A caption has one to `max_length` words and always ends in `<end>`: it cannot begin with it, and
after `max_length` words nothing else is allowed. Its score is the sum of its words'
log-probabilities, `<end>` included, divided by (number of words + 1) ** length_penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.config import SearchConfig
from train.decoder import CaptionDecoder, State
from train.vocab import END, PAD, START, UNK

_NEVER = (PAD, START, UNK)  # <unk> says nothing to a reader
_IMPOSSIBLE = float("-inf")


@dataclass(frozen=True)
class Hypothesis:
    """One caption found: its words (without `<end>`) and its score."""

    words: tuple[int, ...]
    score: float


@torch.inference_mode()
def search(
    decoder: CaptionDecoder,
    features: Tensor,
    config: SearchConfig | None = None,
    *,
    batch_size: int = 128,
) -> list[Hypothesis]:
    """The best caption for each photo. features: (N, D), on the decoder's device.

    The decoder must be in eval mode. Always returns N hypotheses.
    """
    config = config or SearchConfig()
    found: list[Hypothesis] = []
    for chunk in features.split(batch_size) if len(features) else ():
        if config.beam_size == 1:
            found.extend(_greedy(decoder, chunk, config))
        else:
            found.extend(_beam(decoder, chunk, config))
    return found


def _log_probs(logits: Tensor, length: int, config: SearchConfig) -> Tensor:
    """(B, W) log-probabilities of the next word after `length` words."""
    log_probs = logits.float().log_softmax(-1)
    if length == config.max_length:
        ending = log_probs[:, END].clone()
        log_probs.fill_(_IMPOSSIBLE)
        log_probs[:, END] = ending
    else:
        log_probs[:, _NEVER if length else (*_NEVER, END)] = _IMPOSSIBLE
    return log_probs


def _greedy(
    decoder: CaptionDecoder, features: Tensor, config: SearchConfig
) -> Sequence[Hypothesis]:
    inputs, state = decoder.read_photo(features), None
    scores = torch.zeros(len(features), device=features.device)
    running = torch.ones(len(features), dtype=torch.bool, device=features.device)
    words = []
    for length in range(config.max_length + 1):
        logits, state = decoder.step(inputs, state)
        best, word = _log_probs(logits, length, config).max(-1)  # (B,), (B,)
        scores += torch.where(running, best, 0.0)
        words.append(torch.where(running, word, END))
        running &= word != END
        if not running.any():
            break
        inputs = decoder.embed(word)
    found = []
    for row, score in zip(torch.stack(words, 1).tolist(), scores.tolist(), strict=True):
        length = row.index(END)
        found.append(Hypothesis(tuple(row[:length]), score / (length + 1) ** config.length_penalty))
    return found


def _beam(decoder: CaptionDecoder, features: Tensor, config: SearchConfig) -> Sequence[Hypothesis]:
    """Beam search; every photo keeps `beam_size` unfinished captions.

    Of the 2K best extensions at most K are `<end>`, so K unfinished ones always remain. An `<end>`
    among the K best finishes a caption. A photo is done when K captions are finished, or when none
    of the unfinished can still beat the best finished one.
    """
    beams, device = config.beam_size, features.device
    count = len(features)
    best = [Hypothesis((), _IMPOSSIBLE)] * count
    finished = torch.zeros(count, dtype=torch.int64, device=device)
    best_score = torch.full((count,), _IMPOSSIBLE, device=device)
    photos = torch.arange(count, device=device)  # (P,) those still searched

    # The first step has one beam a photo; its extensions become the first K.
    logits, state = decoder.step(decoder.read_photo(features), None)
    sums = torch.zeros(count, 1, device=device)  # (P, K)
    words = torch.zeros(count, 1, 0, dtype=torch.int64, device=device)  # (P, K, length)
    for length in range(config.max_length + 1):
        live = sums.shape[1]
        extended = _log_probs(logits, length, config).view(len(photos), live, -1)
        extended = extended + sums.unsqueeze(-1)  # (P, K, W)
        vocab_size = extended.shape[-1]
        top, index = extended.flatten(1).topk(min(2 * beams, live * vocab_size), dim=1)
        parent = index.div(vocab_size, rounding_mode="floor")  # (P, 2K)
        word = index % vocab_size

        ends = (word == END) & (top > _IMPOSSIBLE)
        ends[:, beams:] = False
        normalized = top / (length + 1) ** config.length_penalty
        score, place = normalized.masked_fill(~ends, _IMPOSSIBLE).max(1)
        for p in (score > best_score[photos]).nonzero().flatten().tolist():
            caption = words[p, parent[p, place[p]]].tolist()
            best[int(photos[p])] = Hypothesis(tuple(caption), float(score[p]))
        best_score[photos] = torch.maximum(best_score[photos], score)
        finished[photos] += ends.sum(1)
        if length == config.max_length:
            break

        # The K best that go on. A log-probability is at most 0, so a caption's final score is at
        # most its sum so far over the longest possible length.
        top = top.masked_fill(word == END, _IMPOSSIBLE)
        sums, keep = top.topk(min(beams, top.shape[1]), dim=1)
        hope = sums[:, 0] / (config.max_length + 1) ** config.length_penalty
        going = (finished[photos] < beams) & (hope > best_score[photos])
        if not going.any():
            break
        parent, word = parent.gather(1, keep)[going], word.gather(1, keep)[going]
        sums, photos = sums[going], photos[going]
        words = torch.cat(
            [
                words[going].gather(1, parent.unsqueeze(-1).expand(-1, -1, length)),
                word.unsqueeze(-1),
            ],
            dim=2,
        )
        rows = (going.nonzero() * live + parent).flatten()  # the state's row of each kept beam
        state = _select(state, rows)
        logits, state = decoder.step(decoder.embed(word.flatten()), state)
    return best


def _select(state: State, rows: Tensor) -> State:
    hidden, cell = state
    return hidden[:, rows].contiguous(), cell[:, rows].contiguous()
