"""Tokens back to a sentence as people write it: `a man 's hat .` → `A man's hat.`

The model's words are in lower case. A word of the vocabulary's cases gets its capitals (`Paris`),
and so does the first one of a sentence. NLTK's detokenizer joins contractions and puts punctuation
where it belongs. Quotation marks and brackets are paired before, because it looks at each alone.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Protocol

from train.captions.casing import ends_sentence
from train.captions.script import CHARACTERS, WHITESPACE, has_no_spaces
from train.captions.vocabulary import Vocabulary

# Opening mark → the marks that may close it. NLTK's tokens for straight marks come first.
_PAIRS = {
    "``": ("''",),
    '"': ('"',),
    "'": ("'",),
    "(": (")",),
    "[": ("]",),
    "{": ("}",),
    "‘": ("’",),
    "“": ("”",),
    "„": ("“", "”"),
    "«": ("»",),
    "»": ("«",),
    "（": ("）",),
    "「": ("」",),
    "『": ("』",),
    "《": ("》",),
}
_CLOSING = frozenset(mark for marks in _PAIRS.values() for mark in marks)
# What stands for straight marks until NLTK is done, which would take them for others.
_OPEN, _CLOSE = {"``": "\ue000", '"': "\ue000", "'": "\ue002"}, {"''": "\ue001", '"': "\ue001"}
_CLOSE["'"] = "\ue003"
_STRAIGHT = str.maketrans({"\ue000": '"', "\ue001": '"', "\ue002": "'", "\ue003": "'"})
_BEFORE_WORDS = "\"'([{‘“„«»¿¡（「『《\ue000\ue002"
_AFTER_APOSTROPHE = frozenset(("s", "t", "d", "m", "ll", "re", "ve"))  # as in dog’s and don’t

# Text that NLTK would leave alone but for the full stop: nine captions in ten, which need not wait
# for NLTK's import. `tests/train/test_sentence.py` compares this shortcut with NLTK.
_PLAIN = re.compile(r"\w[\w-]*(?: \w[\w-]*)*(?: \.)?\Z")
_JOINED_BY_NLTK = frozenset(("not", "me", "na", "ta"))  # as in cannot, gimme, gonna, gotta


class _Detokenizer(Protocol):
    def detokenize(self, tokens: list[str]) -> str: ...


@cache
def _treebank() -> _Detokenizer:
    from nltk.tokenize.treebank import TreebankWordDetokenizer

    detokenizer: _Detokenizer = TreebankWordDetokenizer()
    return detokenizer


def sentence(words: Sequence[str], vocabulary: Vocabulary) -> str:
    """A caption, as people would write it. words: those of the vocabulary's tokenizer.

    A quotation mark or bracket without its counterpart is left out.
    """
    tokens = [vocabulary.cases.get(word, word) for word in words]
    if vocabulary.tokenizer == WHITESPACE:
        return " ".join(_with_capitals(tokens))
    tokens = _paired(tokens)
    if not any(map(has_no_spaces, "".join(tokens))):
        tokens = _with_capitals(tokens)
    joined = _join_characters if vocabulary.tokenizer == CHARACTERS else _join_words
    return joined(tokens).translate(_STRAIGHT)


def _with_capitals(tokens: list[str]) -> list[str]:
    """The tokens with a capital at the start of every sentence."""
    capitalized: list[str] = []
    starts, before = True, ""
    for token in tokens:
        word = token.lstrip(_BEFORE_WORDS)
        if starts and word[:1].isalnum():
            capitalized.append(token.removesuffix(word) + word[0].title() + word[1:])
        else:
            capitalized.append(token)
        # Behind a quotation, as in «the sign says "Stop!" in red», the sentence may go on.
        starts = ends_sentence(token, before) or (starts and not any(map(str.isalnum, token)))
        before = token
    return capitalized


def _paired(tokens: list[str]) -> list[str]:
    """The tokens with quotation marks and brackets at the words that they enclose.

    Those without a counterpart are dropped. An apostrophe and the sign for inches stay.
    """
    partners = _partners(tokens)
    joined: list[str] = []
    sticks = False  # whether the next token belongs to the last one
    for place, token in enumerate(tokens):
        partner = partners.get(place)
        last = joined[-1] if joined else ""
        if partner is not None and partner > place:
            mark = _OPEN.get(token, token)
            joined[-1:] = [last + mark] if sticks else [*joined[-1:], mark]
            sticks = True
            continue
        if partner is not None:
            mark, sticks_to_last = _CLOSE.get(token, token), True
        elif token in ("'", "’", "..."):
            mark, sticks_to_last = token, True
        elif token == "''" and last[-1:].isdigit():
            mark, sticks_to_last = _CLOSE[token], True
        elif token in _PAIRS or token in _CLOSING:
            continue
        else:
            mark, sticks_to_last = token, False
        if (sticks or sticks_to_last) and joined:
            joined[-1] += mark
        else:
            joined.append(mark)
        following = tokens[place + 1 : place + 2]
        is_apostrophe = token in ("'", "’") and partner is None
        sticks = is_apostrophe and (
            not last or (token == "’" and _AFTER_APOSTROPHE.issuperset(following))
        )
    return joined


def _partners(tokens: list[str]) -> dict[int, int]:
    """The place of the other mark for each mark of a pair. Pairs do not overlap."""
    partners: dict[int, int] = {}
    opened: list[int] = []
    for place, token in enumerate(tokens):
        fitting = [each for each in opened if token in _PAIRS[tokens[each]]]
        if fitting:
            partners |= {fitting[-1]: place, place: fitting[-1]}
            del opened[opened.index(fitting[-1]) :]
        elif token == "'" and _is_plural(tokens, place):
            continue
        elif token in _PAIRS:
            opened.append(place)
    return partners


def _is_plural(tokens: list[str], place: int) -> bool:
    """Whether the apostrophe at this place is that of a plural, as in `the dogs' ball`.

    In `a sign that says 'no'` another one follows.
    """
    return place > 0 and tokens[place - 1].endswith("s") and tokens[place:].count("'") % 2 == 1


def _join_words(tokens: list[str]) -> str:
    """NLTK's words between spaces where they belong."""
    text = " ".join(tokens)
    if _PLAIN.match(text) and _JOINED_BY_NLTK.isdisjoint(tokens):
        return text.removesuffix(" .") + "." if text.endswith(" .") else text
    return _treebank().detokenize(tokens)


def _join_characters(tokens: list[str]) -> str:
    """Characters without spaces between them, and words of other scripts with spaces."""
    text = ""
    for token in tokens:
        if text and not (
            token[0] in ",.!?;:%" or _stands_alone(text[-1]) or _stands_alone(token[0])
        ):
            text += " "
        text += token
    return text


def _stands_alone(character: str) -> bool:
    """Whether there are no spaces around a character."""
    is_wide_sign = unicodedata.east_asian_width(character) in "WF" and not character.isalnum()
    return has_no_spaces(character) or is_wide_sign
