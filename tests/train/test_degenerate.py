"""Captions that are none are told from captions that are few, short or alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import real_captions
from train.captions.tokenizer import tokenize
from train.scores.degenerate import degenerate

GOOD = ["a dog runs on the grass .", "a man and a woman sit on a bench .", "two children play ."]


def reason(*captions: str) -> str | None:
    return degenerate([caption.split() for caption in captions])


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (["a a a in a a . a . . ."], "words repeat within the captions"),
        (["a man a a a . . . a . the . .", *GOOD[:1]], "words repeat within the captions"),
        (["a dog dog in in the water ."] * 3, "words repeat within the captions"),
        (["in of in on in the in of in the"], "words repeat within the captions"),
        (["a <unk> on a <unk> .", *GOOD[:1]], "15% of the words are <unk>"),
        (["", "", "a dog ."], "2 of 3 captions are empty"),
        ([""], "1 of 1 captions are empty"),
        (["a dog runs ."] * 50, "only 1 of 50 captions are different"),
        (["a dog runs ."] * 99 + ["a cat ."], "only 2 of 100 captions are different"),
    ],
)
def test_captions_that_say_nothing_are_named(captions: list[str], expected: str) -> None:
    assert reason(*captions) == expected


@pytest.mark.parametrize(
    "captions",
    [
        [],
        ["dog"],
        ["a very very tall man stands beside a very small dog ."],
        GOOD,
        [*GOOD, "a <unk> dog jumps ."],  # one word of twenty-five
        ["", *GOOD],
        ["a dog runs ."] * 49,  # photos of one scene
        ["a dog runs ."] * 97 + GOOD,
        ["一 个 妈 妈 在 慢 慢 走 路 和 孩 子 说 话", "一 只 狗 在 草 地 上 跑"],
    ],
)
def test_short_few_and_ordinary_captions_are_captions(captions: list[str]) -> None:
    assert reason(*captions) is None


@pytest.mark.parametrize("name", ["coco", "flickr"])
def test_peoples_captions_are_captions_however_few(name: str, sample_data: Path) -> None:
    captions = [c for five in real_captions(sample_data, name).values() for c in five]
    tokens = [list(tokenize(caption)) for caption in captions]
    assert len(tokens) == 5000
    assert degenerate(tokens) is None
    found = [degenerate(tokens[start : start + 8]) for start in range(0, len(tokens), 8)]
    assert found == [None] * 625
