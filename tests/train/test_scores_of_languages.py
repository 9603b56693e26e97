"""Scores of captions that the official tools, which know English, do not know."""

from __future__ import annotations

import pytest

from train.captions.script import CHARACTERS, TREEBANK, WHITESPACE
from train.scores.human_agreement import human_agreement
from train.scores.metrics import Scores, score

CHINESE = {"1": ["一只狗在草地上奔跑。", "狗在跑"], "2": ["两只猫睡在床上。", "猫在睡觉"]}
RUSSIAN = {"1": ["Собака бежит по траве.", "собака бежит"], "2": ["Две кошки спят."]}


def first_captions(references: dict[str, list[str]], **options: object) -> Scores:
    captions = {image: texts[0] for image, texts in references.items()}
    return score(captions, references, **options)  # type: ignore[arg-type]


def test_characters_are_counted_as_words() -> None:
    exact = first_captions(CHINESE, tokenizer=CHARACTERS)
    assert exact.bleu_4 == pytest.approx(1)
    assert exact.tokenizer == CHARACTERS
    # Eleven of thirteen characters are right, and signs do not count; no caption is too short.
    spoken = {"1": "一 只 狗 在 草 地 上 睡 觉", "2": "猫 在 睡 觉 ！"}
    near = score(spoken, CHINESE, tokenizer=CHARACTERS)
    assert near.bleu_1 == pytest.approx(11 / 13)
    assert near.meteor is None


@pytest.mark.parametrize("tokenizer", [CHARACTERS, WHITESPACE])
def test_english_tools_are_named_as_missing_for_another_tokenizer(tokenizer: str) -> None:
    scores = first_captions(RUSSIAN, tokenizer=tokenizer)
    assert scores.meteor is None
    assert scores.notices == (
        f"using tokens of --tokenizer {tokenizer} instead of PTBTokenizer's, and leaving out "
        "METEOR: both know English alone",
    )


def test_english_tools_are_named_as_missing_for_another_script() -> None:
    scores = first_captions(RUSSIAN)
    assert (scores.meteor, scores.tokenizer) == (None, TREEBANK)
    assert scores.bleu_1 == pytest.approx(1)
    (notice,) = scores.notices
    assert notice.startswith("captions in Cyrillic, but PTBTokenizer knows English: using NLTK's")
    assert notice.endswith("leaving out METEOR")
    assert first_captions(RUSSIAN, java=False).notices == ()


def test_a_tokenizer_that_makes_words_of_sentences_is_told() -> None:
    told = first_captions(CHINESE, java=False).notices
    assert [notice.partition(",")[0] for notice in told] == ["the captions are in Chinese"]


def test_people_are_compared_by_the_same_tokens() -> None:
    people = human_agreement(CHINESE, tokenizer=CHARACTERS)
    assert people.tokenizer == CHARACTERS
    assert people.scores["bleu_1"] > 0.1
    assert human_agreement(CHINESE, java=False).scores["bleu_1"] == pytest.approx(0, abs=1e-6)
