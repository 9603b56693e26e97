from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from nltk.tokenize import NLTKWordTokenizer

from train.captions import tokenizer
from train.captions.tokenizer import tokenize


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
