"""Caption scores: BLEU, METEOR, ROUGE-L and CIDEr, by pycocoevalcap's own scorers.

The official tokenizer (Stanford's PTBTokenizer) and METEOR are Java programs inside pycocoevalcap.
They are used where Java is present. Without Java the same scorers run on NLTK's Penn Treebank
tokens, adjusted to Stanford's habits; the scores then say so. On COCO and Flickr8k captions the
two differ by less than 0.3 points of 100 (`tests/test_metrics.py` measures it where it can).
"""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from cache.errors import CapError
from train.vocab import treebank_tokens

# What pycocoevalcap drops after tokenizing. Everything is lower case by then, so its upper-case
# bracket names never match, and brackets count as words.
_PUNCTUATION = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
# Where Stanford's tokens differ from NLTK's in more than a handful of captions.
_STANFORD = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_STANFORD[".."] = "..."
_JAVA_TIMEOUT_S = 600.0


class MetricsError(CapError):
    """Nothing to score, or captions and references that do not belong together. One line."""


@dataclass(frozen=True)
class Scores:
    """Corpus scores as fractions (papers print them times 100; CIDEr may exceed 1).

    tokenizer: `ptb` (official, Java) or `treebank` (NLTK). meteor: None without Java.
    """

    bleu_1: float
    bleu_2: float
    bleu_3: float
    bleu_4: float
    meteor: float | None
    rouge_l: float
    cider: float
    count: int  # captions scored
    tokenizer: str
    notices: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "bleu_1": self.bleu_1,
            "bleu_2": self.bleu_2,
            "bleu_3": self.bleu_3,
            "bleu_4": self.bleu_4,
            "meteor": self.meteor,
            "rouge_l": self.rouge_l,
            "cider": self.cider,
            "count": self.count,
            "tokenizer": self.tokenizer,
        }


def score(
    hypotheses: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    java: bool | None = None,
    meteor: bool = True,
) -> Scores:
    """Score one caption an image against the image's references, over the whole corpus.

    java: whether to use it; None: if it is there and works. CIDEr's document frequencies come from
    these references, as in the official evaluation. Raises MetricsError.
    """
    if not hypotheses:
        raise MetricsError("no captions to score")
    if hypotheses.keys() != references.keys():
        odd = next(iter(hypotheses.keys() ^ references.keys()))
        where = "captions" if odd in hypotheses else "references"
        raise MetricsError(f"captions and references differ: image {odd} is only in the {where}")
    for image, texts in references.items():
        if not texts:
            raise MetricsError(f"image {image} has no reference caption")
    notices: list[str] = []
    ids = list(hypotheses)
    texts = [hypotheses[image] for image in ids]
    texts += [text for image in ids for text in references[image]]
    tokenized, tokenizer = _tokenize(texts, java, notices)
    found = {image: [tokenized[i]] for i, image in enumerate(ids)}
    rest = iter(tokenized[len(ids) :])
    truth = {image: [next(rest) for _ in references[image]] for image in ids}
    bleu, rouge_l, cider = _python_scores(truth, found)
    return Scores(
        bleu_1=bleu[0],
        bleu_2=bleu[1],
        bleu_3=bleu[2],
        bleu_4=bleu[3],
        meteor=_meteor(truth, found, notices) if meteor and tokenizer == "ptb" else None,
        rouge_l=rouge_l,
        cider=cider,
        count=len(ids),
        tokenizer=tokenizer,
        notices=tuple(notices),
    )


def _python_scores(
    references: Mapping[str, list[str]], hypotheses: Mapping[str, list[str]]
) -> tuple[list[float], float, float]:
    """(BLEU-1..4, ROUGE-L, CIDEr) of tokenized captions, one hypothesis an image."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    with contextlib.redirect_stdout(io.StringIO()):  # Bleu prints its lengths
        bleu, _ = Bleu(4).compute_score(references, hypotheses, verbose=0)
        rouge_l, _ = Rouge().compute_score(references, hypotheses)
        cider, _ = Cider().compute_score(references, hypotheses)
    return [float(value) for value in bleu], float(rouge_l), float(cider)


def _tokenize(texts: Sequence[str], java: bool | None, notices: list[str]) -> tuple[list[str], str]:
    """(tokens joined by spaces, punctuation dropped; name of the tokenizer)."""
    # The official tokenizer works by lines: nothing in a caption may begin a new one.
    lines = [" ".join(text.split()).replace("\0", " ") for text in texts]
    if java is not False:
        if shutil.which("java") is None:
            notices.append("no Java: NLTK's Treebank tokens instead of PTBTokenizer's, no METEOR")
        else:
            try:
                return _ptb_tokens(lines), "ptb"
            except (OSError, subprocess.SubprocessError, ValueError) as error:
                notices.append(
                    f"Java fails ({_reason(error)}): NLTK's Treebank tokens instead of "
                    "PTBTokenizer's, no METEOR"
                )
    return [_treebank_line(line) for line in lines], "treebank"


@cache
def _package_folder() -> Path:
    import pycocoevalcap.bleu.bleu

    return Path(pycocoevalcap.bleu.bleu.__file__).parent.parent


def _java(arguments: Sequence[str], lines: Sequence[str], folder: Path) -> list[str]:
    """Run a Java program over lines of text; its lines of output. Raises SubprocessError."""
    result = subprocess.run(
        ["java", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", *arguments],
        input="".join(line + "\n" for line in lines),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        cwd=folder,
        timeout=_JAVA_TIMEOUT_S,
        check=True,
    )
    output = result.stdout.split("\n")
    return output[:-1] if output[-1] == "" else output


def _ptb_tokens(lines: Sequence[str]) -> list[str]:
    output = _java(
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
        _package_folder() / "tokenizer",
    )
    if len(output) != len(lines):
        raise ValueError(f"{len(output)} lines came back for {len(lines)}")
    return [_without_punctuation(line.split()) for line in output]


def _without_punctuation(tokens: Sequence[str]) -> str:
    return " ".join(token for token in tokens if token not in _PUNCTUATION)


def _meteor(
    references: Mapping[str, list[str]],
    hypotheses: Mapping[str, list[str]],
    notices: list[str],
) -> float | None:
    """Corpus METEOR 1.5 by its line protocol: a line of statistics a caption, then their score."""

    def clean(text: str) -> str:
        return text.replace("|||", " ")

    requests = [
        " ||| ".join(["SCORE", *map(clean, references[image]), clean(hypotheses[image][0])])
        for image in hypotheses
    ]
    try:
        return _ask_meteor(requests)
    except (OSError, ValueError) as error:
        notices.append(f"no METEOR: Java fails ({_reason(error)})")
        return None


def _ask_meteor(requests: Sequence[str]) -> float:
    """Raises OSError or ValueError if the program fails or does not answer in time."""
    command = ["java", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-Xmx2G", "-jar"]
    command += ["meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        cwd=_package_folder() / "meteor",
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        killer = threading.Timer(_JAVA_TIMEOUT_S, process.kill)
        killer.start()
        # Written from beside: METEOR answers while it reads, and pipes are short.
        writer = threading.Thread(target=_write_lines, args=(process.stdin, requests))
        writer.start()
        try:
            statistics = [process.stdout.readline().strip() for _ in requests]
            writer.join()
            if not all(statistics):
                raise ValueError("it stopped")
            _write_lines(process.stdin, [" ||| ".join(["EVAL", *statistics])])
            # One score a caption comes back, then the one of the corpus.
            answers = [process.stdout.readline() for _ in range(len(requests) + 1)]
            return float(answers[-1])
        finally:
            killer.cancel()
            process.kill()
            writer.join()


def _write_lines(stream: IO[str], lines: Sequence[str]) -> None:
    with contextlib.suppress(OSError):  # the reader finds out that the program is gone
        stream.writelines(line + "\n" for line in lines)
        stream.flush()


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in str(error.stderr).splitlines() if line.strip()]
        return (lines[0] if lines else f"exit code {error.returncode}")[:160]
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no answer in {error.timeout:.0f} s"
    return str(error).splitlines()[0][:160]


def _treebank_line(line: str) -> str:
    tokens = treebank_tokens(line.lower())
    return _without_punctuation([_STANFORD.get(token, token) for token in tokens])
