"""Splits captions into tokens, and numbers the tokens of a whole set of captions.

Tokens are NLTK's Penn Treebank words of the lower-cased caption. NLTK's `word_tokenize` first
splits the text into sentences, with a model that must be downloaded. Splitting after `.`, `!` or
`?` before a space gives nearly the same result without a model.
"""

from __future__ import annotations

import re
from array import array
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import numpy as np

from cache.record import CaptionTable, Strings

_COUNTED_TOKENS = 1 << 20  # tokens counted at a time; bincount needs 8 bytes for each


class _Tokenizer(Protocol):
    def tokenize(self, text: str) -> list[str]: ...


_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
# Text that the Treebank rules leave alone: words of letters and digits between single spaces, with
# or without a full stop at the end. Nine captions in ten match. They skip NLTK's hundred-odd
# substitutions, which take 50 µs a caption. `tests/train/test_tokenizer.py` compares this shortcut
# with NLTK on real captions.
_PLAIN = re.compile(r"[a-z0-9]+(?: [a-z0-9]+)*( ?\.)?\Z")
_SPLIT_BY_NLTK = frozenset(  # contractions without an apostrophe
    ("cannot", "gimme", "gonna", "gotta", "lemme", "wanna")
)


@cache
def _treebank() -> _Tokenizer:
    from nltk.tokenize import NLTKWordTokenizer

    tokenizer: _Tokenizer = NLTKWordTokenizer()
    return tokenizer


def tokenize(caption: str) -> list[str]:
    """The Penn Treebank tokens of a caption, lower-cased: `A dog's ball.` → a dog 's ball ."""
    text = " ".join(caption.lower().split())
    plain = _PLAIN.match(text)
    if plain:
        words = (text[: plain.start(1)] if plain.group(1) else text).split()
        if _SPLIT_BY_NLTK.isdisjoint(words):
            return [*words, "."] if plain.group(1) else words
    return [
        token for sentence in _SENTENCE_END.split(text) for token in _treebank().tokenize(sentence)
    ]


def build_caption_table(captions: Sequence[Sequence[str]]) -> CaptionTable:
    """Tokenize and number the captions of N photos; `captions[n]` are the texts of photo n."""
    texts = [text for group in captions for text in group]
    rows = np.repeat(np.arange(len(captions), dtype=np.int32), [len(group) for group in captions])
    # Tokens are numbered as they first appear: lists of words would take ten times the memory.
    first_numbers: defaultdict[str, int] = defaultdict(lambda: len(first_numbers))
    flat, offsets = array("i"), np.zeros(len(texts) + 1, np.int64)
    for index, text in enumerate(texts, 1):
        flat.extend([first_numbers[token] for token in tokenize(text)])
        offsets[index] = len(flat)
    tokens = np.frombuffer(flat, np.int32)
    parts = np.split(tokens, range(_COUNTED_TOKENS, len(tokens), _COUNTED_TOKENS))
    counts = np.zeros(len(first_numbers), np.int64)
    for part in parts:
        counts += np.bincount(part, minlength=len(first_numbers))
    by_frequency = sorted(
        zip(first_numbers, counts.tolist(), strict=True), key=lambda item: (-item[1], item[0])
    )
    final_numbers = np.zeros(len(first_numbers), np.int32)
    final_numbers[[first_numbers[word] for word, _ in by_frequency]] = np.arange(len(first_numbers))
    for part in parts:
        part[:] = final_numbers[part]
    return CaptionTable(
        texts=Strings.pack(texts),
        rows=rows,
        tokens=tokens,
        token_offsets=offsets,
        words=Strings.pack(word for word, _ in by_frequency),
        counts=np.array([count for _, count in by_frequency], np.int64),
    )
