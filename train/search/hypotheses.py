"""Captions for many photos at once, by greedy search, beam search or sampling.

A caption has one to `max_length` words and then `<end>`, which is forced after `max_length` words.
Its score is the sum of the log-probabilities of its words and `<end>`, divided by
(number of words + 1) ** length_penalty.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from train.captions.vocabulary import END
from train.config import SearchConfig, check_search
from train.model.decoder import CaptionDecoder
from train.search.beam import beam_search
from train.search.packed_decoder import for_search
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
    others: int = 0,
) -> list[list[Hypothesis]]:
    """The `config.captions` best different captions for each photo, best first.

    With groups of beams, the best caption of each group comes first, then their second ones, and so
    on. A caption that another group has found as well is replaced by the next one of its group.
    Samples may be equal to each other. There is at least one caption for each photo; more may be
    impossible with a vocabulary of a few words.

    decoder: in eval mode. features: (N, D) on its device. batch_size: photos searched at a time.
    numbers: (N,) a number for each photo, or None for 0, 1, …; together with the seed it determines
    the photo's samples. others: up to so many more captions that beam search has found by then;
    they follow those that were asked for, best first. Raises SearchError.
    """
    config = config or SearchConfig()
    check_search(config)
    decoder = for_search(decoder)
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
                max_length=config.longest,
                no_repeat_ngram=config.no_repeat_ngram,
            )
            found.extend([h] for h in _hypotheses(words, log_probs, config))
        else:
            found.extend(_search_beams(decoder, batch, config, others))
    return found


def _search_beams(
    decoder: CaptionDecoder, features: Tensor, config: SearchConfig, others: int
) -> list[list[Hypothesis]]:
    of_groups = _captions_of_groups(decoder, features, config, others)
    asked = min(config.captions, config.beam_size // config.groups)  # of each group
    found = [[captions[:asked] for captions in groups] for groups in of_groups]
    best = [_best_of_groups(groups, config.captions) for groups in found]
    _fill_up(best, found, decoder, features, config)
    for captions, groups in zip(best, of_groups, strict=True):
        if others and len(captions) == config.captions:  # else even those are not to be had
            captions += _others(captions, groups, others)
    return best


def _others(
    chosen: list[Hypothesis], groups: list[list[Hypothesis]], count: int
) -> list[Hypothesis]:
    """The best of the groups' captions that are not chosen: `count` different ones or fewer."""
    known = {hypothesis.words for hypothesis in chosen}
    left = {h.words: h for captions in groups for h in captions if h.words not in known}
    return sorted(left.values(), key=lambda h: -h.score)[:count]


def _fill_up(
    best: list[list[Hypothesis]],
    found: list[list[list[Hypothesis]]],
    decoder: CaptionDecoder,
    features: Tensor,
    config: SearchConfig,
) -> None:
    """Complete, in place, the captions of photos whose groups have found equal ones."""
    # A search with more beams finds each group's next captions: as many beams as captions are
    # enough for every group.
    wider = config.captions * config.groups
    short = [n for n, captions in enumerate(best) if len(captions) < config.captions]
    if config.groups == 1 or wider <= config.beam_size or not short:
        return
    more = dataclasses.replace(config, beam_size=wider)
    at_a_time = max(1, len(features) * config.beam_size // wider)  # as much memory as above
    for start in range(0, len(short), at_a_time):
        photos = short[start : start + at_a_time]
        found_more = _captions_of_groups(decoder, features[photos], more)
        for n, groups in zip(photos, found_more, strict=True):
            longer = [own + others for own, others in zip(found[n], groups, strict=True)]
            best[n] = _best_of_groups(longer, config.captions)


def _captions_of_groups(
    decoder: CaptionDecoder, features: Tensor, config: SearchConfig, others: int = 0
) -> list[list[list[Hypothesis]]]:
    """The captions of each group of beams for each photo, best first."""
    found = beam_search(decoder, features, config, others)
    photos, groups, captions = found.scores.shape
    flat = _hypotheses(found.words.flatten(0, 2), found.log_probs.flatten(0, 2), config)
    exists = (found.scores > IMPOSSIBLE).flatten().tolist()
    ranked = list(zip(flat, exists, strict=True))
    by_group = [
        [hypothesis for hypothesis, there in ranked[i : i + captions] if there]
        for i in range(0, len(ranked), captions)
    ]
    return [by_group[i : i + groups] for i in range(0, photos * groups, groups)]


def _best_of_groups(groups: list[list[Hypothesis]], count: int) -> list[Hypothesis]:
    """The best caption of each group, sorted by score, then their second ones, and so on.

    A group whose caption is chosen already contributes its next one. groups: captions, best first.
    Returns `count` different captions, or fewer if the groups have no more.
    """
    best: list[Hypothesis] = []
    chosen: set[tuple[int, ...]] = set()
    while len(best) < count:
        rank: list[Hypothesis] = []
        for captions in groups:
            fresh = next((h for h in captions if h.words not in chosen), None)
            if fresh is not None:
                chosen.add(fresh.words)
                rank.append(fresh)
        if not rank:
            break
        best.extend(sorted(rank, key=lambda h: -h.score))
    return best[:count]


def _sample(
    decoder: CaptionDecoder, features: Tensor, config: SearchConfig, numbers: Sequence[int]
) -> list[list[Hypothesis]]:
    shape = (config.captions, config.longest + 1)
    uniform = np.stack([np.random.default_rng((config.seed, n)).random(shape) for n in numbers])
    words, log_probs = sample_scored(
        decoder,
        features,
        torch.from_numpy(uniform),
        temperature=config.temperature,
        top_p=config.top_p,
        max_length=config.longest,
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
