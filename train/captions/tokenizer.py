"""Splits captions into tokens.

Captions are lower-cased. Tokens are then NLTK's Penn Treebank words, or those of another tokenizer
of `train.captions.script`. NLTK's `word_tokenize` first splits the text into sentences, with a
model that must be downloaded. Splitting after `.`, `!` or `?` before a space gives nearly the same
result without a model.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import Protocol

from cache.errors import CapError
from train.captions.script import CHARACTERS, TOKENIZERS, TREEBANK, WHITESPACE, has_no_spaces


class TokenizerError(CapError):
    """Raised for a tokenizer that this program does not have. The message is one line."""


class _Tokenizer(Protocol):
    def tokenize(self, text: str) -> list[str]: ...


_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
# Text of which the Treebank rules split little: words of letters and digits, perhaps with hyphens
# or with a genitive `'s`, between single spaces or commas; with or without a full stop at the end.
# All but two captions in a hundred match. They skip NLTK's hundred-odd substitutions, which take
# some 200 µs a caption. `tests/train/test_tokenizer.py` compares this shortcut with NLTK.
_PLAIN = re.compile(
    r"(?:WORD(?:'s)?(?: ?, | ))*WORD(?:'s)?( ?\.)?\Z".replace("WORD", "[a-z0-9]+(?:-[a-z0-9]+)*")
)
# Contractions without an apostrophe. NLTK splits them, also between hyphens.
_SPLIT_BY_NLTK = re.compile("cannot|gimme|gonna|gotta|lemme|wanna")


@cache
def _treebank() -> _Tokenizer:
    from nltk.tokenize import NLTKWordTokenizer

    tokenizer: _Tokenizer = NLTKWordTokenizer()
    return tokenizer


def tokenize(caption: str, tokenizer: str = TREEBANK) -> list[str]:
    """The tokens of a caption, lower-cased. None of them contains a space.

    treebank: `A dog's ball.` → a dog 's ball .
    whitespace: `A dog's ball.` → a dog's ball.
    characters: `一只BMX。` → 一 只 bmx 。
    Raises TokenizerError for another tokenizer.
    """
    return splitter(tokenizer)(caption.lower())


def splitter(tokenizer: str) -> Callable[[str], list[str]]:
    """The function that splits a text into tokens, as it is written. Raises TokenizerError."""
    if tokenizer not in _SPLITTERS:
        raise TokenizerError(
            f"no tokenizer {tokenizer!r}, this program has {', '.join(TOKENIZERS)}; "
            "install a newer version of it"
        )
    return _SPLITTERS[tokenizer]


def _treebank_words(text: str) -> list[str]:
    text = " ".join(text.split())
    plain = _PLAIN.match(text)
    if plain and not _SPLIT_BY_NLTK.search(text):
        if plain.group(1):
            text = text[: plain.start(1)] + " ."
        if "," in text:
            text = text.replace(",", " ,")
        if "'" in text:
            text = text.replace("'", " '")
        return text.split()
    return [
        token for sentence in _SENTENCE_END.split(text) for token in _treebank().tokenize(sentence)
    ]


def _words_and_characters(text: str) -> list[str]:
    """Characters of scripts without spaces, each with the marks on it; words of other scripts.

    A hyphen, an apostrophe or a full stop between two letters of a word belongs to it. Of other
    signs each is a token, and so is a row of the same sign.
    """
    tokens: list[str] = []
    grows = False  # whether a letter goes on with the last token
    for place, character in enumerate(text):
        if character.isspace():
            grows = False
            continue
        before = text[place - 1 : place] if tokens else ""
        is_mark = _is_mark(character) and before.strip() != ""
        is_letter = _is_spaced_letter(character)
        is_inside = grows and character in "-'’." and _is_spaced_letter(text[place + 1 : place + 2])
        is_repeated = character == before and not has_no_spaces(character)
        if is_mark or is_inside or (is_letter and grows) or (is_repeated and not is_letter):
            tokens[-1] += character
        else:
            tokens.append(character)
        grows = is_letter or is_inside or (grows and is_mark)
    return tokens


def _is_spaced_letter(character: str) -> bool:
    return character.isalnum() and not has_no_spaces(character)


@cache
def _is_mark(character: str) -> bool:
    """Whether a character is part of the one before it, such as a vowel sign, or joins two."""
    return unicodedata.category(character).startswith("M") or character in "\u200c\u200d"


_SPLITTERS: dict[str, Callable[[str], list[str]]] = {
    TREEBANK: _treebank_words,
    WHITESPACE: str.split,
    CHARACTERS: _words_and_characters,
}
