"""Beam search over many photos at once, with one group of beams or several diverse groups.

Diverse groups follow Vijayakumar et al. (2016, «Diverse Beam Search»). At each step the groups
choose their words in turn, and a word costs `diversity` for each beam of the photo's earlier groups
that continues with it. The cost affects which words are chosen, but not the captions' scores, which
are log-probabilities.
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
class FinishedCaptions:
    """The C best finished captions of each of G groups for N photos, best first.

    If there are fewer, the scores of the rest are -inf.
    """

    scores: Tensor  # (N, G, C), normalized by length
    words: Tensor  # (N, G, C, T) int64, <end> and <pad> after the words
    log_probs: Tensor  # (N, G, C, T) of each word and <end>; 0 after it

    @classmethod
    def empty(
        cls, photos: int, groups: int, captions: int, steps: int, device: torch.device
    ) -> FinishedCaptions:
        shape = (photos, groups, captions)
        return cls(
            scores=torch.full(shape, IMPOSSIBLE, device=device),
            words=torch.full((*shape, steps), PAD, dtype=torch.int64, device=device),
            log_probs=torch.zeros(*shape, steps, device=device),
        )

    def add(self, photos: Tensor, scores: Tensor, words: Tensor, log_probs: Tensor) -> None:
        """Add (P, G, M …) captions of photos (P,), and keep the C best of each group."""
        captions = self.scores.shape[2]
        best, place = torch.cat([self.scores[photos], scores], 2).topk(captions, dim=2)
        index = place.unsqueeze(-1).expand(-1, -1, -1, self.words.shape[3])
        self.scores[photos] = best
        self.words[photos] = torch.cat([self.words[photos], words], 2).gather(2, index)
        self.log_probs[photos] = torch.cat([self.log_probs[photos], log_probs], 2).gather(2, index)


def beam_search(
    decoder: CaptionDecoder, features: Tensor, config: SearchConfig, others: int = 0
) -> FinishedCaptions:
    """The `config.captions` best captions of each group of beams for each photo.

    others: how many more of its finished captions to return. The search goes on no longer for them,
    so they are not the next best of all captions, and the first ones stay the same.

    A group keeps K = beam_size / groups unfinished captions. At most K of its 2K best extensions
    are `<end>`, so there are always K to continue with. An `<end>` among the K best extensions
    finishes a caption. A group is done when no unfinished caption can still become one of the best
    or, once K captions are finished, when no unfinished one scores higher as it stands.
    """
    count, device, groups = len(features), features.device, config.groups
    beams = config.beam_size // groups  # K
    steps = config.longest + 1
    captions = min(config.captions, beams)
    best = FinishedCaptions.empty(count, groups, captions + others, steps, device)
    finished = torch.zeros(count, groups, dtype=torch.int64, device=device)  # number of captions
    active = torch.ones(count, groups, dtype=torch.bool, device=device)  # (P, G)
    photos = torch.arange(count, device=device)  # (P,) with an active group

    # At the first step a photo has one beam, which its groups share. Its extensions make K of it.
    logits, state = decoder.step(decoder.read_photo(features), None)
    logits = logits.float().repeat_interleave(groups, 0)
    state = state.rows(photos.repeat_interleave(groups))
    sums = torch.zeros(count, groups, 1, device=device)  # (P, G, K)
    words = torch.full((count, groups, 1, steps), PAD, dtype=torch.int64, device=device)
    log_probs = torch.zeros(count, groups, 1, steps, device=device)
    for length in range(steps):
        live_beams = sums.shape[2]  # K' in `_extensions`: 1 at the first step, then K
        logits = logits.log_softmax(1)
        forbid(logits, length, config.longest)
        if config.no_repeat_ngram:
            forbid_repeats(logits, words.flatten(0, 2)[:, :length], config.no_repeat_ngram)
        diversity = config.diversity * active
        top, parent, word = _extensions(logits, sums, beams, diversity)  # (P, G, 2K) each

        ends = (word == END) & (top > IMPOSSIBLE) & active.unsqueeze(-1)
        ends[:, :, beams:] = False
        extended = _extend(words, log_probs, sums, top, parent, word, length)
        scores = (top / (length + 1) ** config.length_penalty).masked_fill(~ends, IMPOSSIBLE)
        best.add(photos, scores[:, :, :beams], *(part[:, :, :beams] for part in extended))
        finished[photos] += ends.sum(2)
        if length == config.longest:
            break

        # Continue with the K best that have not ended. Log-probabilities are at most 0, so a score
        # is at most the sum so far, divided by the longest possible length. Once K captions are
        # finished, others are worth more steps only if they score higher as they stand. Stopping at
        # K would be too early: three poor captions may end before a good one.
        keep = (word == END).byte().argsort(dim=2, stable=True)[:, :, :beams]
        sums = top.masked_fill(word == END, IMPOSSIBLE).gather(2, keep)
        divisor = torch.where(finished[photos] < beams, steps, length + 2)
        bound = sums.amax(2) / divisor**config.length_penalty
        active = bound > best.scores[photos, :, captions - 1]
        if beams == 1:  # greedy search stops at the first `<end>`
            active &= finished[photos] == 0
        kept = active.any(1)  # photos
        if not kept.any():
            break
        parent = parent.gather(2, keep)[kept]
        index = keep.unsqueeze(-1).expand(-1, -1, -1, steps)
        words, log_probs = (part.gather(2, index)[kept] for part in extended)
        first = torch.arange(len(photos) * groups, device=device).view(-1, groups, 1) * live_beams
        rows = (first[kept] + parent).flatten()  # the row in the state of each beam kept
        sums, photos, active = sums[kept], photos[kept], active[kept]
        state = state.rows(rows)
        logits, state = decoder.step(decoder.embed(words[..., length].flatten()), state)
        logits = logits.float()
    return best


def _extensions(
    log_probs: Tensor, sums: Tensor, beams: int, diversity: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The 2K best extensions of each group: (log-probability so far, parent beam, word).

    log_probs: (P * G * K', W) of the next word, for K' beams in each group. sums: (P, G, K') of the
    log-probabilities so far. diversity: (P, G) the cost of a word in later groups for each beam of
    this group that continues with it. Returns (P, G, 2K) each, best first.
    """
    photos, groups, live = sums.shape
    width = log_probs.shape[1]
    if groups == 1:
        top, parent, word = _best_of_group(log_probs, sums.flatten(0, 1), beams)
        return top.unsqueeze(1), parent.unsqueeze(1), word.unsqueeze(1)
    grouped = log_probs.view(photos, groups, live, width)
    cost = torch.zeros(photos, width, device=log_probs.device)
    found = []
    for group in range(groups):
        penalized = grouped[:, group] - cost.unsqueeze(1)
        _, parent, word = _best_of_group(penalized.flatten(0, 1), sums[:, group], beams)
        row = parent * width + word
        top = grouped[:, group].flatten(1).gather(1, row) + sums[:, group].gather(1, parent)
        found.append((top, parent, word))
        # The group continues with its first K extensions that do not end.
        continues = (word != END) & ((word != END).cumsum(1) <= beams)
        cost.scatter_add_(1, word, continues * diversity[:, group, None])
    tops, parents, words = (torch.stack(parts, 1) for parts in zip(*found, strict=True))
    return tops, parents, words


def _best_of_group(log_probs: Tensor, sums: Tensor, beams: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same for one group: (P * K', W) and (P, K') → (P, 2K) each."""
    photos, live = sums.shape
    width = log_probs.shape[1]
    # A group's 2K best are among the 2K best of each of its beams.
    each = min(2 * beams, width)
    top, word = top_k(log_probs, each)
    candidates = (top.view(photos, live, each) + sums.unsqueeze(-1)).flatten(1)
    best, place = candidates.topk(min(2 * beams, live * each), dim=1)
    return best, place // each, word.view(photos, live * each).gather(1, place)


def _extend(
    words: Tensor,
    log_probs: Tensor,
    sums: Tensor,
    top: Tensor,
    parent: Tensor,
    word: Tensor,
    length: int,
) -> tuple[Tensor, Tensor]:
    """The words and log-probabilities so far, with those of each extension added."""
    index = parent.unsqueeze(-1).expand(-1, -1, -1, words.shape[3])
    words, log_probs = words.gather(2, index), log_probs.gather(2, index)
    words[..., length] = word
    log_probs[..., length] = top - sums.gather(2, parent)
    return words, log_probs
