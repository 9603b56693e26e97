"""The tokens that scores are computed on: in lower case, without punctuation.

The official tokenizer, Stanford's PTBTokenizer, is a Java program in pycocoevalcap. Without Java,
NLTK's Penn Treebank tokens replace it, adjusted to the commonest differences from Stanford's.
`tests/train/test_metrics.py` measures how that changes the scores. Captions that were split by
another tokenizer are split by it here as well.
"""

from __future__ import annotations

import subprocess
import unicodedata
from collections.abc import Sequence

from train.captions.script import TREEBANK, misfit, script_of
from train.captions.tokenizer import tokenize
from train.scores.java import failure_reason, has_java, package_folder, run_java

# The tokens that pycocoevalcap drops. Its list also has the names of brackets, but in upper case.
# Tokens are in lower case, so these never match, and brackets count as words.
PUNCTUATION = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
# NLTK's tokens and Stanford's, where they differ in more than a handful of captions.
_STANFORD = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_STANFORD[".."] = "..."
_WITHOUT_JAVA = "using NLTK's Treebank tokens instead of PTBTokenizer's, and leaving out METEOR"


def scoring_tokens(
    texts: Sequence[str], java: bool | None, notices: list[str], tokenizer: str = TREEBANK
) -> tuple[list[str], str]:
    """(tokens of each caption, joined by spaces; name of the tokenizer, `ptb` or that given).

    java: whether to use Java; None to use it if it is there and works. If it cannot be used, the
    reason is appended to `notices`. The official tokenizer knows English, so it takes the place of
    `treebank` alone, and only for captions in the Latin script. Raises TokenizerError.
    """
    unfit = misfit(texts, tokenizer)
    if unfit is not None:
        notices.append(unfit)
    script = script_of(texts)
    if java is not False:
        if tokenizer != TREEBANK:
            notices.append(
                f"using tokens of --tokenizer {tokenizer} instead of PTBTokenizer's, and leaving "
                "out METEOR: both know English alone"
            )
        elif script not in ("Latin", None):
            notices.append(f"captions in {script}, but PTBTokenizer knows English: {_WITHOUT_JAVA}")
        elif not has_java():
            notices.append(f"no Java: {_WITHOUT_JAVA}")
        else:
            try:
                return _ptb_tokens(texts), "ptb"
            except (OSError, subprocess.SubprocessError, ValueError) as error:
                notices.append(f"Java fails ({failure_reason(error)}): {_WITHOUT_JAVA}")
    return [scoring_line(text, tokenizer) for text in texts], tokenizer


def _ptb_tokens(texts: Sequence[str]) -> list[str]:
    # The tokenizer reads a caption per line, so captions must not contain line breaks.
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


def scoring_line(text: str, tokenizer: str = TREEBANK) -> str:
    """The scoring tokens of a caption without Java, joined by spaces. Raises TokenizerError."""
    tokens = tokenize(text.replace("\0", " "), tokenizer)
    if tokenizer != TREEBANK:
        return " ".join(token for token in tokens if not is_punctuation(token, tokenizer))
    return _without_punctuation([_STANFORD.get(token, token) for token in tokens])


def is_punctuation(token: str, tokenizer: str) -> bool:
    """Whether scores leave a token out.

    The official scores leave out some of the signs, see `PUNCTUATION`. There are no official ones
    for other tokenizers, so every sign that Unicode calls punctuation is left out there.
    """
    if tokenizer == TREEBANK:
        return token in PUNCTUATION
    return all(unicodedata.category(character).startswith("P") for character in token)


def _without_punctuation(tokens: Sequence[str]) -> str:
    return " ".join(token for token in tokens if token not in PUNCTUATION)
