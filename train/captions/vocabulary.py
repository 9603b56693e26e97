"""The words a decoder knows, and their numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.atomic import write_text
from cache.errors import CapError
from cache.record import CaptionTable
from train.captions.casing import written_cases
from train.captions.script import TOKENIZERS, TREEBANK
from train.config import LONGEST

PAD, START, END, UNK = 0, 1, 2, 3
SPECIALS = ("<pad>", "<start>", "<end>", "<unk>")
# Every word is a step of the decoder; more of them than a paragraph has take too long.
_PART_CAPTIONS = 1 << 18  # counted at a time
_MOST_WORDS = 400


class VocabularyError(CapError):
    """Raised for an unreadable vocabulary or one without words. The message is one line."""


@dataclass(frozen=True)
class Vocabulary:
    """The words a decoder knows. Numbers 0–3 are `<pad> <start> <end> <unk>`, then come the words.

    `counts` says how often each of `words` occurs; the most frequent word comes first. The special
    tokens are in neither. `tokenizer` is the one whose tokens they are. `cases` has the words that
    people write with capitals within a sentence, and how: `paris` → `Paris`. `longest` is the
    number of words that 99 of 100 captions do not exceed, if that is more than a search goes to by
    itself, else 0.
    """

    words: tuple[str, ...]
    counts: tuple[int, ...]
    min_count: int
    tokenizer: str = TREEBANK
    cases: Mapping[str, str] = field(default_factory=dict)
    longest: int = 0

    def __post_init__(self) -> None:
        """Raises VocabularyError for a word that UTF-8 cannot hold, before a model trains with it
        that could not be saved.
        """
        try:
            "".join(self.words).encode()
        except UnicodeEncodeError as error:
            raise VocabularyError(
                f"a word contains {error.object[error.start : error.end]!r}, which is not text; "
                "correct the captions and extract them again"
            ) from None

    def __len__(self) -> int:
        return len(SPECIALS) + len(self.words)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words, len(SPECIALS))}

    def number(self, word: str) -> int:
        return self._numbers.get(word, UNK)

    def word(self, number: int) -> str:
        return SPECIALS[number] if number < len(SPECIALS) else self.words[number - len(SPECIALS)]

    def decode(self, numbers: Iterable[int]) -> str:
        """The words of the caption up to `<end>`, without `<pad>` and `<start>`, between spaces."""
        return " ".join(self.caption_words(numbers))

    def caption_words(self, numbers: Iterable[int]) -> tuple[str, ...]:
        """The words of the caption up to `<end>`, without `<pad>` and `<start>`."""
        words: list[str] = []
        for number in numbers:
            if number == END:
                break
            if number not in (PAD, START):
                words.append(self.word(number))
        return tuple(words)

    def numbers_for(self, table: CaptionTable) -> NDArray[np.int32]:
        """Map a cache's word table to this vocabulary: (W,) the number of each word."""
        return np.array([self.number(word) for word in table.words], np.int32)

    def save(self, path: Path) -> None:
        """Write as JSON. Raises WriteError."""
        write_text(path, json.dumps(self.as_dict(), ensure_ascii=False) + "\n")

    def as_dict(self) -> dict[str, Any]:
        """A JSON object that `from_dict` reads, without the members that say nothing new."""
        record: dict[str, Any] = {
            "min_count": self.min_count,
            "words": self.words,
            "counts": self.counts,
        }
        if self.tokenizer != TREEBANK:
            record["tokenizer"] = self.tokenizer
        if self.cases:
            record["cases"] = dict(self.cases)
        if self.longest:
            record["longest"] = self.longest
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Vocabulary:
        """Raises VocabularyError if the record is not a vocabulary."""
        try:
            words, counts = tuple(record["words"]), tuple(record["counts"])
            if len(words) != len(counts) or len(set(words)) != len(words):
                raise ValueError("words and counts do not match")
            if not all(isinstance(word, str) for word in words):
                raise ValueError("a word is not text")
            tokenizer, cases = record.get("tokenizer", TREEBANK), dict(record.get("cases", {}))
            if tokenizer not in TOKENIZERS:
                raise ValueError(f"tokenizer {tokenizer!r} is not one of {', '.join(TOKENIZERS)}")
            if any(form.lower() != word for word, form in cases.items()):
                raise ValueError("a word is written with other letters")
            longest = min(int(record.get("longest", 0)), _MOST_WORDS)
            return cls(words, counts, int(record["min_count"]), tokenizer, cases, longest)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise VocabularyError(f"not a vocabulary ({error})") from None


def build_vocabulary(
    table: CaptionTable,
    min_count: int,
    *,
    rows: NDArray[np.int64] | None = None,
    max_length: int | None = None,
) -> Vocabulary:
    """The vocabulary of the words that occur at least `min_count` times.

    rows: count only the captions of these photos, or None for all. max_length: count only the first
    words of a caption. How people write the words is read from the same captions. Raises
    VocabularyError if there is no such word.
    """
    if not len(table):
        raise VocabularyError("the cache holds no captions; extract its photos with --captions")
    counts, captions = table.counts, len(table)
    if rows is not None or max_length is not None:
        counts, captions = _counts(table, rows, max_length)
    if not captions:
        raise VocabularyError(
            f"none of the {len(table):,} captions is of an extracted photo; "
            "`cap info --unreadable` lists the photos that could not be read"
        )
    kept = np.flatnonzero(counts >= min_count)
    if not len(kept):
        raise VocabularyError(
            f"no word occurs {min_count} times in {captions:,} captions; lower --min-count"
        )
    counted = [(table.words[number], int(counts[number])) for number in kept.tolist()]
    counted.sort(key=lambda item: (-item[1], item[0]))
    words = tuple(word for word, _ in counted)
    cases = written_cases(table, rows)
    longest = usual_length(table, rows)
    return Vocabulary(
        words=words,
        counts=tuple(count for _, count in counted),
        min_count=min_count,
        tokenizer=table.tokenizer,
        cases={word: cases[word] for word in words if word in cases},
        longest=longest if longest > LONGEST else 0,
    )


def usual_length(table: CaptionTable, rows: NDArray[np.int64] | None = None) -> int:
    """The number of words that 99 of 100 captions do not exceed, but at most 400.

    rows: count only the captions of these photos, or None for all.
    """
    lengths = np.diff(table.token_offsets)
    if rows is not None:
        lengths = lengths[table.of_photos(rows)]
    if not len(lengths):
        return 0
    return min(int(np.quantile(lengths, 0.99, method="higher")), _MOST_WORDS)


def _counts(
    table: CaptionTable, rows: NDArray[np.int64] | None, max_length: int | None
) -> tuple[NDArray[np.int64], int]:
    """(how often each word of the table (W,) occurs in the chosen captions, their number)."""
    chosen = table.of_photos(rows)
    counts = np.zeros(len(table.words), np.int64)
    for first in range(0, len(table), _PART_CAPTIONS):
        part = table.part(first, min(len(table), first + _PART_CAPTIONS))
        lengths = np.diff(part.token_offsets)
        counted = np.repeat(chosen[first : first + len(part)], lengths)  # (K,)
        if max_length is not None:
            for caption in np.flatnonzero(lengths > max_length).tolist():
                start, end = part.token_offsets[caption : caption + 2].tolist()
                counted[start + max_length : end] = False
        counts += np.bincount(part.tokens[counted], minlength=len(counts))
    return counts, int(chosen.sum())
