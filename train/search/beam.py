"""Beam search over many photos at once, in one group of beams or in several that differ.

Diverse groups are those of Vijayakumar et al. (2016, «Diverse Beam Search»): at each step the
groups choose one after the other, and a word costs `diversity` for each beam of an earlier group of
the same photo that goes on with it. The cost guides the choice; scores are log-probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from train.captions.vocabulary import END, PAD
from train.config import SearchConfig
from train.model.decoder import CaptionDecoder
from train.search.word_choice import IMPOSSIBLE, forbid, forbid_repeats, top_k


@dataclass
class Finished:
    """The best finished captions of N photos in G groups, best first; C of each.

    Where there are fewer the score is -inf.
    """

    scores: Tensor  # (N, G, C), normalized by length
    words: Tensor  # (N, G, C, T) int64, <end> and <pad> after the words
    log_probs: Tensor  # (N, G, C, T) of each word and <end>; 0 after it

    @classmethod
    def none(cls, photos: int, groups: int, captions: int, steps: int, like: Tensor) -> Finished:
        shape = (photos, groups, captions)
        return cls(
            scores=torch.full(shape, IMPOSSIBLE, device=like.device),
            words=torch.full((*shape, steps), PAD, dtype=torch.int64, device=like.device),
            log_probs=torch.zeros(*shape, steps, device=like.device),
        )

    def add(self, photos: Tensor, scores: Tensor, words: Tensor, log_probs: Tensor) -> None:
        """Keep the best of these (P, G, M …) captions of photos (P,) and those there."""
        captions = self.scores.shape[2]
        everything = torch.cat([self.scores[photos], scores], 2)
        best, place = everything.topk(captions, dim=2)
        index = place.unsqueeze(-1).expand(-1, -1, -1, self.words.shape[3])
        self.scores[photos] = best
        self.words[photos] = torch.cat([self.words[photos], words], 2).gather(2, index)
        self.log_probs[photos] = torch.cat([self.log_probs[photos], log_probs], 2).gather(2, index)


def beam_search(decoder: CaptionDecoder, features: Tensor, config: SearchConfig) -> Finished:
    """The `config.captions` best captions of each group of beams of each photo.

    A group keeps K = beam_size / groups unfinished captions. Of its 2K best extensions at most K
    are `<end>`, so K unfinished ones always remain. An `<end>` among the K best finishes a caption.
    A group is done when none of the unfinished can still be among the best finished ones or, with K
    captions finished, when none is ahead of them as it stands.
    """
    count, device, groups = len(features), features.device, config.groups
    beams = config.beam_size // groups  # K
    steps = config.max_length + 1
    found = Finished.none(count, groups, min(config.captions, beams), steps, features)
    finished = torch.zeros(count, groups, dtype=torch.int64, device=device)
    going = torch.ones(count, groups, dtype=torch.bool, device=device)  # (P, G)
    photos = torch.arange(count, device=device)  # (P,) those still searched

    # The first step has one beam a photo, which all groups share; its extensions become K.
    logits, state = decoder.step(decoder.read_photo(features), None)
    logits = logits.float().repeat_interleave(groups, 0)
    state = state.rows(photos.repeat_interleave(groups))
    sums = torch.zeros(count, groups, 1, device=device)  # (P, G, K)
    words = torch.full((count, groups, 1, steps), PAD, dtype=torch.int64, device=device)
    log_probs = torch.zeros(count, groups, 1, steps, device=device)
    for length in range(steps):
        live = sums.shape[2]
        logits = logits.log_softmax(1)
        forbid(logits, length, config.max_length)
        if config.no_repeat_ngram:
            forbid_repeats(logits, words.flatten(0, 2)[:, :length], config.no_repeat_ngram)
        top, parent, word = _extensions(
            logits, sums, beams, config.diversity * going
        )  # (P, G, 2K) each

        ends = (word == END) & (top > IMPOSSIBLE) & going.unsqueeze(-1)
        ends[:, :, beams:] = False
        extended = _follow(words, log_probs, sums, top, parent, word, length)
        scores = (top / (length + 1) ** config.length_penalty).masked_fill(~ends, IMPOSSIBLE)
        found.add(photos, scores[:, :, :beams], *(part[:, :, :beams] for part in extended))
        finished[photos] += ends.sum(2)
        if length == config.max_length:
            break

        # The K best that go on. A log-probability is at most 0, so a caption's final score is at
        # most its sum so far over the longest possible length. Once K are finished, only one that
        # is ahead as it stands is worth more steps: three poor captions may end before a good one.
        keep = (word == END).byte().argsort(dim=2, stable=True)[:, :, :beams]
        sums = top.masked_fill(word == END, IMPOSSIBLE).gather(2, keep)
        possible = torch.where(finished[photos] < beams, steps, length + 2)
        hope = sums.amax(2) / possible**config.length_penalty
        going = hope > found.scores[photos, :, -1]
        if beams == 1:  # greedy search: the first `<end>` is the end
            going &= finished[photos] == 0
        alive = going.any(1)
        if not alive.any():
            break
        parent = parent.gather(2, keep)[alive]
        index = keep.unsqueeze(-1).expand(-1, -1, -1, steps)
        words, log_probs = (part.gather(2, index)[alive] for part in extended)
        first = torch.arange(len(photos) * groups, device=device).view(-1, groups, 1) * live
        rows = (first[alive] + parent).flatten()  # the state's row of each kept beam
        sums, photos, going = sums[alive], photos[alive], going[alive]
        state = state.rows(rows)
        logits, state = decoder.step(decoder.embed(words[..., length].flatten()), state)
        logits = logits.float()
    return found


def _extensions(
    log_probs: Tensor, sums: Tensor, beams: int, diversity: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The 2K best extensions of each group: (log-probability so far, parent beam, word).

    log_probs: (P * G * K', W) of the next word; sums: (P, G, K') of the beams so far; diversity:
    (P, G) what a word costs later groups when a beam of this one goes on with it. Returns
    (P, G, 2K) each, best first.
    """
    photos, groups, live = sums.shape
    width = log_probs.shape[1]
    if groups == 1:
        top, parent, word = _best(log_probs, sums.flatten(0, 1), beams)
        return top.unsqueeze(1), parent.unsqueeze(1), word.unsqueeze(1)
    grouped = log_probs.view(photos, groups, live, width)
    cost = torch.zeros(photos, width, device=log_probs.device)
    found = []
    for group in range(groups):
        penalized = grouped[:, group] - cost.unsqueeze(1)
        _, parent, word = _best(penalized.flatten(0, 1), sums[:, group], beams)
        row = parent * width + word
        top = grouped[:, group].flatten(1).gather(1, row) + sums[:, group].gather(1, parent)
        found.append((top, parent, word))
        # The K that go on are the first K that do not end.
        goes_on = (word != END) & ((word != END).cumsum(1) <= beams)
        cost.scatter_add_(1, word, goes_on * diversity[:, group, None])
    tops, parents, words = (torch.stack(parts, 1) for parts in zip(*found, strict=True))
    return tops, parents, words


def _best(log_probs: Tensor, sums: Tensor, beams: int) -> tuple[Tensor, Tensor, Tensor]:
    """The 2K best of one group: (P * K', W) and (P, K') as above → (P, 2K) each."""
    photos, live = sums.shape
    width = log_probs.shape[1]
    # A group's 2K best are among the 2K best of each of its beams.
    each = min(2 * beams, width)
    top, word = top_k(log_probs, each)
    candidates = (top.view(photos, live, each) + sums.unsqueeze(-1)).flatten(1)
    best, place = candidates.topk(min(2 * beams, live * each), dim=1)
    return best, place // each, word.view(photos, live * each).gather(1, place)


def _follow(
    words: Tensor,
    log_probs: Tensor,
    sums: Tensor,
    top: Tensor,
    parent: Tensor,
    word: Tensor,
    length: int,
) -> tuple[Tensor, Tensor]:
    """The captions so far, each grown by its extension: words and log-probabilities."""
    index = parent.unsqueeze(-1).expand(-1, -1, -1, words.shape[3])
    words, log_probs = words.gather(2, index), log_probs.gather(2, index)
    words[..., length] = word
    log_probs[..., length] = top - sums.gather(2, parent)
    return words, log_probs
