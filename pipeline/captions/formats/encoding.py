"""The encoding of a text file, found by its bytes.

A byte order mark decides, then whether all of the file is UTF-8. For what is neither,
charset-normalizer guesses.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipeline.captions.records import DatasetError

_BLOCK_BYTES = 1 << 20
_SAMPLE_BYTES = 1 << 16
# Longest first: the mark of UTF-16 begins that of UTF-32.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF8, "utf-8-sig", "UTF-8"),
    (codecs.BOM_UTF16_LE, "utf-16", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16", "UTF-16"),
)
# What spreadsheets and editors have written before UTF-8. Among all the encodings there are, a few
# accented letters are too little to choose by.
_OLD_ENCODINGS = [
    *("cp1250", "cp1251", "cp1252", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp874"),
    *("koi8_r", "mac_roman", "gb18030", "big5", "cp932", "euc_jp", "cp949"),
]
_WESTERN = "cp1252"  # of ISO-8859-1 too, which differs in control characters only
_AS_GOOD = 0.02, 0.1  # differences of charset-normalizer's chaos and coherence that say nothing


@dataclass(frozen=True)
class Encoding:
    """How to decode a file. `name` is for the user."""

    codec: str
    name: str
    guessed: bool = False
    errors: str = "strict"


def open_text(path: Path) -> tuple[IO[str], Encoding]:
    """The file as text, any line ends as `\\n`, and its encoding.

    Bytes that are not UTF-8 in a few lines of a file that is UTF-8 otherwise become halves of
    surrogate pairs, as in Python's file names. Raises DatasetError if the file cannot be read or is
    no text.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise DatasetError(f"{path}: no regular file; it is read several times, so save it")
        encoding = _find(path)
        return path.open(encoding=encoding.codec, errors=encoding.errors), encoding
    except OSError as error:
        raise DatasetError(f"{path}: cannot read ({error.strerror or error})") from None


def _find(path: Path) -> Encoding:
    with path.open("rb") as file:
        start = file.read(_SAMPLE_BYTES)
        for mark, codec, name in _MARKS:
            if start.startswith(mark):
                _check_decodes(path, file, codec, name)
                return Encoding(codec, name)
        if b"\0" in start:
            # Latin letters in UTF-16 are a byte and a zero; nothing else in a text is zero.
            codec = "utf-16-le" if start[1::2].count(0) >= start[::2].count(0) else "utf-16-be"
            _check_decodes(path, file, codec, "UTF-16")
            return Encoding(codec, "UTF-16")
        file.seek(0)
        if _is_utf_8(file):
            return Encoding("utf-8", "UTF-8")
        file.seek(0)
        return _guessed(path, file)


def _is_utf_8(file: IO[bytes]) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while block := file.read(_BLOCK_BYTES):
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _check_decodes(path: Path, file: IO[bytes], codec: str, name: str) -> None:
    file.seek(0)
    decoder = codecs.getincrementaldecoder(codec)()
    try:
        while block := file.read(_BLOCK_BYTES):
            if "\0" in decoder.decode(block):
                raise DatasetError(f"{path}: no text; is it a captions file?")
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path}: begins like {name}, but is not ({error.reason}); is it a captions file?"
        ) from None


def _guessed(path: Path, file: IO[bytes]) -> Encoding:
    import charset_normalizer

    telling, utf_8, others = io.BytesIO(), 0, 0
    for line in _lines(file):
        if line.isascii():
            continue
        try:
            line.decode("utf-8")
            utf_8 += 1
        except UnicodeDecodeError:
            others += 1
            if telling.tell() < _SAMPLE_BYTES:
                telling.write(line)
    if utf_8 > others:  # lines that are UTF-8 by accident are rare
        return Encoding("utf-8", "UTF-8", errors="surrogateescape")
    matches = charset_normalizer.from_bytes(
        telling.getvalue(), cp_isolation=_OLD_ENCODINGS, preemptive_behaviour=False
    )
    best = matches.best()
    if best is None:
        raise DatasetError(
            f"{path}: neither UTF-8 nor another text; is it a captions file? Save it as UTF-8"
        )
    codec = best.encoding
    for match in matches:
        western = _WESTERN in match.could_be_from_charset
        chaos, coherence = match.chaos - best.chaos, best.coherence - match.coherence
        if western and chaos <= _AS_GOOD[0] and coherence <= _AS_GOOD[1]:
            codec = _WESTERN
    # A guess from a part of the file may meet a byte that means nothing in the encoding.
    name = "ISO-8859-1 or Windows-1252" if codec == _WESTERN else codec
    return Encoding(codec, name, guessed=True, errors="surrogateescape")


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Lines, or blocks of what has none."""
    while line := file.readline(_BLOCK_BYTES):
        yield line
