"""What a model says of a photo."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cache.errors import CapError
from train.captions.sentence import sentence
from train.captions.vocabulary import Vocabulary
from train.search.hypotheses import Hypothesis


class CaptionError(CapError):
    """Raised when a photo gets no caption. The message is one line."""


@dataclass(frozen=True)
class Caption:
    """One of several captions for a photo."""

    caption: str  # as people write it: a sentence
    score: float  # length-normalized log-probability; 0 means certainty
    log_probs: tuple[float, ...] = ()  # of each of the words, then of the caption's end
    words: tuple[str, ...] = ()  # as the model knows them: in lower case, punctuation among them

    def as_dict(self, *, log_probs: bool = False) -> dict[str, Any]:
        """The fields for JSON. log_probs: with the log-probabilities of the words."""
        found: dict[str, Any] = {
            "caption": self.caption,
            "words": list(self.words),
            "score": round(self.score, 4),
        }
        if log_probs:
            found["log_probs"] = [round(value, 4) for value in self.log_probs]
        return found


@dataclass(frozen=True)
class Prediction:
    """The best caption for one photo, or the reason why there is none."""

    path: str
    caption: str  # as people write it: a sentence
    score: float  # length-normalized log-probability; 0 means certainty
    error: str = ""
    captions: tuple[Caption, ...] = ()  # as many as were asked for, the best one first
    others: tuple[Caption, ...] = ()  # more that the search has found, if they were asked for

    @property
    def log_prob(self) -> float:
        """The log-probability of `caption`: the sum over its words and its end."""
        return sum(self.captions[0].log_probs) if self.captions else float("-inf")

    @property
    def words(self) -> tuple[str, ...]:
        """The words of `caption` as the model knows them: in lower case, punctuation among them."""
        return self.captions[0].words if self.captions else ()

    def as_dict(self, *, log_probs: bool = False) -> dict[str, Any]:
        """The fields for JSON. `captions` is present only if there are several.

        log_probs: with the log-probabilities of the words.
        """
        if self.error:
            return {"path": self.path, "error": self.error}
        dicts = [caption.as_dict(log_probs=log_probs) for caption in self.captions]
        found: dict[str, Any] = {"path": self.path, **dicts[0]}
        if len(dicts) > 1:
            found["captions"] = dicts
        return found


def prediction_of(
    name: str, vocabulary: Vocabulary, found: list[Hypothesis], asked: int
) -> Prediction:
    """The prediction of the hypotheses found, or an error if the decoder computes no numbers.

    asked: how many of them were asked for. The rest are `others`.
    """
    # Beam search then finds nothing; greedy search and sampling find something without a score.
    if not found or not math.isfinite(found[0].score):
        return Prediction(
            name, "", float("-inf"), "the model's probabilities are not finite (NaN or infinity)"
        )
    captions = tuple(_caption(vocabulary, hypothesis) for hypothesis in found)
    return Prediction(
        name,
        captions[0].caption,
        captions[0].score,
        captions=captions[:asked],
        others=captions[asked:],
    )


def _caption(vocabulary: Vocabulary, hypothesis: Hypothesis) -> Caption:
    words = vocabulary.caption_words(hypothesis.words)
    return Caption(sentence(words, vocabulary), hypothesis.score, hypothesis.log_probs, words)
