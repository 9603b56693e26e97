from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
from nltk.tokenize import NLTKWordTokenizer

from train.captions import tokenizer
from train.captions.script import CHARACTERS, WHITESPACE
from train.captions.tokenizer import TokenizerError, tokenize


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A dog's ball.", ["a", "dog", "'s", "ball", "."]),
        ("Two  men\tplay .", ["two", "men", "play", "."]),
        ("A man. He runs!", ["a", "man", ".", "he", "runs", "!"]),
        ("They can't, I cannot", ["they", "ca", "n't", ",", "i", "can", "not"]),
        ("I'm gonna go", ["i", "'m", "gon", "na", "go"]),
        ("a t.v. set", ["a", "t.v", ".", "set"]),
        ('a "stop" sign', ["a", "``", "stop", "''", "sign"]),
        ("black-and-white cat (asleep)", ["black-and-white", "cat", "(", "asleep", ")"]),
        ("", []),
        ("ÉCOLE", ["école"]),
    ],
)
def test_tokens_are_treebank_words(caption: str, tokens: list[str]) -> None:
    assert tokenize(caption) == tokens


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("一只狗。", ["一", "只", "狗", "。"]),
        (
            "骑着BMX-20自行车，2.5个！！",
            ["骑", "着", "bmx-20", "自", "行", "车", "，", "2.5", "个", "！！"],
        ),
        ("人々の ｶﾒﾗ", ["人", "々", "の", "ｶ", "ﾒ", "ﾗ"]),
        ("ผู้ชาย", ["ผู้", "ช", "า", "ย"]),  # with the vowel and the tone on a consonant
        ("A dog's ball...", ["a", "dog's", "ball", "..."]),
        ("한 남자가", ["한", "남자가"]),
        ("cafe\u0301 中", ["cafe\u0301", "中"]),
        (" \u0301a", ["\u0301", "a"]),
        ("", []),
    ],
)
def test_characters_are_tokens_where_there_are_no_spaces(caption: str, tokens: list[str]) -> None:
    assert tokenize(caption, CHARACTERS) == tokens


def test_between_spaces_everything_is_a_word() -> None:
    assert tokenize("Ein  Hund\tläuft.", WHITESPACE) == ["ein", "hund", "läuft."]


def test_an_unknown_tokenizer_is_named_with_those_that_there_are() -> None:
    with pytest.raises(TokenizerError, match="no tokenizer 'x', this program has treebank, white"):
        tokenize("a", "x")


def reference_tokens(caption: str) -> list[str]:
    """The tokens of NLTK alone, without the shortcut for plain captions."""
    text = " ".join(caption.lower().split())
    return [
        token
        for sentence in tokenizer._SENTENCE_END.split(text)
        for token in NLTKWordTokenizer().tokenize(sentence)
    ]


def test_the_shortcut_gives_nltks_tokens_on_random_captions() -> None:
    words = ["a", "cannot", "gonna", "dog", "2", ".", ".", "u.s.", "it's", ",", "more'n", "wanna."]
    words += ["tis", "d'ye", "gimme", "x.", "...", "end"]
    random = np.random.default_rng(0)
    for _ in range(2000):
        caption = " ".join(random.choice(words, size=random.integers(1, 8)))
        assert tokenize(caption) == reference_tokens(caption), caption


def test_the_shortcut_gives_nltks_tokens_on_real_captions(sample_data: Path) -> None:
    notes = json.loads((sample_data / "coco" / "captions_val2017.json").read_text())["annotations"]
    lines = (sample_data / "flickr8k" / "captions.txt").read_text().splitlines()[1:]
    captions = [note["caption"] for note in notes[:4000]]
    captions += [line.split(",", 1)[1] for line in lines[:4000]]
    assert [tokenize(c) for c in captions] == [reference_tokens(c) for c in captions]


def test_the_shortcut_agrees_with_nltk_on_text_of_awkward_words() -> None:
    random = Random(0)
    words = (
        *("a", "dog", "t-shirt", "man's", "1980's", "x-ray", "cannot", "wanna-be", "it's", "'s"),
        *("20", "1,000", "u.s", "don't", "black-and-white", "-", "--", "d's", "re-ll", "o'clock"),
    )
    shortcut = 0
    for _ in range(5000):
        parts = [
            random.choice(words) + random.choice((" ", " ", ", ", " , ", ",", " . "))
            for _ in range(random.randint(1, 6))
        ]
        text = "".join(parts).strip() + random.choice(("", " .", ".", ",", "!"))
        shortcut += tokenizer._PLAIN.match(text) is not None
        sentences = tokenizer._SENTENCE_END.split(text)
        expected = [token for part in sentences for token in NLTKWordTokenizer().tokenize(part)]
        assert tokenize(text) == expected, text
    assert shortcut > 150
