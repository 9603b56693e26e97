"""Choosing among all words of a vocabulary, for many rows at once.

A row has some ten thousand logits and one to ten of them matter. Sorting whole rows costs more
than the decoder's own products, so rows are cut into blocks: the k largest words lie in the k
blocks with the largest maxima, and a drawn word lies in the block that the running sum of block
sums points to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.captions.vocabulary import END, PAD, START, UNK

IMPOSSIBLE = float("-inf")
NEVER = (PAD, START, UNK)  # <unk> says nothing to a reader
_BLOCK = 64  # words
_NUCLEUS = 256  # words; a nucleus seldom needs more


def top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(B, W) → the k largest of each row, descending, and their places: (B, k) each; k ≤ W."""
    width = values.shape[1]
    blocks = width // _BLOCK
    if blocks <= 2 * k:
        return values.topk(k, dim=1)
    even = blocks * _BLOCK
    blocked = values[:, :even].unflatten(1, (blocks, _BLOCK))  # (B, blocks, 64), a view
    best = blocked.amax(2).topk(k, dim=1, sorted=False).indices  # (B, k) blocks
    chosen = blocked.gather(1, best.unsqueeze(-1).expand(-1, -1, _BLOCK)).flatten(1)
    candidates = torch.cat([chosen, values[:, even:]], 1)  # with the words after the last block
    top, place = candidates.topk(k, dim=1)
    within = best.gather(1, (place // _BLOCK).clamp_(max=k - 1)) * _BLOCK + place % _BLOCK
    return top, torch.where(place < k * _BLOCK, within, place + (even - k * _BLOCK))


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """(B,) a place of each row of (B, W) weights ≥ 0, as likely as its weight.

    uniform: (B,) in [0, 1): the same numbers draw the same places.
    """
    width = weights.shape[1]
    blocks = width // _BLOCK
    even = blocks * _BLOCK
    sums = weights[:, :even].unflatten(1, (blocks, _BLOCK)).sum(2)
    tail = weights[:, even:].sum(1, keepdim=True)  # the words after the last block
    sums = torch.cat([sums, tail], 1).double()  # (B, blocks + 1)
    ends = sums.cumsum(1)
    target = uniform.double().unsqueeze(1) * ends[:, -1:]
    # The first block, then the first word of it, whose running sum exceeds the target.
    block = (ends <= target).sum(1, keepdim=True).clamp_(max=blocks)  # (B, 1)
    before = ends.gather(1, block) - sums.gather(1, block)
    words = torch.arange(_BLOCK, device=weights.device)
    index = block * _BLOCK + words  # (B, 64), past the last word in the tail
    inside = weights.gather(1, index.clamp(max=width - 1)).masked_fill_(index >= width, 0)
    place = (inside.double().cumsum(1) <= (target - before).clamp_(min=0)).sum(1)
    # Rounding may point past the last word that has a weight.
    last = torch.where(inside > 0, words, 0).amax(1)
    drawn: Tensor = block.squeeze(1) * _BLOCK + torch.minimum(place, last)
    return drawn


def nucleus(weights: Tensor, top_p: float) -> Tensor:
    """(B, W) weights with all but the likeliest words set to 0: the fewest whose share reaches
    `top_p` (Holtzman et al., 2020, «The Curious Case of Neural Text Degeneration»).
    """
    enough = weights.sum(1, keepdim=True) * top_p
    ordered, _ = top_k(weights, min(_NUCLEUS, weights.shape[1]))
    if bool((ordered.sum(1, keepdim=True) < enough).any()):
        ordered = weights.sort(1, descending=True).values
    # Words before which less than `top_p` is reached; the least of them is the threshold.
    inside = ordered.cumsum(1) - ordered < enough
    threshold = ordered.masked_fill(~inside, float("inf")).amin(1, keepdim=True)
    return torch.where(weights >= threshold, weights, 0.0)


def forbid(logits: Tensor, length: int, max_length: int) -> None:
    """Set to -inf, in place, what may never follow `length` words among (B, W) logits.

    Special words never may; `<end>` not at once, and nothing but `<end>` after `max_length` words.
    """
    if length == max_length:
        ending = logits[:, END].clone()
        logits.fill_(IMPOSSIBLE)
        logits[:, END] = ending
    else:
        for word in NEVER if length else (*NEVER, END):  # a list would be copied to the device
            logits[:, word] = IMPOSSIBLE


def forbid_repeats(logits: Tensor, words: Tensor, n: int) -> None:
    """Set to -inf, in place, the words that would make a caption say `n` words in a row twice.

    logits: (B, W), words: (B, length) said so far. Nothing is forbidden where n is 0.
    """
    length = words.shape[1]
    if n == 0 or length < n:
        return
    grams = words.unfold(1, n, 1)  # (B, length - n + 1, n)
    recent = words[:, length - n + 1 :].unsqueeze(1)  # (B, 1, n - 1)
    repeats = (grams[:, :, :-1] == recent).all(2)
    # Where there is no repeat this forbids <pad>, which never may follow anyway.
    logits.scatter_(1, torch.where(repeats, grams[:, :, -1], PAD), IMPOSSIBLE)
