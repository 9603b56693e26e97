"""Caption scores: BLEU, METEOR, ROUGE-L and CIDEr, computed by pycocoevalcap's scorers.

METEOR and the official tokenizer are Java programs. Without Java, the other scores are
computed on NLTK's tokens, and the result says so. On COCO and Flickr8k captions that changes no
score by more than 0.3 points of 100; `tests/train/test_metrics.py` measures it if Java is present.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import CapError
from train.captions.script import TREEBANK
from train.scores.bleu import BleuStatistics
from train.scores.java import failure_reason
from train.scores.meteor import meteor as meteor_score
from train.scores.scoring_tokens import scoring_tokens


class MetricsError(CapError):
    """Raised if there is nothing to score, or if captions and references do not match.

    The message is one line.
    """


@dataclass(frozen=True)
class PhotoScores:
    """The statistics behind the corpus scores, photo by photo, in the order of the hypotheses."""

    bleu: BleuStatistics
    rouge_l: NDArray[np.float64]  # (N,)
    cider: NDArray[np.float64]  # (N,)
    meteor: NDArray[np.float64] | None = None  # (N, 23) counts for `corpus_meteor`


@dataclass(frozen=True)
class Scores:
    """Corpus scores as fractions (papers print them times 100; CIDEr may exceed 1).

    tokenizer: `ptb` (official, Java), `treebank` (NLTK) or another of `train.captions.script`.
    meteor: None without Java or for another language.
    notices: why a score is missing or the tokenizer is not the official one.
    """

    bleu_1: float
    bleu_2: float
    bleu_3: float
    bleu_4: float
    meteor: float | None
    rouge_l: float
    cider: float
    count: int  # captions scored
    tokenizer: str
    photos: PhotoScores = field(compare=False, repr=False)
    notices: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "bleu_1": self.bleu_1,
            "bleu_2": self.bleu_2,
            "bleu_3": self.bleu_3,
            "bleu_4": self.bleu_4,
            "meteor": self.meteor,
            "rouge_l": self.rouge_l,
            "cider": self.cider,
            "count": self.count,
            "tokenizer": self.tokenizer,
        }


def score(
    hypotheses: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    tokenizer: str = TREEBANK,
    java: bool | None = None,
    meteor: bool = True,
) -> Scores:
    """Score one caption per image against the image's references, over the whole corpus.

    tokenizer: what splits captions and references; Java's takes the place of `treebank`. java:
    whether to use Java; None to use it if it is there and works. meteor: False leaves it out, which
    saves most of the time. CIDEr's document
    frequencies come from these references, as in the official evaluation. Raises MetricsError or
    TokenizerError.
    """
    _check(hypotheses, references)
    notices: list[str] = []
    ids = list(hypotheses)
    texts = [hypotheses[image] for image in ids]
    texts += [text for image in ids for text in references[image]]
    tokenized, tokenizer = scoring_tokens(texts, java, notices, tokenizer)
    # From here on captions are tokens joined by spaces, in the form that pycocoevalcap expects.
    captions = {image: [tokenized[i]] for i, image in enumerate(ids)}
    rest = iter(tokenized[len(ids) :])
    truth = {image: [next(rest) for _ in references[image]] for image in ids}
    if not any(any(texts) for texts in truth.values()):
        raise MetricsError("no reference caption has a word")
    bleu, photos = _python_scores(truth, captions)
    official = tokenizer == "ptb"
    corpus_meteor, meteor_counts = (
        _meteor(truth, captions, notices) if meteor and official else (None, None)
    )
    return Scores(
        bleu_1=bleu[0],
        bleu_2=bleu[1],
        bleu_3=bleu[2],
        bleu_4=bleu[3],
        meteor=corpus_meteor,
        rouge_l=float(photos.rouge_l.mean()),
        cider=float(photos.cider.mean()),
        count=len(ids),
        tokenizer=tokenizer,
        photos=replace(photos, meteor=meteor_counts),
        notices=tuple(notices),
    )


def _check(hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    if not hypotheses:
        raise MetricsError("no captions to score")
    if hypotheses.keys() != references.keys():
        odd = next(iter(hypotheses.keys() ^ references.keys()))
        where = "captions" if odd in hypotheses else "references"
        raise MetricsError(f"captions and references differ: image {odd} is only in the {where}")
    for image, texts in references.items():
        if not texts:
            raise MetricsError(f"image {image} has no reference caption")


def _python_scores(
    references: Mapping[str, list[str]], hypotheses: Mapping[str, list[str]]
) -> tuple[list[float], PhotoScores]:
    """(BLEU-1 to 4, statistics photo by photo) of tokenized captions, one hypothesis per image."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    scorer = BleuScorer(n=4)
    for image, captions in hypotheses.items():
        scorer += (captions[0], references[image])
    with contextlib.redirect_stdout(io.StringIO()):  # the scorer may print lengths
        bleu, _ = scorer.compute_score(option="closest")
    parts = scorer.ctest
    statistics = BleuStatistics(
        correct=np.array([part["correct"] for part in parts], np.float64),
        guesses=np.array([part["guess"] for part in parts], np.float64),
        lengths=np.array([part["testlen"] for part in parts], np.float64),
        closest=np.array(
            [
                min((abs(length - part["testlen"]), length) for length in part["reflen"])[1]
                for part in parts
            ],
            np.float64,
        ),
    )
    _, rouge_l = Rouge().compute_score(references, hypotheses)
    _, cider = Cider().compute_score(references, hypotheses)
    return [float(value) for value in bleu], PhotoScores(statistics, rouge_l, cider)


def _meteor(
    references: Mapping[str, list[str]], hypotheses: Mapping[str, list[str]], notices: list[str]
) -> tuple[float, NDArray[np.float64]] | tuple[None, None]:
    try:
        return meteor_score(references, hypotheses)
    except (OSError, ValueError) as error:
        notices.append(f"no METEOR: Java fails ({failure_reason(error)})")
        return None, None
