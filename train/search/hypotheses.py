"""From features to sentences: greedy search, beam search and sampling, many photos at once.

A caption has one to `max_length` words and always ends in `<end>`: it cannot begin with it, and
after `max_length` words nothing else is allowed. Its score is the sum of its words'
log-probabilities, `<end>` included, divided by (number of words + 1) ** length_penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from train.captions.vocabulary import END
from train.config import SearchConfig, check_search
from train.model.decoder import CaptionDecoder
from train.search.beam import beam_search
from train.search.rollout import greedy, sample_scored


@dataclass(frozen=True)
class Hypothesis:
    """One caption found: its words (without `<end>`) and its score."""

    words: tuple[int, ...]
    score: float
    log_probs: tuple[float, ...] = ()  # of each word, then of <end>


def search(
    decoder: CaptionDecoder,
    features: Tensor,
    config: SearchConfig | None = None,
    *,
    batch_size: int = 128,
    numbers: Sequence[int] | None = None,
) -> list[Hypothesis]:
    """The best caption for each photo. features: (N, D), on the decoder's device.

    The decoder must be in eval mode. Always returns N hypotheses. Raises SearchError.
    """
    found = search_several(decoder, features, config, batch_size=batch_size, numbers=numbers)
    return [captions[0] for captions in found]


@torch.inference_mode()
def search_several(
    decoder: CaptionDecoder,
    features: Tensor,
    config: SearchConfig | None = None,
    *,
    batch_size: int = 128,
    numbers: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """The `config.captions` best different captions for each photo, best first.

    With groups, one of each group before a second one of any. When drawing, as many as drawn, equal
    ones too; numbers: (N,) one for each photo; what is drawn for a photo depends on its number and
    the seed alone. None: 0, 1, …. There is always one caption, but a vocabulary of a few words may
    not have more. Raises SearchError.
    """
    config = config or SearchConfig()
    check_search(config)
    found: list[list[Hypothesis]] = []
    numbers = range(len(features)) if numbers is None else numbers
    for start in range(0, len(features), batch_size):
        chunk = features[start : start + batch_size]
        if config.sample:
            found.extend(_sampled(decoder, chunk, config, numbers[start : start + batch_size]))
        elif config.beam_size == 1:
            words, log_probs = greedy(
                decoder,
                chunk,
                max_length=config.max_length,
                no_repeat_ngram=config.no_repeat_ngram,
            )
            found.extend([h] for h in _hypotheses(words, log_probs, config))
        else:
            found.extend(_beams(decoder, chunk, config))
    return found


def _beams(
    decoder: CaptionDecoder, features: Tensor, config: SearchConfig
) -> list[list[Hypothesis]]:
    found = beam_search(decoder, features, config)
    photos, groups, captions = found.scores.shape
    flat = iter(_hypotheses(found.words.flatten(0, 2), found.log_probs.flatten(0, 2), config))
    possible = (found.scores > float("-inf")).tolist()
    result = []
    for p in range(photos):
        of_groups = [
            [h for h in (next(flat) for _ in range(captions)) if possible[p][g].pop(0)]
            for g in range(groups)
        ]
        result.append(_best_first(of_groups, config.captions))
    return result


def _best_first(of_groups: list[list[Hypothesis]], captions: int) -> list[Hypothesis]:
    """The best of each group, by score, then their second ones, …: `captions` different ones."""
    chosen: dict[tuple[int, ...], Hypothesis] = {}
    for rank in zip_longest(*of_groups):
        for hypothesis in sorted((h for h in rank if h is not None), key=lambda h: -h.score):
            chosen.setdefault(hypothesis.words, hypothesis)
    return list(chosen.values())[:captions]


def _sampled(
    decoder: CaptionDecoder, features: Tensor, config: SearchConfig, numbers: Sequence[int]
) -> list[list[Hypothesis]]:
    shape = (config.captions, config.max_length + 1)
    uniform = np.stack([np.random.default_rng((config.seed, n)).random(shape) for n in numbers])
    words, log_probs = sample_scored(
        decoder,
        features,
        torch.from_numpy(uniform),
        temperature=config.temperature,
        top_p=config.top_p,
        max_length=config.max_length,
        no_repeat_ngram=config.no_repeat_ngram,
    )
    drawn = _hypotheses(words, log_probs, config)
    each = config.captions
    return [sorted(drawn[i : i + each], key=lambda h: -h.score) for i in range(0, len(drawn), each)]


def _hypotheses(words: Tensor, log_probs: Tensor, config: SearchConfig) -> list[Hypothesis]:
    """(B, T) words up to `<end>` and their log-probabilities → hypotheses."""
    lengths = (words == END).int().argmax(1)  # (B,)
    scores = log_probs.double().sum(1) / (lengths + 1) ** config.length_penalty
    return [
        Hypothesis(tuple(row[:length]), score, tuple(logs[: length + 1]))
        for row, logs, length, score in zip(
            words.tolist(), log_probs.tolist(), lengths.tolist(), scores.tolist(), strict=True
        )
    ]
