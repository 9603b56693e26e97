"""Numbers the tokens of a whole set of captions, on several cores if there are many."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from array import array
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cache.record import CaptionTable, Strings, offsets_of
from cache.share import cores
from train.captions.script import TREEBANK
from train.captions.tokenizer import tokenize

_COUNTED_TOKENS = 1 << 20  # tokens at a time, because NumPy makes 8 bytes of each for a while
# A process takes as long to start as it takes to split this many captions.
_SHARE = 20_000


@dataclass(frozen=True)
class Numbered:
    """The tokens of some captions, numbered as they first appear.

    tokens: (K,) int32, of all captions in turn, as indices into `words`. lengths: (M,) int64,
    tokens of each caption.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]
    words: list[str]


def build_caption_table(
    captions: Sequence[Sequence[str]], tokenizer: str = TREEBANK, *, processes: int | None = None
) -> CaptionTable:
    """`number_captions` of N photos; `captions[n]` are the texts of photo n."""
    texts = Strings.pack(text for group in captions for text in group)
    rows = np.repeat(np.arange(len(captions), dtype=np.int32), [len(group) for group in captions])
    return number_captions(texts, rows, tokenizer, processes=processes)


def number_captions(
    texts: Strings,
    rows: NDArray[np.int32],
    tokenizer: str = TREEBANK,
    *,
    processes: int | None = None,
) -> CaptionTable:
    """Tokenize and number captions.

    rows: (M,) the photo of each of the M texts, ascending. processes: at most so many share the
    work if there is much; None for the cores that may be used. The table is the same. Raises
    TokenizerError.
    """
    tokens, lengths, words = _joined(_in_shares(texts, tokenizer, processes or cores()))
    parts = np.split(tokens, range(_COUNTED_TOKENS, len(tokens), _COUNTED_TOKENS))
    counts = np.zeros(len(words), np.int64)
    for part in parts:
        counts += np.bincount(part, minlength=len(words))
    order = sorted(range(len(words)), key=lambda number: (-counts[number], words[number]))
    final_numbers = np.zeros(len(words), np.int32)
    final_numbers[order] = np.arange(len(words))
    for part in parts:
        part[:] = final_numbers[part]
    return CaptionTable(
        texts=texts,
        rows=rows,
        tokens=tokens,
        token_offsets=offsets_of(lengths),
        words=Strings.pack(words[number] for number in order),
        counts=counts[order],
        tokenizer=tokenizer,
    )


def number(texts: Sequence[str], tokenizer: str) -> Numbered:
    """Tokenize and number some captions. Raises TokenizerError."""
    # Numbers at once: lists of words would take ten times the memory.
    numbers: defaultdict[str, int] = defaultdict(lambda: len(numbers))
    flat, lengths = array("i"), np.zeros(len(texts), np.int64)
    for index, text in enumerate(texts):
        tokens = [numbers[token] for token in tokenize(text, tokenizer)]
        lengths[index] = len(tokens)
        flat.extend(tokens)
    return Numbered(np.frombuffer(flat, np.int32), lengths, list(numbers))


def _in_shares(texts: Strings, tokenizer: str, most: int) -> list[Numbered]:
    """`number` of consecutive shares of the texts, the first one here and the others elsewhere."""
    count = max(1, min(most, len(texts) // _SHARE))
    bounds = [len(texts) * share // count for share in range(count + 1)]
    shares = [texts.part(start, stop) for start, stop in pairwise(bounds)]
    with ThreadPoolExecutor(count) as threads:
        others = [threads.submit(_elsewhere, share, tokenizer) for share in shares[1:]]
        first = number(shares[0], tokenizer)
        return [first, *(other.result() for other in others)]


def _elsewhere(texts: Strings, tokenizer: str) -> Numbered:
    """`number` in another process; here if that fails, for want of memory for one.

    It is a fresh interpreter, which imports the same modules as this one: forks do not go together
    with threads, nor with CUDA.
    """
    path = list(map(os.path.abspath, sys.path))
    code = f"import sys; sys.path[:] = {path}; from {__name__} import answer; answer()"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            input=pickle.dumps((texts, tokenizer), protocol=5),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a terminal sends Ctrl-C to all of a session
            check=True,
        )
        found: Numbered = pickle.loads(done.stdout)
        return found
    except (OSError, subprocess.SubprocessError, pickle.UnpicklingError, EOFError):
        return number(texts, tokenizer)


def answer() -> None:
    """The other process: `number` of what comes on its standard input."""
    found = number(*pickle.load(sys.stdin.buffer))
    pickle.dump(found, sys.stdout.buffer, protocol=5)


def _joined(
    shares: list[Numbered],
) -> tuple[NDArray[np.int32], NDArray[np.int64], list[str]]:
    """(tokens, lengths, words) of all shares, with words numbered as they first appear. Empties
    the list.
    """
    numbers: defaultdict[str, int] = defaultdict(lambda: len(numbers))
    lengths = np.concatenate([share.lengths for share in shares])
    alone = len(shares) == 1
    tokens = shares[0].tokens if alone else np.empty(lengths.sum(), np.int32)
    start = 0
    while shares:
        share = shares.pop(0)  # nobody needs it afterwards
        final = np.array([numbers[word] for word in share.words], np.int32)
        for first in range(0, len(share.tokens), _COUNTED_TOKENS):
            part = share.tokens[first : first + _COUNTED_TOKENS]
            tokens[start : start + len(part)] = final[part]
            start += len(part)
    return tokens, lengths, list(numbers)
