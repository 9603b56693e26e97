"""How much captions differ from each other, which shows at once if a model has collapsed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from train.captions.vocabulary import SPECIALS, UNK


@dataclass(frozen=True)
class Diversity:
    """Facts about a set of captions, whose words are separated by spaces."""

    captions: int
    distinct: int
    words_used: int  # different words, not counting <unk>
    vocabulary: int | None  # number of words that the model knows; None without a model
    unk_share: float  # <unk> as a share of all words
    mean_length: float  # words
    most_repeated: str
    repeats: int  # of the most repeated caption

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        known = f" of {self.vocabulary:,} known" if self.vocabulary is not None else ""
        return (
            f"{self.distinct:,} distinct captions of {self.captions:,}; "
            f"{self.words_used:,} words used{known}, "
            f"{100 * self.unk_share:.2g}% of all words <unk>; "
            f"{self.mean_length:.1f} words per caption; "
            f"most frequent ({self.repeats:,} times): {self.most_repeated}"
        )


def diversity(captions: Sequence[str], vocabulary: int | None = None) -> Diversity:
    """captions: at least one. vocabulary: number of words that the model knows, if there is one."""
    words = Counter(word for caption in captions for word in caption.split())
    total = words.total()
    unknown = words.pop(SPECIALS[UNK], 0)
    # The alphabet decides between equally frequent captions, so the order of photos has no effect.
    most_repeated, repeats = min(Counter(captions).items(), key=lambda item: (-item[1], item[0]))
    return Diversity(
        captions=len(captions),
        distinct=len(set(captions)),
        words_used=len(words),
        vocabulary=vocabulary,
        unk_share=unknown / total if total else 0.0,
        mean_length=total / len(captions),
        most_repeated=most_repeated,
        repeats=repeats,
    )
