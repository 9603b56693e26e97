"""The tutorial's pickle is read by a reader that runs nothing of it."""

from __future__ import annotations

import contextlib
import os
import pickle
import pickletools
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest

from pipeline.inspection.classic.errors import ClassicError
from pipeline.inspection.classic.vocabulary_pickle import read_words
from tests.pipeline.classic_run import SPECIALS, Vocabulary

WORDS = [*SPECIALS, "a", "dog", "café", "'s", "日本", ""]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vocab.pkl"


def refusal(path: Path, data: bytes) -> str:
    """The message about a pickle, without the file's name."""
    path.write_bytes(data)
    with pytest.raises(ClassicError) as caught:
        read_words(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_words_of_every_protocol_are_read(path: Path, protocol: int) -> None:
    path.write_bytes(pickle.dumps(Vocabulary(WORDS), protocol))
    assert read_words(path) == WORDS
    many = [*SPECIALS, *map(str, range(10_000))]
    path.write_bytes(pickle.dumps(Vocabulary(many), protocol))
    assert read_words(path) == many


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_a_pickle_of_python_2_is_read(path: Path, protocol: int) -> None:
    """Its texts are bytes, and its modules have other names."""
    numbered = b"".join(
        (b"S'%s'\nI%d\ns" if protocol == 0 else b"U%c%sK%cs")
        % ((word.encode(), n) if protocol == 0 else (len(word.encode()), word.encode(), n))
        for n, word in enumerate(WORDS[:6])
    )
    back = b"".join(
        (b"I%d\nS'%s'\ns" if protocol == 0 else b"K%cU%c%ss")
        % ((n, word.encode()) if protocol == 0 else (n, len(word.encode()), word.encode()))
        for n, word in enumerate(WORDS[:6])
    )
    empty = b"(d" if protocol == 0 else b"}"
    attributes = (
        empty + b"S'word2idx'\n" + empty + numbered + b"sS'idx2word'\n" + empty + back
        + b"sS'idx'\nI6\ns"
    )  # fmt: skip
    made = (
        b"\x80\x02cbuild_vocab\nVocabulary\n)\x81"
        if protocol == 2
        else b"ccopy_reg\n_reconstructor\n(cbuild_vocab\nVocabulary\nc__builtin__\nobject\nNtR"
    )
    path.write_bytes(made + attributes + b"b.")
    assert read_words(path) == WORDS[:6]


def test_the_class_may_be_of_any_module(path: Path) -> None:
    data = pickle.dumps(Vocabulary(WORDS), 2)
    for module in (b"build_vocab", b"__main__", b"data.vocabulary"):
        path.write_bytes(data.replace(Vocabulary.__module__.encode(), module))
        assert read_words(path) == WORDS


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("place", ["whole", "attribute", "word", "number"])
def test_a_hostile_pickle_runs_nothing(path: Path, protocol: int, place: str) -> None:
    target = path.with_name("run")
    hostile = Hostile(target)
    vocabulary: Any = Vocabulary(WORDS)
    match place:
        case "whole":
            vocabulary = hostile
        case "attribute":
            vocabulary.extra = hostile
        case "word":
            vocabulary.idx2word[4] = hostile
        case "number":
            vocabulary.word2idx["a"] = hostile
    data = pickle.dumps(vocabulary, protocol)
    message = refusal(path, data)
    assert not target.exists()
    assert message.startswith(("asks for ", "holds more than a vocabulary's words and numbers"))
    pickle.loads(data)  # it does run elsewhere
    assert target.exists()


def test_names_that_hide_behind_the_class_are_refused(path: Path) -> None:
    for name in (b"Vocabulary.__init__", b"vocabulary", b"eval", b"getattr"):
        data = b"\x80\x04\x8c\x08builtins\x8c" + bytes([len(name)]) + name + b"\x93)R."
        assert refusal(path, data).startswith(f"asks for builtins.{name.decode()}, which a ")
    assert refusal(path, b"ccopyreg\n_reconstructor\n(cx\nVocabulary\ncbuiltins\nobject\nI5\ntR.")
    assert refusal(path, b"ccopyreg\n_reconstructor\n(cbuiltins\nobject\ncx\nVocabulary\nNtR.")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02}r\xff\xff\xff\x7f.",  # LONG_BINPUT at a place of 16 GB
        b"(dp2000000000\n.",
        b"\x80\x02]q\x00.",  # a list
        b"\x80\x02" + b"X\x01\x00\x00\x00aq\x00" + b"h\x00h\x00\x86q\x00" * 60 + b".",  # tuples
        b"(" + b"(t" * 3 + b"t.",
        b"\x80\x02\x82\x01.",  # an extension's code
        b"\x80\x02P0\n.",  # a persistent object
        b"\x80\x02\x8b\xff\xff\xff\x7f.",  # LONG4
        b"\x80\x05\x96\xff\xff\xff\xff\x00\x00\x00\x00.",  # bytes
        b"I99999999999999\n.",
    ],
)
def test_instructions_that_no_vocabulary_needs_are_refused_before_they_run(
    path: Path, data: bytes
) -> None:
    message = refusal(path, data)
    assert message.startswith(
        ("holds more than a vocabulary's words and numbers", "not a pickled vocabulary")
    )


def test_other_contents_are_named(path: Path) -> None:
    def of(**attributes: object) -> str:
        vocabulary = Vocabulary(WORDS)
        for name, value in attributes.items():
            setattr(vocabulary, name, value)
        return refusal(path, pickle.dumps(vocabulary, 4))

    good = Vocabulary(WORDS)
    assert of(word2idx=None) == "its Vocabulary has no dictionary word2idx"
    assert of(idx2word={**good.idx2word, 4: "cat"}) == (
        "its word2idx and idx2word contradict each other"
    )
    assert of(idx2word={str(number): word for number, word in good.idx2word.items()}) == (
        "its word2idx and idx2word contradict each other"
    )
    assert of(word2idx={**good.word2idx, "x": 7}) == (
        "its word2idx and idx2word contradict each other"
    )
    assert "does not lead from words to numbers" in of(word2idx={**good.word2idx, "a": None})
    assert "holds more than" in of(word2idx={**good.word2idx, "a": 4.0})
    assert "holds more than" in of(word2idx={**good.word2idx, "a": True})
    assert "asks for collections.OrderedDict" in of(word2idx=OrderedDict(good.word2idx))
    assert "holds more than" in of(word2idx=Counter(good.word2idx))
    less = [word for word in WORDS if word != "<start>"]
    assert refusal(path, pickle.dumps(Vocabulary(less))) == (
        "has no word <start>, as the tutorial's vocabularies have"
    )
    assert refusal(path, pickle.dumps(Vocabulary(SPECIALS))).startswith("has no words but <pad>, ")
    assert refusal(path, pickle.dumps({"a": 1})) == "holds no object of a class Vocabulary"
    assert refusal(path, pickle.dumps(Vocabulary([*WORDS, "\ud800"]))) == (
        "a word of the vocabulary is not text"
    )


def test_damaged_files_are_one_line(path: Path) -> None:
    whole = pickle.dumps(Vocabulary(WORDS), 4)
    for length in range(len(whole)):
        refusal(path, whole[:length])
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        # Another letter of a word, or of an attribute that is not read, makes no difference.
        with contextlib.suppress(ClassicError):
            assert len(read_words(path)) == len(WORDS)
    for data in (b"", b"\0" * 100, b"<pad>\n<start>\n", b"PK\x03\x04", b"\x89PNG"):
        refusal(path, data)


def test_reading_words_imports_no_torch(path: Path) -> None:
    path.write_bytes(pickle.dumps(Vocabulary(WORDS)))
    code = (
        "import sys; from pathlib import Path;"
        "from pipeline.inspection.classic.vocabulary_pickle import read_words;"
        f"print(len(read_words(Path({str(path)!r}))), 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == f"{len(WORDS)} False\n"


def test_the_list_of_instructions_is_pickles_own() -> None:
    from pipeline.inspection.classic.vocabulary_pickle import _INSTRUCTIONS, _ONCE

    known = {each.name for each in pickletools.opcodes}
    assert known >= _INSTRUCTIONS >= set(_ONCE)
    assert not _INSTRUCTIONS & {"INST", "OBJ", "EXT1", "PERSID", "BINPERSID", "NEWOBJ_EX"}
