"""Greedy and sampled captions: each word is chosen once, as opposed to beam search."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from train.captions.vocabulary import END, PAD
from train.model.decoder import CaptionDecoder
from train.search.word_choice import draw, forbid, forbid_repeats, nucleus

# Steps between checks for finished captions. A check waits for the device, but then the finished
# captions are dropped.
_CHECK_EVERY = 3

# (logits (B, W) of some rows, step, numbers (B,) of these rows) → the next word of each row (B,)
_ChooseWords = Callable[[Tensor, int, Tensor], Tensor]


@torch.no_grad()
def sample(
    decoder: CaptionDecoder,
    features: Tensor,
    count: int,
    temperature: float = 1.0,
    max_length: int = 30,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw `count` captions for each photo from the decoder's own distribution.

    features: (N, D) on the decoder's device. generator: on that device, or None for the default
    one. Returns (N * count, T) int64, the captions of a photo in adjacent rows: words, `<end>`,
    then `<pad>`. T is that of the longest caption, at most max_length + 1. As in search, special
    words and empty captions are never drawn, and `<end>` is forced after `max_length` words. The
    decoder stays in its mode; in training mode there is dropout.
    """

    def choose(logits: Tensor, step: int, rows: Tensor) -> Tensor:
        # Numbers are drawn for finished rows too, so that it does not matter when rows are dropped.
        uniform = torch.rand(len(features) * count, generator=generator, device=features.device)
        return draw(_probabilities(logits, temperature), uniform[rows])

    words, _ = _roll_out(decoder, features, count, choose, max_length=max_length, scores=False)
    return words


@torch.inference_mode()
def sample_scored(
    decoder: CaptionDecoder,
    features: Tensor,
    uniform: Tensor,
    *,
    temperature: float,
    top_p: float,
    max_length: int,
    no_repeat_ngram: int,
) -> tuple[Tensor, Tensor]:
    """Like `sample`, but from given random numbers, and with (N * count, T) log-probabilities.

    uniform: (N, count, max_length + 1) in [0, 1). The log-probabilities are the decoder's own,
    without temperature and top_p, and 0 for `<pad>`.
    """
    count = uniform.shape[1]
    uniform = uniform.flatten(0, 1).to(features.device)

    def choose(logits: Tensor, step: int, rows: Tensor) -> Tensor:
        probabilities = _probabilities(logits, temperature)
        if top_p < 1:
            probabilities = nucleus(probabilities, top_p)
        return draw(probabilities, uniform[rows, step])

    return _roll_out(
        decoder,
        features,
        count,
        choose,
        max_length=max_length,
        no_repeat_ngram=no_repeat_ngram,
    )


@torch.inference_mode()
def greedy(
    decoder: CaptionDecoder, features: Tensor, *, max_length: int, no_repeat_ngram: int = 0
) -> tuple[Tensor, Tensor]:
    """Take the likeliest word at every step: (N, T) words and their log-probabilities."""
    return _roll_out(
        decoder,
        features,
        1,
        lambda logits, step, rows: logits.argmax(1),
        max_length=max_length,
        no_repeat_ngram=no_repeat_ngram,
    )


def _probabilities(logits: Tensor, temperature: float) -> Tensor:
    """(B, W) probabilities, 0 for forbidden words."""
    return (logits / temperature if temperature != 1 else logits).softmax(1)


def _roll_out(
    decoder: CaptionDecoder,
    features: Tensor,
    count: int,
    choose: _ChooseWords,
    *,
    max_length: int,
    no_repeat_ngram: int = 0,
    scores: bool = True,
) -> tuple[Tensor, Tensor]:
    """(N * count, T) words, `<pad>` after `<end>`, and log-probabilities: 0 without `scores`."""
    device = features.device
    total = len(features) * count
    words = torch.full((total, max_length + 1), PAD, dtype=torch.int64, device=device)
    log_probs = torch.zeros(total, max_length + 1, device=device)
    if not total:
        return words[:, :0], log_probs[:, :0]
    # The captions of a photo differ from their first word on, so the photo itself is read once.
    logits, state = decoder.step(decoder.read_photo(features), None)
    logits = logits.float().repeat_interleave(count, 0)
    state = state.rows(torch.arange(len(features), device=device).repeat_interleave(count))
    rows = torch.arange(total, device=device)  # (B,) captions not dropped yet
    running = torch.ones(total, dtype=torch.bool, device=device)  # (B,) not finished yet
    step = 0
    while True:
        if scores:
            logits = logits.log_softmax(1)
        forbid(logits, step, max_length)
        if no_repeat_ngram:
            forbid_repeats(logits, words[rows, :step], no_repeat_ngram)
        word = torch.where(running, choose(logits, step, rows), PAD)
        words[rows, step] = word
        if scores:
            chosen = logits.gather(1, word.unsqueeze(1)).squeeze(1)
            log_probs[rows, step] = torch.where(running, chosen, 0.0)
        running = running & (word != END)
        step += 1
        if step > max_length:
            break
        if step % _CHECK_EVERY == 0:
            kept = running.nonzero().squeeze(1)
            if not len(kept):
                break
            if len(kept) < len(rows):
                rows, running, word = rows[kept], running[kept], word[kept]
                state = state.rows(kept)
        logits, state = decoder.step(decoder.embed(word), state)
        logits = logits.float()
    # At least 1, although `draw` gives only <pad> if all probabilities are NaN.
    longest = max(1, int((words != PAD).sum(1).amax()))
    return words[:, :longest], log_probs[:, :longest]
