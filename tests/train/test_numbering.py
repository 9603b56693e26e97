from __future__ import annotations

import random

import numpy as np
import pytest

from cache.record import CaptionTable, Strings
from train.captions import numbering
from train.captions.numbering import build_caption_table, number
from train.captions.tokenizer import TokenizerError

WORDS = ("a", "dog's", "ball,", "the", "cat.", "two", "women", "café", "don't", "犬", "“quoted”")


def made_up(count: int) -> list[list[str]]:
    draw = random.Random(0)
    return [
        [" ".join(draw.choices(WORDS, k=draw.randrange(9))) for _ in range(draw.randrange(4))]
        for _ in range(count)
    ]


def same(one: CaptionTable, other: CaptionTable) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("rows", "tokens", "token_offsets", "counts")
    ) and (one.texts, one.words, one.tokenizer) == (other.texts, other.words, other.tokenizer)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes shares small, and notes the sizes of those that other processes number."""
    sizes: list[int] = []
    original = numbering._elsewhere

    def noted(texts: Strings, tokenizer: str) -> numbering.Numbered:
        sizes.append(len(texts))
        return original(texts, tokenizer)

    monkeypatch.setattr(numbering, "_elsewhere", noted)
    monkeypatch.setattr(numbering, "_SHARE", 50)
    monkeypatch.setattr(numbering, "cores", lambda: 3)
    return sizes


@pytest.mark.parametrize("tokenizer", ["treebank", "characters"])
def test_shares_of_processes_give_the_same_table(
    elsewhere: list[int], monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    captions = made_up(200)
    here: list[int] = []

    def counted(texts: Strings, tokenizer: str) -> numbering.Numbered:
        here.append(len(texts))
        return number(texts, tokenizer)

    monkeypatch.setattr(numbering, "number", counted)
    shared = build_caption_table(captions, tokenizer)
    assert len(elsewhere) == 2
    assert len(here) == 1  # the others truly came from elsewhere
    assert sum(elsewhere + here) == sum(map(len, captions))
    assert same(shared, build_caption_table(captions, tokenizer, processes=1))
    assert len(elsewhere) == 2


def test_a_share_is_numbered_here_if_the_process_fails(
    elsewhere: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = [["a dog", "a cat sleeps"]] * 100
    expected = build_caption_table(captions)
    for program in ("/bin/false", "/bin/true", "/nowhere/python"):
        monkeypatch.setattr("sys.executable", program)
        assert same(build_caption_table(captions), expected)
    assert len(elsewhere) == 4 * 2
    with pytest.raises(TokenizerError, match="no tokenizer 'none'"):
        build_caption_table(captions, "none")


def test_texts_reach_the_other_process_as_they_are() -> None:
    texts = Strings.pack(["left", "two\nlines\0", "", "犬"]).part(1, 4)
    found = numbering._elsewhere(texts, "whitespace")
    assert found.words == ["two", "lines\0", "犬"]
    assert found.lengths.tolist() == [2, 0, 1]
