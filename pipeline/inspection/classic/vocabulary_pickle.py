"""The tutorial's `vocab.pkl`: a pickled object of its class `Vocabulary`.

A pickle is a program that may call anything. So its instructions are looked at before it runs, and
while it runs it gets no other class than an empty one in the place of `Vocabulary`.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

from pipeline.inspection.classic.errors import ClassicError
from train.captions.vocabulary import SPECIALS

_CLASS = "Vocabulary"
_MOST_BYTES = 1 << 26  # a million words have 40 MB
_MOST_NUMBER = 1 << 31
# The instructions that make an object with attributes, dictionaries, texts and numbers, as pickle's
# protocols 0 to 5 write them.
_INSTRUCTIONS = frozenset(
    (
        *("PROTO", "FRAME", "STOP", "MARK", "GLOBAL", "STACK_GLOBAL", "NEWOBJ", "REDUCE", "BUILD"),
        *("EMPTY_TUPLE", "TUPLE", "NONE", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"),
        *("INT", "BININT", "BININT1", "BININT2"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
        *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
    )
)
# One object is made, and its attributes are set. Protocol 0 makes one tuple for it; tuples within
# tuples could take for ever to be compared.
_ONCE = ("NEWOBJ", "REDUCE", "BUILD", "TUPLE")


def read_words(path: Path) -> list[str]:
    """The words of a vocabulary, the word of number n at place n: special ones among them.

    Raises ClassicError.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ClassicError(f"{path}: cannot read ({error.strerror})") from None
    if len(data) > _MOST_BYTES:
        raise ClassicError(f"{path}: too large for a vocabulary")
    try:
        _check_instructions(data)
        attributes = _Unpickler(data).attributes()
        words = _words(attributes.get("word2idx"), attributes.get("idx2word"))
        "".join(words).encode()
    except UnicodeError:
        raise ClassicError(f"{path}: a word of the vocabulary is not text") from None
    except _NoVocabularyError as error:
        raise ClassicError(f"{path}: {error}") from None
    except Exception as error:  # pickle raises a dozen types for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ClassicError(f"{path}: not a pickled vocabulary ({reason[:120]})") from None
    return words


class _NoVocabularyError(Exception):
    """Why a pickle is no vocabulary of the tutorial."""


def _check_instructions(data: bytes) -> None:
    """Raises _NoVocabularyError for a pickle that does more than a vocabulary's, and whatever
    `pickletools` raises for one that is damaged.
    """
    once = dict.fromkeys(_ONCE, 0)
    for count, (instruction, argument, _) in enumerate(pickletools.genops(data)):
        name = instruction.name
        if name in once:
            once[name] += 1
        # A pickle numbers its places in turn. Memory is taken for the largest that PUT names.
        number = argument if isinstance(argument, int) else 0
        if (
            name not in _INSTRUCTIONS
            or once.get(name, 0) > 1
            or number >= _MOST_NUMBER
            or ("PUT" in name and number > count)
        ):
            raise _NoVocabularyError(
                f"holds more than a vocabulary's words and numbers (instruction {name}); "
                "nothing of it was run"
            )


class _Unpickler(pickle.Unpickler):
    """Builds one object, of an empty class, and dictionaries, texts and numbers."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")  # the encoding is for Python 2's texts

        class Vocabulary:
            """A new class for each file, because a pickle may change it."""

        self._class = Vocabulary

    def find_class(self, module: str, name: str) -> Any:
        """The classes and functions that a pickle names: the vocabulary's own class, of whatever
        module, and the two that protocols 0 and 1 use to make an object of it.
        """
        if name == _CLASS:
            return self._class
        if (module, name) in (("copyreg", "_reconstructor"), ("copy_reg", "_reconstructor")):
            return self._made
        if (module, name) in (("builtins", "object"), ("__builtin__", "object")):
            return object
        raise _NoVocabularyError(
            f"asks for {module}.{name}, which a vocabulary does not need; nothing was called"
        )

    def _made(self, kind: object, base: object, state: object) -> object:
        if kind is not self._class or base is not object or state is not None:
            raise _NoVocabularyError("builds something else than a vocabulary")
        return self._class()

    def attributes(self) -> dict[str, Any]:
        found = self.load()
        if type(found) is not self._class:
            raise _NoVocabularyError(f"holds no object of a class {_CLASS}")
        return vars(found)


def _words(word2idx: object, idx2word: object) -> list[str]:
    """Raises _NoVocabularyError unless the two are each other's inverse, with numbers from 0 on."""
    for name, found in (("word2idx", word2idx), ("idx2word", idx2word)):
        if type(found) is not dict:
            raise _NoVocabularyError(f"its {_CLASS} has no dictionary {name}")
    assert type(word2idx) is dict
    assert type(idx2word) is dict
    numbers = range(len(word2idx))
    if not all(type(word) is str and type(number) is int for word, number in word2idx.items()):
        raise _NoVocabularyError("its word2idx does not lead from words to numbers")
    words = [idx2word.get(number) for number in numbers]
    if len(idx2word) != len(words) or any(
        type(word) is not str or word2idx.get(word) != number
        for number, word in zip(numbers, words, strict=True)
    ):
        raise _NoVocabularyError("its word2idx and idx2word contradict each other")
    missing = [special for special in SPECIALS if special not in word2idx]
    if missing:
        raise _NoVocabularyError(f"has no word {missing[0]}, as the tutorial's vocabularies have")
    if len(words) == len(SPECIALS):
        raise _NoVocabularyError(f"has no words but {', '.join(SPECIALS)}")
    return [str(word) for word in words]
