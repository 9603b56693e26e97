from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from nltk.tokenize import NLTKWordTokenizer

from train.captions import vocabulary as vocab
from train.captions.vocabulary import (
    END,
    UNK,
    Vocabulary,
    VocabularyError,
    build_caption_table,
    build_vocabulary,
    tokenize,
)


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
    """NLTK alone, without the shortcut for plain captions."""
    text = " ".join(caption.lower().split())
    return [
        token
        for sentence in vocab._SENTENCE_END.split(text)
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


CAPTIONS = [["a a a dog", "the dog"], ["a cat"]]


def test_a_vocabulary_is_a_prefix_of_the_word_table() -> None:
    table = build_caption_table(CAPTIONS)
    vocabulary = build_vocabulary(table, min_count=2)
    assert vocabulary.words == ("a", "dog")
    assert vocabulary.counts == (4, 2)
    assert len(vocabulary) == 6
    assert len(build_vocabulary(table, min_count=1)) == 8
    assert vocabulary.numbers_for(table).tolist() == [4, 5, UNK, UNK]


def test_encoding_and_decoding_are_inverse_for_known_words() -> None:
    vocabulary = build_vocabulary(build_caption_table(CAPTIONS), min_count=1)
    numbers = vocabulary.encode("A cat the dog")
    assert vocabulary.decode([*numbers, END, 4]) == "a cat the dog"
    assert vocabulary.encode("unknown") == [UNK]


def test_no_word_often_enough_is_one_line() -> None:
    with pytest.raises(VocabularyError, match="no word occurs 9 times in 3 captions"):
        build_vocabulary(build_caption_table(CAPTIONS), min_count=9)


def test_a_saved_vocabulary_is_loaded_back(tmp_path: Path) -> None:
    vocabulary = build_vocabulary(build_caption_table([["é dog"]]), min_count=1)
    vocabulary.save(tmp_path / "v.json")
    assert Vocabulary.from_json((tmp_path / "v.json").read_text("utf-8")) == vocabulary
    for text in ("", "[]", '{"words": ["a"], "counts": [], "min_count": 1}', '{"words": [1]}'):
        with pytest.raises(VocabularyError):
            Vocabulary.from_json(text)
