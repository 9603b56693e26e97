"""Whether a model's captions are none: nearly the same for all photos, or words without a sentence.

The bounds lie far from both sides, as measured on models of 50 and 250 of Flickr8k's photos, which
captioned 1,000 others, and on people's captions of Flickr8k and COCO. The numbers are beside each
bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from train.captions.vocabulary import SPECIALS, UNK

# Of two neighbouring words, how often they are the same. Models trained for too few steps: 0.47 and
# more; others: 0; people: 0.0001, and at most 0.02 in any eight captions.
_MAX_REPEATED = 0.1
# The different words of a caption as a share of its words, on average. Models trained for too few
# steps: below 0.5; others: above 0.9; people: 0.92, and at least 0.79 in any eight captions.
_MIN_DIFFERENT_WORDS = 0.65
# <unk> as a share of all words. None of the models says it at all; one word in ten spoils each
# caption.
_MAX_UNKNOWN = 0.1
# Different captions as a share of all. Models of only 50 and 250 photos give 59 and 41 to 1,000
# photos, which still follow what is to be seen; people give each its own.
_MIN_DIFFERENT = 0.02
_FEW_CAPTIONS = 50  # fewer may well be the same: photos of one scene, say
_MAX_EMPTY = 0.5


def degenerate(captions: Sequence[Sequence[str]]) -> str | None:
    """What is wrong with the captions of different photos, as a short clause; None if nothing is.

    captions: the words of each, as the model gives them. They may be few, even one.
    """
    spoken = [words for words in captions if words]
    if len(captions) - len(spoken) > _MAX_EMPTY * len(captions):
        return f"{len(captions) - len(spoken):,} of {len(captions):,} captions are empty"
    if not spoken:
        return None
    words = sum(map(len, spoken))
    unknown = sum(word == SPECIALS[UNK] for caption in spoken for word in caption)
    if unknown > _MAX_UNKNOWN * words:
        return f"{unknown / words:.0%} of the words are {SPECIALS[UNK]}"
    repeated = sum(first == second for caption in spoken for first, second in pairwise(caption))
    different = sum(len(set(caption)) / len(caption) for caption in spoken) / len(spoken)
    if repeated > _MAX_REPEATED * (words - len(spoken)) or different < _MIN_DIFFERENT_WORDS:
        return "words repeat within the captions"
    kinds = len({tuple(caption) for caption in spoken})
    if len(spoken) >= _FEW_CAPTIONS and kinds <= _MIN_DIFFERENT * len(spoken):
        return f"only {kinds:,} of {len(spoken):,} captions are different"
    return None
