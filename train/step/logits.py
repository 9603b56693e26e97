"""What both objectives do with logits besides the cross-entropy."""

from __future__ import annotations

from torch import Tensor

from train.captions.vocabulary import END
from train.model.flat_parameters import IMPOSSIBLE_LOGIT
from train.search.word_choice import NEVER_GENERATED


def rule_out_undrawn_words(logits: Tensor, first_rows: int) -> None:
    """Take all probability from the words that `train.search.rollout` never draws, in place.

    Otherwise the probability that a drawn caption loses would go to these words, which are never
    drawn and so never lose it again.

    logits: (R, padded W). first_rows: the number of rows of the first step, where <end> is never
    drawn.
    """
    for word in NEVER_GENERATED:
        logits[:, word] = IMPOSSIBLE_LOGIT
    logits[:first_rows, END] = IMPOSSIBLE_LOGIT
