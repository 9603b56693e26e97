from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import real_captions
from train.scores import java, meteor
from train.scores.intervals import intervals
from train.scores.metrics import MetricsError, score

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java")

REFERENCES = {
    "1": ["a dog runs on the grass", "the dog is running"],
    "2": ["two cats sleep", "cats sleeping on a red bed"],
    "3": ["a man rides a horse on the beach", "a horse and a man"],
}
HYPOTHESES = {"1": "a dog runs on grass", "2": "two cats on a bed", "3": "a man on the beach"}


def ngrams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def textbook_bleu(order: int) -> float:
    """Papineni et al. (2002): clipped precisions over the corpus, brevity by closest reference."""
    log_precision, hypothesis_length, reference_length = 0.0, 0, 0
    for n in range(1, order + 1):
        hits = total = 0
        for image, text in HYPOTHESES.items():
            most: Counter[tuple[str, ...]] = Counter()
            for reference in REFERENCES[image]:
                most |= ngrams(reference, n)
            found = ngrams(text, n)
            hits += (found & most).total()
            total += found.total()
        log_precision += math.log(hits / total) / order
    for image, text in HYPOTHESES.items():
        length = len(text.split())
        hypothesis_length += length
        reference_length += min(
            (abs(len(r.split()) - length), len(r.split())) for r in REFERENCES[image]
        )[1]
    return math.exp(log_precision) * math.exp(min(0, 1 - reference_length / hypothesis_length))


def textbook_rouge_l() -> float:
    """Lin (2004), beta 1.2: the best recall and the best precision over the references."""

    def common(a: list[str], b: list[str]) -> int:
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = (
                    table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
                )
        return table[-1][-1]

    total = 0.0
    for image, text in HYPOTHESES.items():
        words = text.split()
        pairs = [(common(r.split(), words), len(r.split())) for r in REFERENCES[image]]
        recall = max(hit / length for hit, length in pairs)
        precision = max(hit / len(words) for hit, _ in pairs)
        total += (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    return total / len(HYPOTHESES)


def textbook_cider() -> float:
    """CIDEr-D of Vedantam et al. (2015): clipped tf-idf cosine of 1- to 4-grams, Gaussian length
    penalty with sigma 6, times 10.
    """
    frequency: Counter[tuple[str, ...]] = Counter()
    for texts in REFERENCES.values():
        frequency.update(set().union(*(set(ngrams(t, n)) for t in texts for n in range(1, 5))))

    def vector(text: str, n: int) -> dict[tuple[str, ...], float]:
        return {
            gram: count * (math.log(len(REFERENCES)) - math.log(max(1, frequency[gram])))
            for gram, count in ngrams(text, n).items()
        }

    total = 0.0
    for image, text in HYPOTHESES.items():
        for reference in REFERENCES[image]:
            gap = len(text.split()) - len(reference.split())
            for n in range(1, 5):
                a, b = vector(text, n), vector(reference, n)
                norms = math.hypot(*a.values(), 0) * math.hypot(*b.values(), 0)
                dot = sum(min(a[gram], b[gram]) * b[gram] for gram in a.keys() & b.keys())
                if norms:
                    total += dot / norms * math.exp(-(gap**2) / 72) / 4 / len(REFERENCES[image])
    return 10 * total / len(HYPOTHESES)


def test_scores_are_the_textbooks() -> None:
    scores = score(HYPOTHESES, REFERENCES, java=False)
    assert scores.bleu_1 == pytest.approx(textbook_bleu(1), rel=1e-6)
    assert scores.bleu_2 == pytest.approx(textbook_bleu(2), rel=1e-6)
    assert scores.rouge_l == pytest.approx(textbook_rouge_l(), rel=1e-9)
    # pycocoevalcap measures the difference in length in 2-grams. Here that is the same number.
    assert scores.cider == pytest.approx(textbook_cider(), rel=1e-6)
    assert scores.meteor is None
    assert (scores.count, scores.tokenizer) == (3, "treebank")


def test_the_references_own_words_score_full_marks(capfd: pytest.CaptureFixture[str]) -> None:
    hypotheses = {image: texts[0] for image, texts in REFERENCES.items()}
    hypotheses["2"] = "Cats sleeping, on a red bed."
    scores = score(hypotheses, REFERENCES, java=False)
    assert scores.bleu_1 == pytest.approx(1)
    assert scores.bleu_4 == pytest.approx(1)
    assert scores.rouge_l == pytest.approx(1)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_case_and_punctuation_do_not_count() -> None:
    loud = {image: f'  "{text.upper()}" !\n' for image, text in HYPOTHESES.items()}
    assert score(loud, REFERENCES, java=False) == score(HYPOTHESES, REFERENCES, java=False)


def test_an_empty_caption_scores_nothing_and_breaks_nothing() -> None:
    scores = score(HYPOTHESES | {"2": ""}, REFERENCES, java=False)
    assert 0 < scores.bleu_1 < score(HYPOTHESES, REFERENCES, java=False).bleu_1
    assert score({"1": ""}, {"1": ["a dog"]}, java=False).bleu_4 == pytest.approx(0, abs=1e-9)


def test_captions_and_references_must_belong_together() -> None:
    with pytest.raises(MetricsError, match="no captions to score"):
        score({}, {})
    with pytest.raises(MetricsError, match="image 9 is only in the captions"):
        score(HYPOTHESES | {"9": "a"}, REFERENCES)
    with pytest.raises(MetricsError, match="image 1 has no reference"):
        score({"1": "a"}, {"1": []})
    with pytest.raises(MetricsError, match="no reference caption has a word"):
        score({"1": "a"}, {"1": ["...", ""]}, java=False)


def test_the_scores_of_the_photos_make_the_corpus_scores() -> None:
    scores = score(HYPOTHESES, REFERENCES, java=False)
    photos = scores.photos
    assert photos.bleu.bleu().tolist() == pytest.approx(
        [scores.bleu_1, scores.bleu_2, scores.bleu_3, scores.bleu_4]
    )
    assert photos.bleu.lengths.tolist() == [5, 5, 5]
    assert photos.bleu.closest.tolist() == [4, 6, 5]
    assert photos.bleu.correct[:, 1].tolist() == [3, 2, 3]  # 2-grams
    assert photos.cider.shape == photos.rouge_l.shape == (3,)


@needs_java
def test_official_tokens_and_meteor_with_java() -> None:
    odd = HYPOTHESES | {"2": "two\ncats \u2028on \x85 a ||| bed\0 (asleep)"}
    scores = score(odd, REFERENCES)
    assert scores.tokenizer == "ptb"
    assert scores.notices == ()
    assert scores.meteor is not None
    assert 0.1 < scores.meteor < 1
    low, high = intervals(scores.photos)["meteor"]
    assert low < scores.meteor < high


@needs_java
@pytest.mark.usefixtures("small_meteor")
def test_captions_that_equal_a_reference_have_full_meteor() -> None:
    scores = score({i: t[0] for i, t in REFERENCES.items()}, REFERENCES)
    assert scores.meteor == pytest.approx(1, abs=0.01)


@needs_java
@pytest.mark.usefixtures("small_meteor")
def test_meteor_of_any_photos_is_computed_as_its_program_computes_it() -> None:
    # The first equals its reference, a case that the program treats differently.
    texts = ["a dog runs on the grass", "two kittens on a bed", "a man on the beach", ""]
    truth = [*REFERENCES.values(), ["a bus"]]

    def of(*photos: int) -> tuple[float, np.ndarray]:
        found = {str(i): [texts[i]] for i in photos}
        return meteor.meteor({str(i): truth[i] for i in photos}, found)

    whole, counts = of(0, 1, 2, 3)
    assert counts.shape == (4, 23)
    assert meteor.corpus_meteor(counts.sum(0)) == pytest.approx(whole, abs=1e-12)
    drawn, _ = of(1, 2)
    assert meteor.corpus_meteor(counts[1:3].sum(0)) == pytest.approx(drawn, abs=1e-12)
    alone, _ = of(3)
    single = meteor.corpus_meteor(counts)  # of each photo
    assert single[3] == alone == 0
    assert single[0] == pytest.approx(1)
    assert 0.1 < single[1] < 1


@needs_java
@pytest.mark.parametrize("name", ["coco", "flickr8k"])
def test_java_and_its_stand_in_agree_on_real_captions(sample_data: Path, name: str) -> None:
    captions = real_captions(sample_data, name)
    hypotheses = {image: texts[0] for image, texts in captions.items()}
    references = {image: texts[1:] for image, texts in captions.items()}
    official = score(hypotheses, references, meteor=False)
    stand_in = score(hypotheses, references, java=False)
    assert official.tokenizer == "ptb"
    for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"):
        assert getattr(stand_in, name) == pytest.approx(getattr(official, name), abs=0.003), name


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo no memory >&2; exit 1", "no memory"),
        ("exec sleep 30", "no answer in 1 s"),
        ("exit 0", "0 lines came back for 9"),
    ],
)
def test_a_broken_java_is_a_notice_not_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    (tmp_path / "java").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(java, "TIMEOUT_S", 1.0)
    scores = score(HYPOTHESES, REFERENCES)
    assert scores.tokenizer == "treebank"
    assert scores.meteor is None
    assert reason in scores.notices[0]


def test_no_java_is_a_notice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = score(HYPOTHESES, REFERENCES)
    assert scores.tokenizer == "treebank"
    assert scores.notices[0].startswith("no Java")


@needs_java
@pytest.mark.parametrize("script", ["exit 1", "exec sleep 30", "echo nonsense"])
def test_a_broken_meteor_costs_meteor_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    real = shutil.which("java")
    (tmp_path / "java").write_text(
        f'#!/bin/sh\ncase "$*" in *meteor*) {script};; *) exec {real} "$@";; esac\n'
    )
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(java, "TIMEOUT_S", 5.0)
    scores = score(HYPOTHESES, REFERENCES)
    assert scores.tokenizer == "ptb"
    assert scores.meteor is None
    assert scores.notices[0].startswith("no METEOR: Java fails")
