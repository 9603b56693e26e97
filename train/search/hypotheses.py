"""Captions for many photos at once, by greedy search, beam search or sampling.

A caption has one to `max_length` words and then `<end>`, which is forced after `max_length` words.
Its score is the sum of the log-probabilities of its words and `<end>`, divided by
(number of words + 1) ** length_penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from train.captions.vocabulary import END
from train.config import SearchConfig, check_search
from train.model.decoder import CaptionDecoder
from train.search.beam import beam_search
from train.search.rollout import greedy, sample_scored
from train.search.word_choice import IMPOSSIBLE


@dataclass(frozen=True)
class Hypothesis:
    """A caption that search found for a photo, and its score."""

    words: tuple[int, ...]  # numbers of the vocabulary, without <end>
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
    """The best caption for each of N photos; arguments and errors as in `search_several`."""
    found = search_several(decoder, features, config, batch_size=batch_size, numbers=numbers)
    return [hypotheses[0] for hypotheses in found]


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

    With groups of beams, the best caption of each group comes first, then their second ones, and so
    on. Samples may be equal to each other. There is at least one caption for each photo; more may
    be impossible with a vocabulary of a few words.

    decoder: in eval mode. features: (N, D) on its device. batch_size: photos searched at a time.
    numbers: (N,) a number for each photo, or None for 0, 1, …; together with the seed it determines
    the photo's samples. Raises SearchError.
    """
    config = config or SearchConfig()
    check_search(config)
    found: list[list[Hypothesis]] = []
    numbers = range(len(features)) if numbers is None else numbers
    for start in range(0, len(features), batch_size):
        batch = features[start : start + batch_size]
        if config.sample:
            found.extend(_sample(decoder, batch, config, numbers[start : start + batch_size]))
        elif config.beam_size == 1:
            words, log_probs = greedy(
                decoder,
                batch,
                max_length=config.max_length,
                no_repeat_ngram=config.no_repeat_ngram,
            )
            found.extend([h] for h in _hypotheses(words, log_probs, config))
        else:
            found.extend(_search_beams(decoder, batch, config))
    return found


def _search_beams(
    decoder: CaptionDecoder, features: Tensor, config: SearchConfig
) -> list[list[Hypothesis]]:
    found = beam_search(decoder, features, config)
    photos, groups, captions = found.scores.shape
    flat = _hypotheses(found.words.flatten(0, 2), found.log_probs.flatten(0, 2), config)
    exists = (found.scores > IMPOSSIBLE).flatten().tolist()
    ranked = [h if there else None for h, there in zip(flat, exists, strict=True)]
    by_group = [ranked[i : i + captions] for i in range(0, len(ranked), captions)]
    return [
        _best_of_groups(by_group[i : i + groups], config.captions)
        for i in range(0, photos * groups, groups)
    ]


def _best_of_groups(groups: list[list[Hypothesis | None]], count: int) -> list[Hypothesis]:
    """The best caption of each group, sorted by score, then their second ones, and so on.

    groups: best first, None where there are fewer captions. Returns `count` different captions.
    """
    chosen: dict[tuple[int, ...], Hypothesis] = {}
    for rank in zip(*groups, strict=True):
        for hypothesis in sorted((h for h in rank if h is not None), key=lambda h: -h.score):
            chosen.setdefault(hypothesis.words, hypothesis)
    return list(chosen.values())[:count]


def _sample(
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
    samples = _hypotheses(words, log_probs, config)
    count = config.captions
    return [
        sorted(samples[start : start + count], key=lambda h: -h.score)
        for start in range(0, len(samples), count)
    ]


def _hypotheses(words: Tensor, log_probs: Tensor, config: SearchConfig) -> list[Hypothesis]:
    """(B, T) words, which end with `<end>`, and their log-probabilities → B hypotheses."""
    lengths = (words == END).int().argmax(1)  # (B,)
    scores = log_probs.double().sum(1) / (lengths + 1) ** config.length_penalty
    return [
        Hypothesis(tuple(row[:length]), score, tuple(logs[: length + 1]))
        for row, logs, length, score in zip(
            words.tolist(), log_probs.tolist(), lengths.tolist(), scores.tolist(), strict=True
        )
    ]
