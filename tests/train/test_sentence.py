from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from nltk.tokenize.treebank import TreebankWordDetokenizer

from train.captions import sentence as module
from train.captions.casing import written_cases
from train.captions.numbering import build_caption_table
from train.captions.script import CHARACTERS, TREEBANK, WHITESPACE
from train.captions.sentence import sentence
from train.captions.tokenizer import tokenize
from train.captions.vocabulary import Vocabulary
from train.captions.word_places import word_places


def vocabulary(tokenizer: str = TREEBANK, **cases: str) -> Vocabulary:
    return Vocabulary((), (), 1, tokenizer, cases)


@pytest.mark.parametrize(
    "written",
    [
        "A man sits on a wooden bench.",
        "A man. He can't run! Is it?",
        "The dog's ball, the dogs' balls; two of them: red.",
        "I'm gonna go, cannot stay.",
        'A "stop" sign, "go".',
        'A sign says: "stop!" in red.',
        "A 'stop' sign says 'no'.",
        "“Stop” and ‘go’ and «oui».",
        "„Halt“ sagt »er«.",
        "The dog’s ball, they don’t.",
        "A (red) ball [sic].",
        "'Tis rock 'n' roll, mac n' cheese.",
        "5'10\" tall",
        "A t.v. set in st. Louis.",
        "Wait... what?",
        "3.5% of $5, it's #1!",
        "Black & white T-shirts",
        "Élan vital.",
        "10 men",
        ".",
        "",
    ],
)
def test_a_sentence_is_written_as_it_was(written: str) -> None:
    cases = {"i": "I", "louis": "Louis", "t-shirts": "T-shirts"}
    assert sentence(tokenize(written), vocabulary(**cases)) == written


@pytest.mark.parametrize(
    ("tokens", "written"),
    [
        ("a `` stop sign .", "A stop sign."),
        ("a stop '' sign .", "A stop sign."),
        ("`` ( a '' b ) c", '"A" b c'),
        ("a ( b c", "A b c"),
        ("a ] b", "A b"),
        ("<unk> a dog", "<unk> a dog"),
        ("( a dog )", "(A dog)"),
        ("paris in paris .", "Paris in Paris."),
    ],
)
def test_marks_without_a_counterpart_are_left_out(tokens: str, written: str) -> None:
    assert sentence(tokens.split(), vocabulary(paris="Paris")) == written


@pytest.mark.parametrize(
    ("tokens", "tokenizer", "pieces"),
    [
        ("a man 's hat .", TREEBANK, ["A", "man", "'s", "hat", "."]),
        ("paris can not sleep .", TREEBANK, ["Paris", "can", "not", "sleep", "."]),
        ("a `` stop '' sign", TREEBANK, ["A", '"', "stop", '"', "sign"]),
        ("a `` stop sign .", TREEBANK, ["A", None, "stop", "sign", "."]),
        ("( a ] dog )", TREEBANK, ["(", "A", None, "dog", ")"]),
        ("ßa <unk> ßa", TREEBANK, ["Ssa", "<unk>", "ßa"]),
        ('a dog. "ja!" he', WHITESPACE, ["A", "dog.", '"Ja!"', "he"]),
        ("他 说 “ bmx ！ ”", CHARACTERS, ["他", "说", "“", "bmx", "！", "”"]),
        ("", TREEBANK, []),
    ],
)
def test_every_word_is_found_in_its_sentence(
    tokens: str, tokenizer: str, pieces: list[str | None]
) -> None:
    words, known = tokens.split(), vocabulary(tokenizer, paris="Paris")
    text = sentence(words, known)
    places = word_places(words, text, known)
    assert [None if place is None else text[slice(*place)] for place in places] == pieces


def test_the_words_of_real_captions_cover_their_sentences(sample_data: Path) -> None:
    notes = json.loads((sample_data / "coco" / "captions_val2017.json").read_text())["annotations"]
    for tokenizer in (TREEBANK, WHITESPACE, CHARACTERS):
        known = vocabulary(tokenizer, tv="TV", i="I")
        for note in notes[:1000]:
            words = tokenize(note["caption"], tokenizer)
            text = sentence(words, known)
            places = filter(None, word_places(words, text, known))
            assert "".join(text[slice(*place)] for place in places) == text.replace(" ", "")


def test_the_shortcut_gives_nltks_sentences_on_real_captions(sample_data: Path) -> None:
    notes = json.loads((sample_data / "coco" / "captions_val2017.json").read_text())["annotations"]
    with (sample_data / "flickr8k" / "captions.txt").open(encoding="utf-8", newline="") as file:
        captions = [line["caption"] for line in list(csv.DictReader(file))[:3000]]
    captions += [note["caption"] for note in notes[:3000]]
    plain = 0
    for tokens in map(tokenize, captions):
        if module._PLAIN.match(" ".join(tokens)):
            plain += 1
            assert module._join_words(tokens) == TreebankWordDetokenizer().detokenize(tokens)
    assert plain > 0.7 * len(captions)


@pytest.mark.parametrize(
    "written",
    [
        "一只狗在草地上奔跑。",
        "两个男人骑着BMX自行车，共2个。",
        "他说：“你好！”",
        "犬が「スーパー」の人々を見る。",
        "ผู้ชายขี่จักรยานบนถนน",
        "A dog's ball, red (b). He runs!",
        "한 남자가 자전거를 탄다.",
    ],
)
def test_characters_are_joined_without_spaces(written: str) -> None:
    words = tokenize(written, CHARACTERS)
    assert sentence(words, vocabulary(CHARACTERS, bmx="BMX")) == written


def test_words_between_spaces_keep_their_signs() -> None:
    words = tokenize('Ein Hund läuft. "Ja!" Er bellt.', WHITESPACE)
    assert words == ["ein", "hund", "läuft.", '"ja!"', "er", "bellt."]
    assert sentence(words, vocabulary(WHITESPACE, hund="Hund")) == 'Ein Hund läuft. "Ja!" er bellt.'


def test_capitals_within_sentences_are_learned() -> None:
    captions = [
        "A man in Paris watches TV.",
        "Paris at night",  # the first word has a capital anyway
        "The dog Rex eats. Cats sleep in Paris.",
        "Rex and a dog in Rex's house",
        "watching TV in a Hut",
        "a hut with a tv, a TV and a TV",  # four of five are «nearly always»
        "A Bike On A Road In Paris",  # a title
        "A BIKE ON A ROAD",
        "Mr. Smith",  # the sentence goes on
        "he and Mr. Smith",
        "Smith sees a sofa",
    ]
    table = build_caption_table([[caption] for caption in captions])
    expected = {"paris": "Paris", "tv": "TV", "smith": "Smith", "rex": "Rex"}
    assert written_cases(table) == expected
    # Of the last photos alone, each word is written once or not with a capital at all.
    assert written_cases(table, np.array([4, 6, 7])) == {}
    assert written_cases(build_caption_table([["", "."], []])) == {}
    assert written_cases(build_caption_table([])) == {}


@pytest.mark.parametrize("tokenizer", [TREEBANK, WHITESPACE, CHARACTERS])
def test_capitals_are_found_whatever_splits_the_captions(tokenizer: str) -> None:
    captions = ["Ein Hund läuft", "zwei Hunde und ein Hund", "der Hund und das Ei"]
    table = build_caption_table([captions], tokenizer)
    assert written_cases(table) == {"hund": "Hund"}


def test_a_letter_that_grows_in_lower_case_costs_only_its_caption() -> None:
    table = build_caption_table([["in İzmir a Cat", "in a Cat", "see a Cat"]])
    assert written_cases(table) == {}  # of three, two are known to have a capital
    table = build_caption_table([["in İzmir", "in a Cat", "see a Cat"]])
    assert written_cases(table) == {"cat": "Cat"}
