"""How well people agree: one reference of each photo is scored against the others, as a model's
caption would be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

from train.captions.script import TREEBANK
from train.scores.metrics import MetricsError, Scores, score

_ROUNDS = 5


@dataclass(frozen=True)
class Agreement:
    """Scores of people's captions, averaged over the rounds."""

    scores: dict[str, float]  # by name, as in Scores, without those that could not be computed
    photos: int
    rounds: int  # each scores another caption of every photo
    references: float  # mean number that a caption was scored against
    tokenizer: str
    notices: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.scores,
            "count": self.photos,
            "rounds": self.rounds,
            "references": self.references,
            "tokenizer": self.tokenizer,
        }

    def summary(self) -> str:
        """The scores times 100, one per line."""
        lines = [f"{name:<8} {100 * value:6.2f}" for name, value in self.scores.items()]
        lines.append(
            f"people, {self.photos:,} photos, mean of {self.rounds} rounds, each caption against "
            f"the {self.references:.3g} others (a model has one more to match), "
            f"{self.tokenizer} tokens, scores times 100"
        )
        return "\n".join(lines)


def human_agreement(
    references: Mapping[str, Sequence[str]],
    *,
    tokenizer: str = TREEBANK,
    java: bool | None = None,
    meteor: bool = True,
) -> Agreement:
    """Score the k-th caption of every photo against the photo's other captions.

    There is a round for each k up to the most captions of a photo, but at most 5. Photos with one
    caption are left out. Photos with fewer captions than rounds start again with the first. In each
    round, CIDEr's document frequencies are those of the other captions. tokenizer: what splits
    them, as for `score`. meteor: whether to compute it. Raises MetricsError.
    """
    several = {image: list(texts) for image, texts in references.items() if len(texts) > 1}
    if not several:
        raise MetricsError("no photo has two captions to compare")
    rounds = min(_ROUNDS, max(len(texts) for texts in several.values()))
    results: list[Scores] = []
    for k in range(rounds):
        hypotheses, others = {}, {}
        for image, texts in several.items():
            place = k % len(texts)
            hypotheses[image] = texts[place]
            others[image] = texts[:place] + texts[place + 1 :]
        results.append(score(hypotheses, others, tokenizer=tokenizer, java=java, meteor=meteor))
    means = {}
    for field in fields(Scores):
        values = [getattr(result, field.name) for result in results]
        if all(isinstance(value, float) for value in values):
            means[field.name] = fmean(values)
    return Agreement(
        scores=means,
        photos=len(several),
        rounds=rounds,
        references=fmean(len(texts) - 1 for texts in several.values()),
        tokenizer=results[0].tokenizer,
        notices=tuple(dict.fromkeys(notice for r in results for notice in r.notices)),
    )
