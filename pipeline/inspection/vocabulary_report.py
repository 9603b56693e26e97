"""The report of `cap build-vocab`: statistics of the words in a captions file or a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.record import CacheError
from cache.seal import is_cache
from cache.store import open_cache
from pipeline.captions.dataset import read_captions
from pipeline.captions.records import DatasetError
from train.captions.numbering import number_captions
from train.captions.script import TREEBANK, misfit
from train.captions.vocabulary import SPECIALS, Vocabulary, build_vocabulary

_SHOWN_WORDS = 12


@dataclass(frozen=True)
class VocabularyReport:
    """A vocabulary, and the captions that it was counted in."""

    vocabulary: Vocabulary
    captions: int
    tokens: int  # occurrences of all words
    distinct: int  # different words
    unfit: str | None  # one line, if the tokenizer does not fit the script of the captions

    @property
    def coverage(self) -> float:
        """The share of all tokens that the vocabulary contains."""
        return sum(self.vocabulary.counts) / self.tokens

    def as_dict(self) -> dict[str, Any]:
        pairs = list(zip(self.vocabulary.words, self.vocabulary.counts, strict=True))
        return {
            "size": len(self.vocabulary),
            "min_count": self.vocabulary.min_count,
            "tokenizer": self.vocabulary.tokenizer,
            "captions": self.captions,
            "tokens": self.tokens,
            "distinct_tokens": self.distinct,
            "coverage": round(self.coverage, 6),
            "most_frequent": dict(pairs[:_SHOWN_WORDS]),
            "least_frequent": dict(pairs[-_SHOWN_WORDS:]),
        }

    def summary(self) -> str:
        facts = self.as_dict()
        most = ", ".join(f"{word} {count:,}" for word, count in facts["most_frequent"].items())
        least = ", ".join(f"{word} {count:,}" for word, count in facts["least_frequent"].items())
        return (
            f"{facts['size'] - len(SPECIALS):,} words occur at least {facts['min_count']} times; "
            f"the vocabulary also has {len(SPECIALS)} special ones\n"
            f"{self.captions:,} captions, {self.tokens:,} tokens, {self.distinct:,} distinct; "
            f"{self.coverage:.2%} of the tokens are covered\n"
            f"most frequent: {most}\nleast frequent: {least}"
        )


def vocabulary_report(
    source: Path,
    min_count: int,
    tokenizer: str | None = None,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    say: Callable[[str], None] | None = None,
) -> VocabularyReport:
    """Count the words of a cache or of a captions file.

    tokenizer: what splits the captions of a file; None for `treebank`. A cache holds its words.
    image_column, caption_column, say: as for `read_captions`. Raises CacheError (also for a cache
    of another tokenizer), DatasetError or VocabularyError.
    """
    if is_cache(source):
        table = open_cache(source, allow_pending=True).captions
        if tokenizer not in (None, table.tokenizer):
            raise CacheError(
                f"{source}: made with tokenizer {table.tokenizer}, not {tokenizer}; leave out "
                f"--tokenizer, or extract again with it (--reuse {source} keeps the features)"
            )
    else:
        photos = read_captions(
            source, image_column=image_column, caption_column=caption_column, say=say
        )
        table = number_captions(photos.texts, photos.caption_rows, tokenizer or TREEBANK)
    if not len(table):
        raise DatasetError(f"{source}: holds no captions")
    return VocabularyReport(
        vocabulary=build_vocabulary(table, min_count),
        captions=len(table),
        tokens=len(table.tokens),
        distinct=len(table.words),
        unfit=misfit(table.texts, table.tokenizer),
    )
