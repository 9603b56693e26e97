"""One word at a time, without looking back: greedy captions and sampled ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from train.captions.vocabulary import END, PAD
from train.model.decoder import CaptionDecoder
from train.search.word_choice import draw, forbid, forbid_repeats, nucleus

# Steps between looks at what is finished. A look waits for the device, but lets finished captions
# be dropped.
_LOOK_EVERY = 3

# (rows' logits (B, W), step, rows (B,)) → the word each row goes on with, (B,)
_Choice = Callable[[Tensor, int, Tensor], Tensor]


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

    features: (N, D) on the decoder's device; generator: of that device, or None for the default
    one. Returns (N * count, T) int64, a photo's captions in neighbouring rows: words, `<end>`, then
    `<pad>`; T is the longest one's, at most max_length + 1. What search never says (special words,
    no word at all) is never drawn, and `<end>` is forced after `max_length` words. The decoder's
    mode is left as it is: in training mode, dropout takes part.
    """

    def choose(logits: Tensor, step: int, rows: Tensor) -> Tensor:
        # Drawn for every row, finished or not, so that what is dropped when changes nothing.
        uniform = torch.rand(len(features) * count, generator=generator, device=features.device)
        return draw(_weights(logits, temperature), uniform[rows])

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
    """As `sample`, from given random numbers, with (N * count, T) log-probabilities.

    uniform: (N, count, max_length + 1) in [0, 1). The log-probabilities are the decoder's,
    whatever temperature and top_p made of them; 0 where there is `<pad>`.
    """
    count = uniform.shape[1]
    uniform = uniform.flatten(0, 1).to(features.device)

    def choose(logits: Tensor, step: int, rows: Tensor) -> Tensor:
        weights = _weights(logits, temperature)
        if top_p < 1:
            weights = nucleus(weights, top_p)
        return draw(weights, uniform[rows, step])

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
    """The likeliest next word at every step: (N, T) words and their log-probabilities."""
    return _roll_out(
        decoder,
        features,
        1,
        lambda logits, step, rows: logits.argmax(1),
        max_length=max_length,
        no_repeat_ngram=no_repeat_ngram,
    )


def _weights(logits: Tensor, temperature: float) -> Tensor:
    """(B, W) probabilities; 0 for what is forbidden."""
    return (logits / temperature if temperature != 1 else logits).softmax(1)


def _roll_out(
    decoder: CaptionDecoder,
    features: Tensor,
    count: int,
    choose: _Choice,
    *,
    max_length: int,
    no_repeat_ngram: int = 0,
    scores: bool = True,
) -> tuple[Tensor, Tensor]:
    """(N * count, T) words, `<pad>` after `<end>`; log-probabilities, or zeros without `scores`."""
    device = features.device
    total = len(features) * count
    words = torch.full((total, max_length + 1), PAD, dtype=torch.int64, device=device)
    log_probs = torch.zeros(total, max_length + 1, device=device)
    if not total:
        return words[:, :0], log_probs[:, :0]
    # A photo's captions part at their first word: up to there it is read once.
    logits, state = decoder.step(decoder.read_photo(features), None)
    logits = logits.float().repeat_interleave(count, 0)
    state = state.rows(torch.arange(len(features), device=device).repeat_interleave(count))
    rows = torch.arange(total, device=device)  # (B,) those still going on
    running = torch.ones(total, dtype=torch.bool, device=device)  # (B,)
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
        if step % _LOOK_EVERY == 0:
            kept = running.nonzero().squeeze(1)
            if not len(kept):
                break
            if len(kept) < len(rows):
                rows, running, word = rows[kept], running[kept], word[kept]
                state = state.rows(kept)
        logits, state = decoder.step(decoder.embed(word), state)
        logits = logits.float()
    longest = int((words != PAD).sum(1).amax())
    return words[:, :longest], log_probs[:, :longest]
