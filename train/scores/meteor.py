"""METEOR 1.5 (Denkowski and Lavie, 2014), by its Java program's line protocol.

The program aligns each caption with its references and answers with counts; a corpus's score is
computed from their sums. `corpus_meteor` does that last step as the program does, for sums of other
photos than all of them.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from train.scores import java
from train.scores.java import UTF_8, package_folder, write_lines

# The counts of a line, for the caption and its best reference: words, function words; matches by
# word, stem, synonym and paraphrase, of content and function words; chunks; words in matches.
_COUNTS = 4 + 4 * 4 + 1 + 2
_CHUNKS = 20
# For English: how a kind of match counts, what recall weighs, the two of the penalty for
# fragments, what a content word weighs (Constants.java).
_MATCH_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75


def meteor(
    references: Mapping[str, list[str]], hypotheses: Mapping[str, list[str]]
) -> tuple[float, NDArray[np.float64]]:
    """Corpus METEOR of tokenized captions, one hypothesis an image, and the counts of each image.

    The counts (N, 23) are for `corpus_meteor`. Raises OSError or ValueError if the program fails
    or does not answer in time.
    """

    def clean(text: str) -> str:
        return text.replace("|||", " ")

    return _ask(
        [
            " ||| ".join(["SCORE", *map(clean, references[image]), clean(hypotheses[image][0])])
            for image in hypotheses
        ]
    )


def corpus_meteor(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """METEOR (…,) of summed counts (…, 23)."""
    words, their_words, function, their_function = np.moveaxis(sums[..., :4], -1, 0)
    chunks, matched, their_matched = np.moveaxis(sums[..., _CHUNKS:], -1, 0)
    by_kind = sums[..., 4:_CHUNKS].reshape(*sums.shape[:-1], 4, 4)
    matches = np.moveaxis(np.einsum("...km,k->...m", by_kind, _MATCH_WEIGHTS), -1, 0)

    def weighted(
        content: NDArray[np.float64], function: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        return _DELTA * content + (1 - _DELTA) * function

    with np.errstate(divide="ignore", invalid="ignore"):
        precision = weighted(matches[0], matches[2]) / weighted(words - function, function)
        recall = weighted(matches[1], matches[3]) / weighted(
            their_words - their_function, their_function
        )
        mean = 1 / ((1 - _ALPHA) / precision + _ALPHA / recall)
        fragments = chunks / ((matched + their_matched) / 2)
        scores: NDArray[np.float64] = mean * (1 - _GAMMA * fragments**_BETA)
    return np.maximum(np.nan_to_num(scores), 0)


def _counts(lines: list[str]) -> NDArray[np.float64]:
    """(N, 23) of the program's lines, such that they add up as the program adds them."""
    counts = np.array([line.split() for line in lines], np.float64)
    if counts.shape != (len(lines), _COUNTS):
        raise ValueError("unexpected statistics")
    of_kind = counts[:, 4:_CHUNKS].reshape(-1, 4, 4).sum(1)
    matched = of_kind[:, :2] + of_kind[:, 2:]  # of the caption, of the reference
    # A caption that is its reference is in one piece, and that piece costs nothing.
    whole = (matched == counts[:, :2]).all(1) & (counts[:, _CHUNKS] == 1)
    counts[whole, _CHUNKS] = 0
    return counts


def _ask(requests: list[str]) -> tuple[float, NDArray[np.float64]]:
    """A line of statistics comes back for each request, then their score."""
    command = ["java", *UTF_8, "-Xmx2G", "-jar", "meteor-1.5.jar", "-", "-", "-stdio"]
    command += ["-l", "en", "-norm"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        cwd=package_folder() / "meteor",
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        killer = threading.Timer(java.TIMEOUT_S, process.kill)
        killer.start()
        # Written from beside: METEOR answers while it reads, and pipes are short.
        writer = threading.Thread(target=write_lines, args=(process.stdin, requests))
        writer.start()
        try:
            statistics = [process.stdout.readline().strip() for _ in requests]
            writer.join()
            if not all(statistics):
                raise ValueError("it stopped")
            write_lines(process.stdin, [" ||| ".join(["EVAL", *statistics])])
            # One score a caption comes back, then the one of the corpus.
            answers = [process.stdout.readline() for _ in range(len(requests) + 1)]
            return float(answers[-1]), _counts(statistics)
        finally:
            killer.cancel()
            process.kill()
            writer.join()
