"""Captions to the tokens that scores are computed on: lower case, punctuation dropped.

The official tokenizer, Stanford's PTBTokenizer, is a Java program inside pycocoevalcap. It is used
where Java is present. Without Java, NLTK's Penn Treebank tokens, adjusted to Stanford's habits,
stand in; `tests/train/test_metrics.py` measures what that does to the scores.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from train.captions.tokenizer import tokenize
from train.scores.java import has_java, package_folder, reason, run_java

# What pycocoevalcap drops after tokenizing. Everything is lower case by then, so its upper-case
# bracket names never match, and brackets count as words.
PUNCTUATION = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
# Where Stanford's tokens differ from NLTK's in more than a handful of captions.
_STANFORD = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_STANFORD[".."] = "..."


def scoring_tokens(
    texts: Sequence[str], java: bool | None, notices: list[str]
) -> tuple[list[str], str]:
    """(tokens of each caption, joined by spaces; name of the tokenizer, `ptb` or `treebank`).

    java: whether to use it; None: if it is there and works. What stands in its way is appended to
    `notices`.
    """
    if java is not False:
        if not has_java():
            notices.append("no Java: NLTK's Treebank tokens instead of PTBTokenizer's, no METEOR")
        else:
            try:
                return _ptb_tokens(texts), "ptb"
            except (OSError, subprocess.SubprocessError, ValueError) as error:
                notices.append(
                    f"Java fails ({reason(error)}): NLTK's Treebank tokens instead of "
                    "PTBTokenizer's, no METEOR"
                )
    return [treebank_line(text) for text in texts], "treebank"


def _ptb_tokens(texts: Sequence[str]) -> list[str]:
    # The tokenizer works by lines: nothing in a caption may begin a new one.
    lines = [" ".join(text.split()).replace("\0", " ") for text in texts]
    output = run_java(
        [
            "-cp",
            "stanford-corenlp-3.4.1.jar",
            "edu.stanford.nlp.process.PTBTokenizer",
            "-preserveLines",
            "-lowerCase",
            "-encoding",
            "UTF-8",
        ],
        lines,
        package_folder() / "tokenizer",
    )
    if len(output) != len(lines):
        raise ValueError(f"{len(output)} lines came back for {len(lines)}")
    return [_without_punctuation(line.split()) for line in output]


def treebank_line(text: str) -> str:
    """The stand-in's tokens of a caption, joined by spaces."""
    return _without_punctuation(
        [_STANFORD.get(token, token) for token in tokenize(text.replace("\0", " "))]
    )


def _without_punctuation(tokens: Sequence[str]) -> str:
    return " ".join(token for token in tokens if token not in PUNCTUATION)
