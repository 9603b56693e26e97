"""Choosing among all words of a vocabulary, for many rows at once.

A row has some ten thousand logits, of which one to ten matter. Sorting whole rows would take longer
than the decoder's matrix products, so rows are divided into blocks. The k largest words lie in the
k blocks with the largest maxima, and a drawn word lies in the block where the running sum of block
sums passes the random number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.captions.vocabulary import END, PAD, START, UNK

IMPOSSIBLE = float("-inf")
NEVER_GENERATED = (PAD, START, UNK)  # <unk> would tell a reader nothing
_BLOCK = 64  # words
_NUCLEUS = 256  # words; a nucleus rarely has more


def top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(B, W) → the k ≤ W largest values of each row, descending, and their indices: (B, k) each."""
    width = values.shape[1]
    blocks = width // _BLOCK
    if blocks <= 2 * k:
        return values.topk(k, dim=1)
    covered = blocks * _BLOCK
    blocked = values[:, :covered].unflatten(1, (blocks, _BLOCK))  # (B, blocks, 64), a view
    best = blocked.amax(2).topk(k, dim=1, sorted=False).indices  # (B, k) blocks
    chosen = blocked.gather(1, best.unsqueeze(-1).expand(-1, -1, _BLOCK)).flatten(1)
    candidates = torch.cat([chosen, values[:, covered:]], 1)  # and the words after the last block
    top, place = candidates.topk(k, dim=1)
    in_block = best.gather(1, (place // _BLOCK).clamp_(max=k - 1)) * _BLOCK + place % _BLOCK
    after_blocks = place + (covered - k * _BLOCK)
    return top, torch.where(place < k * _BLOCK, in_block, after_blocks)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """(B,) one index of each row of (B, W) weights ≥ 0, drawn in proportion to its weight.

    uniform: (B,) random numbers in [0, 1). The same numbers draw the same indices.
    """
    width = weights.shape[1]
    blocks = width // _BLOCK
    covered = blocks * _BLOCK
    sums = weights[:, :covered].unflatten(1, (blocks, _BLOCK)).sum(2)
    tail = weights[:, covered:].sum(1, keepdim=True)  # the words after the last block
    sums = torch.cat([sums, tail], 1).double()  # (B, blocks + 1)
    ends = sums.cumsum(1)
    target = uniform.double().unsqueeze(1) * ends[:, -1:]
    # Find the first block, and then its first word, whose running sum exceeds the target.
    block = (ends <= target).sum(1, keepdim=True).clamp_(max=blocks)  # (B, 1)
    before = ends.gather(1, block) - sums.gather(1, block)
    words = torch.arange(_BLOCK, device=weights.device)
    index = block * _BLOCK + words  # (B, 64); in the tail it runs past the last word
    inside = weights.gather(1, index.clamp(max=width - 1)).masked_fill_(index >= width, 0)
    place = (inside.double().cumsum(1) <= (target - before).clamp_(min=0)).sum(1)
    # Because of rounding, the place may be past the last word that has a weight.
    last = torch.where(inside > 0, words, 0).amax(1)
    drawn: Tensor = block.squeeze(1) * _BLOCK + torch.minimum(place, last)
    return drawn


def nucleus(weights: Tensor, top_p: float) -> Tensor:
    """(B, W) weights, set to 0 outside the nucleus: the fewest words whose share reaches `top_p`
    (Holtzman et al., 2020, «The Curious Case of Neural Text Degeneration»).
    """
    enough = weights.sum(1, keepdim=True) * top_p
    ordered, _ = top_k(weights, min(_NUCLEUS, weights.shape[1]))
    if bool((ordered.sum(1, keepdim=True) < enough).any()):
        ordered = weights.sort(1, descending=True).values
    # A word is inside if the likelier ones alone do not reach `top_p`. The threshold is the least
    # weight inside.
    inside = ordered.cumsum(1) - ordered < enough
    threshold = ordered.masked_fill(~inside, float("inf")).amin(1, keepdim=True)
    return torch.where(weights >= threshold, weights, 0.0)


def forbid(logits: Tensor, length: int, max_length: int) -> None:
    """Set to -inf, in place, the (B, W) logits of words that may not follow `length` words.

    Special words are never allowed, nor is `<end>` as the first word. After `max_length` words only
    `<end>` is allowed.
    """
    if length == max_length:
        ending = logits[:, END].clone()
        logits.fill_(IMPOSSIBLE)
        logits[:, END] = ending
    else:
        # One word at a time: a list of them would be copied to the device.
        for word in NEVER_GENERATED if length else (*NEVER_GENERATED, END):
            logits[:, word] = IMPOSSIBLE


def forbid_repeats(logits: Tensor, words: Tensor, n: int) -> None:
    """Set to -inf, in place, the words that would repeat one of the caption's n-grams.

    logits: (B, W). words: (B, length), the captions so far. If n is 0, nothing is forbidden.
    """
    length = words.shape[1]
    if n == 0 or length < n:
        return
    grams = words.unfold(1, n, 1)  # (B, length - n + 1, n)
    recent = words[:, length - n + 1 :].unsqueeze(1)  # (B, 1, n - 1)
    repeats = (grams[:, :, :-1] == recent).all(2)
    # Where nothing would repeat, this forbids <pad>, which is never allowed anyway.
    logits.scatter_(1, torch.where(repeats, grams[:, :, -1], PAD), IMPOSSIBLE)
