"""Captions to tokens, tokens to numbers.

Tokens are NLTK's Penn Treebank words of the lower-cased caption. NLTK's `word_tokenize` first
splits sentences with a model that must be downloaded; splitting after `.`, `!` or `?` before a
space comes as close without one.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cache.atomic import write_text
from cache.errors import CapError
from cache.record import CaptionTable, Strings

PAD, START, END, UNK = 0, 1, 2, 3
_AT_ONCE = 1 << 20  # tokens; bincount makes 8 bytes of each
SPECIALS = ("<pad>", "<start>", "<end>", "<unk>")


class VocabularyError(CapError):
    """A vocabulary file is unreadable or a vocabulary would be empty. One line."""


class _Tokenizer(Protocol):
    def tokenize(self, text: str) -> list[str]: ...


_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
# What the Treebank rules leave alone: words of letters and digits between single spaces, perhaps
# with a last full stop. Nine captions in ten are like this, and NLTK's hundred-odd substitutions
# cost 50 µs each; `test_vocab` holds this shortcut against NLTK on real captions.
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
    return treebank_tokens(text)


def treebank_tokens(text: str) -> list[str]:
    """NLTK's Penn Treebank tokens, sentence by sentence, in the case given."""
    return [
        token for sentence in _SENTENCE_END.split(text) for token in _treebank().tokenize(sentence)
    ]


def build_caption_table(captions: Sequence[Sequence[str]]) -> CaptionTable:
    """Tokenize and number the captions of N photos; `captions[n]` are the texts of photo n."""
    texts = [text for group in captions for text in group]
    rows = np.repeat(np.arange(len(captions), dtype=np.int32), [len(group) for group in captions])
    # Numbers at once, in order of appearance: as lists of words, captions take ten times as much.
    seen: defaultdict[str, int] = defaultdict(lambda: len(seen))
    flat, offsets = array("i"), np.zeros(len(texts) + 1, np.int64)
    for index, text in enumerate(texts, 1):
        flat.extend([seen[token] for token in tokenize(text)])
        offsets[index] = len(flat)
    tokens = np.frombuffer(flat, np.int32)
    parts = np.split(tokens, range(_AT_ONCE, len(tokens), _AT_ONCE))
    counts = np.zeros(len(seen), np.int64)
    for part in parts:
        counts += np.bincount(part, minlength=len(seen))
    ordered = sorted(zip(seen, counts.tolist(), strict=True), key=lambda item: (-item[1], item[0]))
    number = np.zeros(len(seen), np.int32)
    number[[seen[word] for word, _ in ordered]] = np.arange(len(seen))
    for part in parts:
        part[:] = number[part]
    return CaptionTable(
        texts=Strings.pack(texts),
        rows=rows,
        tokens=tokens,
        token_offsets=offsets,
        words=Strings.pack(word for word, _ in ordered),
        counts=np.array([count for _, count in ordered], np.int64),
    )


@dataclass(frozen=True)
class Vocabulary:
    """The words a decoder knows. Number 0–3 are `<pad> <start> <end> <unk>`, then the words.

    `counts` are the occurrences behind `words` (not the specials), most frequent first.
    """

    words: tuple[str, ...]
    counts: tuple[int, ...]
    min_count: int

    def __len__(self) -> int:
        return len(SPECIALS) + len(self.words)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words, len(SPECIALS))}

    def number(self, word: str) -> int:
        return self._numbers.get(word, UNK)

    def word(self, number: int) -> str:
        return SPECIALS[number] if number < len(SPECIALS) else self.words[number - len(SPECIALS)]

    def encode(self, caption: str) -> list[int]:
        """Word numbers of a raw caption, without `<start>` or `<end>`."""
        return [self.number(token) for token in tokenize(caption)]

    def decode(self, numbers: Iterable[int]) -> str:
        """The sentence up to `<end>`; `<pad>` and `<start>` are left out."""
        words: list[str] = []
        for number in numbers:
            if number == END:
                break
            if number not in (PAD, START):
                words.append(self.word(number))
        return " ".join(words)

    def numbers_for(self, table: CaptionTable) -> NDArray[np.int32]:
        """(W,) the number in this vocabulary of each word of a cache's table."""
        return np.array([self.number(word) for word in table.words], np.int32)

    def save(self, path: Path) -> None:
        """Write as JSON. Raises WriteError."""
        write_text(path, self.to_json() + "\n")

    def to_json(self) -> str:
        return json.dumps(
            {"min_count": self.min_count, "words": self.words, "counts": self.counts},
            ensure_ascii=False,
        )

    @classmethod
    def from_json(cls, text: str) -> Vocabulary:
        """Raises VocabularyError if the text is not a vocabulary."""
        try:
            record = json.loads(text)
            words, counts = tuple(record["words"]), tuple(record["counts"])
            if len(words) != len(counts) or len(set(words)) != len(words):
                raise ValueError("words and counts do not match")
            if not all(isinstance(word, str) for word in words):
                raise ValueError("a word is not text")
            return cls(words, counts, int(record["min_count"]))
        except (ValueError, KeyError, TypeError) as error:
            raise VocabularyError(f"not a vocabulary ({error})") from None


def build_vocabulary(table: CaptionTable, min_count: int) -> Vocabulary:
    """The words that occur at least `min_count` times.

    Raises VocabularyError where none does.
    """
    if not len(table):
        raise VocabularyError("the cache holds no captions; extract its photos with --captions")
    kept = int(np.searchsorted(-table.counts, -min_count, side="right"))
    if kept == 0:
        raise VocabularyError(
            f"no word occurs {min_count} times in {len(table):,} captions; lower --min-count"
        )
    return Vocabulary(
        words=tuple(table.words[:kept]),
        counts=tuple(table.counts[:kept].tolist()),
        min_count=min_count,
    )
