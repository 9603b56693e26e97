from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.captions.numbering import build_caption_table
from train.captions.script import TREEBANK, WHITESPACE
from train.captions.tokenizer import tokenize
from train.captions.vocabulary import END, UNK, Vocabulary, VocabularyError, build_vocabulary

CAPTIONS = [["a a a dog", "the dog"], ["a cat"]]


def test_a_vocabulary_is_a_prefix_of_the_word_table() -> None:
    table = build_caption_table(CAPTIONS)
    vocabulary = build_vocabulary(table, min_count=2)
    assert vocabulary.words == ("a", "dog")
    assert vocabulary.counts == (4, 2)
    assert len(vocabulary) == 6
    assert len(build_vocabulary(table, min_count=1)) == 8
    assert vocabulary.numbers_for(table).tolist() == [4, 5, UNK, UNK]


def test_only_chosen_photos_and_the_first_words_are_counted() -> None:
    captions = [["a dog runs", "dog dog"], ["a cat cat"], [], ["zebra cat bird bird"]]
    table = build_caption_table(captions)
    vocabulary = build_vocabulary(table, 1, rows=np.array([0, 3]))
    # Equally frequent words are in alphabetical order, whatever their order in the table.
    assert vocabulary.words == ("dog", "bird", "a", "cat", "runs", "zebra")
    assert vocabulary.counts == (3, 2, 1, 1, 1, 1)
    assert build_vocabulary(table, 2, rows=np.array([0, 3])).words == ("dog", "bird")
    cut = build_vocabulary(table, 1, rows=np.array([3, 1]), max_length=2)
    assert dict(zip(cut.words, cut.counts, strict=True)) == {"cat": 2, "a": 1, "zebra": 1}
    everything = build_vocabulary(table, 1, rows=np.arange(4), max_length=50)
    assert everything == build_vocabulary(table, 1)
    with pytest.raises(VocabularyError, match="no word occurs 3 times in 1 captions"):
        build_vocabulary(table, 3, rows=np.array([1]))
    with pytest.raises(VocabularyError, match="none of the 4 captions is of an extracted photo"):
        build_vocabulary(table, 1, rows=np.array([2]))


def test_the_numbers_of_known_words_are_decoded_back() -> None:
    vocabulary = build_vocabulary(build_caption_table(CAPTIONS), min_count=1)
    numbers = [vocabulary.number(word) for word in tokenize("A cat the dog")]
    assert vocabulary.decode([*numbers, END, 4]) == "a cat the dog"
    assert vocabulary.number("unknown") == UNK


def test_cases_are_those_of_known_words_in_the_captions_that_are_counted() -> None:
    table = build_caption_table([["to Rome", "in Rome by Ann"], ["a rome", "of rome"]])
    assert build_vocabulary(table, 1, rows=np.array([0])).cases == {"rome": "Rome"}
    assert build_vocabulary(table, 1).cases == {}
    assert "cases" not in build_vocabulary(table, 1).as_dict()


def test_no_word_often_enough_is_one_line() -> None:
    with pytest.raises(VocabularyError, match="no word occurs 9 times in 3 captions"):
        build_vocabulary(build_caption_table(CAPTIONS), min_count=9)


def test_a_word_that_no_file_can_hold_is_found_before_training() -> None:
    table = build_caption_table([["a a a dog \udcff\udcff"]])
    assert build_vocabulary(table, min_count=2).words == ("a",)
    with pytest.raises(
        VocabularyError, match=r"a word contains '\\udcff\\udcff', which is not text"
    ):
        build_vocabulary(table, min_count=1)


@pytest.mark.parametrize("tokenizer", [TREEBANK, WHITESPACE])
def test_a_saved_vocabulary_is_loaded_back(tmp_path: Path, tokenizer: str) -> None:
    table = build_caption_table([["é dog in Rome", "to Rome"]], tokenizer)
    vocabulary = build_vocabulary(table, min_count=1)
    assert (vocabulary.tokenizer, vocabulary.cases) == (tokenizer, {"rome": "Rome"})
    vocabulary.save(tmp_path / "v.json")
    saved = json.loads((tmp_path / "v.json").read_text("utf-8"))
    assert Vocabulary.from_dict(saved) == vocabulary


@pytest.mark.parametrize(
    "record",
    [
        *("", [], {"words": ["a"], "counts": [], "min_count": 1}, {"words": [1]}),
        {"words": ["a"], "counts": [1], "min_count": 1, "tokenizer": "x"},
        {"words": ["a"], "counts": [1], "min_count": 1, "tokenizer": []},
        {"words": ["a"], "counts": [1], "min_count": 1, "cases": {"a": "B"}},
        {"words": ["a"], "counts": [1], "min_count": 1, "cases": {"a": 1}},
        {"words": ["a"], "counts": [1], "min_count": 1, "cases": ["a"]},
    ],
)
def test_what_is_no_vocabulary_is_refused(record: Any) -> None:
    with pytest.raises(VocabularyError, match="not a vocabulary"):
        Vocabulary.from_dict(record)
