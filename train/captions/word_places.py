"""Where each word of the model stands in the sentence that is printed of it."""

from __future__ import annotations

from collections.abc import Sequence

from train.captions.vocabulary import Vocabulary

_QUOTES = {"``": '"', "''": '"'}  # NLTK's tokens for straight marks


def word_places(
    words: Sequence[str], text: str, vocabulary: Vocabulary
) -> list[tuple[int, int] | None]:
    """(start, end) of each word in a sentence, in characters; None for a mark that is left out.

    words: of the model. text: the `train.captions.sentence.sentence` of these words. The places
    ascend and do not overlap. All of the text but its spaces belongs to some word.
    """
    places: list[tuple[int, int] | None] = []
    start = 0
    for word in words:
        while text[start : start + 1].isspace():
            start += 1
        length = next(
            (len(form) for form in _forms(word, vocabulary) if text.startswith(form, start)), 0
        )
        places.append((start, start + length) if length else None)
        start += length
    return places


def _forms(word: str, vocabulary: Vocabulary) -> list[str]:
    """How a sentence may write a word, the longest form first."""
    written = vocabulary.cases.get(word, word)
    forms = {written, _QUOTES.get(word, written)}
    for place, letter in enumerate(written):  # the capital of a sentence, perhaps behind a mark
        if letter.isalnum():
            forms.add(written[:place] + letter.title() + written[place + 1 :])
            break
    return sorted(forms, key=len, reverse=True)
