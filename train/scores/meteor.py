"""METEOR 1.5 (Denkowski and Lavie, 2014), computed by its Java program over a line protocol.

The program aligns each caption with its references and answers with counts. The score of a corpus
follows from their sums. `corpus_meteor` repeats that last step in Python, for any choice of photos.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from train.scores import java
from train.scores.java import UTF_8, package_folder, write_lines

# The counts in a line. The first four are words of the caption and of its best reference, then
# function words of each. Then come four for each kind of match (exact, stem, synonym, paraphrase):
# content words of both, function words of both. The last are chunks, and matched words of both.
_COUNTS = 4 + 4 * 4 + 1 + 2
_CHUNKS = 20
# For English, from Constants.java: the weights of the kinds of match, of recall (alpha) and of
# content words (delta), and the exponent and weight of the fragmentation penalty (beta, gamma).
_MATCH_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75


def meteor(
    references: Mapping[str, list[str]], hypotheses: Mapping[str, list[str]]
) -> tuple[float, NDArray[np.float64]]:
    """Corpus METEOR of tokenized captions, and each image's counts (N, 23) for `corpus_meteor`.

    hypotheses: one caption per image. Raises OSError or ValueError if the program fails or does not
    answer in time.
    """

    def clean(text: str) -> str:
        return text.replace("|||", " ")

    return _run_meteor(
        [
            " ||| ".join(["SCORE", *map(clean, references[image]), clean(hypotheses[image][0])])
            for image in hypotheses
        ]
    )


def corpus_meteor(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """METEOR (…,) from summed counts (…, 23)."""
    words, reference_words, function, reference_function = np.moveaxis(sums[..., :4], -1, 0)
    chunks, matched, reference_matched = np.moveaxis(sums[..., _CHUNKS:], -1, 0)
    by_kind = sums[..., 4:_CHUNKS].reshape(*sums.shape[:-1], 4, 4)
    matches = np.moveaxis(np.einsum("...km,k->...m", by_kind, _MATCH_WEIGHTS), -1, 0)

    def weighted(
        content: NDArray[np.float64], function: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        return _DELTA * content + (1 - _DELTA) * function

    with np.errstate(divide="ignore", invalid="ignore"):
        precision = weighted(matches[0], matches[2]) / weighted(words - function, function)
        recall = weighted(matches[1], matches[3]) / weighted(
            reference_words - reference_function, reference_function
        )
        mean = 1 / ((1 - _ALPHA) / precision + _ALPHA / recall)
        fragmentation = chunks / ((matched + reference_matched) / 2)
        scores: NDArray[np.float64] = mean * (1 - _GAMMA * fragmentation**_BETA)
    return np.maximum(np.nan_to_num(scores), 0)


def _parse_counts(lines: list[str]) -> NDArray[np.float64]:
    """(N, 23) counts from the program's lines, adjusted so that their sums equal the program's."""
    counts = np.array([line.split() for line in lines], np.float64)
    if counts.shape != (len(lines), _COUNTS):
        raise ValueError("unexpected statistics")
    all_kinds = counts[:, 4:_CHUNKS].reshape(-1, 4, 4).sum(1)
    matched = all_kinds[:, :2] + all_kinds[:, 2:]  # (N, 2) words of the caption, of the reference
    # If a caption equals its reference, the program counts the one chunk as none.
    equal = (matched == counts[:, :2]).all(1) & (counts[:, _CHUNKS] == 1)
    counts[equal, _CHUNKS] = 0
    return counts


def _run_meteor(requests: list[str]) -> tuple[float, NDArray[np.float64]]:
    """(corpus METEOR, counts (N, 23)) for the program's N requests to score a caption."""
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
        # A thread writes, because METEOR answers while it reads, and pipes hold little.
        writer = threading.Thread(target=write_lines, args=(process.stdin, requests))
        writer.start()
        try:
            statistics = [process.stdout.readline().strip() for _ in requests]
            writer.join()
            if not all(statistics):
                raise ValueError("the program stopped early")
            write_lines(process.stdin, [" ||| ".join(["EVAL", *statistics])])
            # The answer is a score for each caption, then that of the corpus.
            answers = [process.stdout.readline() for _ in range(len(requests) + 1)]
            return float(answers[-1]), _parse_counts(statistics)
        finally:
            killer.cancel()
            process.kill()
            writer.join()
