"""The forms of files that grow by a photo at a time: CSV, and JSON lines."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from pipeline.captioner.outputs.output import Maker, texts_of
from pipeline.captioner.predictions import Prediction
from pipeline.captions.mark import MARK


@dataclass(frozen=True)
class Record:
    """What an earlier command wrote: one of the rows of a photo."""

    path: str  # as `Form.key` has it
    mark: str
    is_error: bool
    caption: str = ""  # empty if there is none


class Form(Protocol):
    """How predictions become bytes, and how these are read again."""

    header: bytes

    def key(self, path: str) -> str:
        """A photo's path as it is in the file."""
        ...

    def rows(self, prediction: Prediction) -> bytes: ...

    def split(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        """The records of a file's lines. The last may be torn."""
        ...

    def may_begin(self, torn: bytes) -> bool:
        """Whether a file's only line, without its end, may be the beginning of a record."""
        ...

    def read(self, record: bytes) -> Record:
        """Raises ValueError if it is none of this program's."""
        ...


class Csv:
    """`path,caption,score,error,written_by_cap`, in UTF-8: a row per caption, the best first."""

    header = f"path,caption,score,error,{MARK}\n".encode()

    def __init__(self, maker: Maker, *, words: bool) -> None:
        self._maker, self._words = maker, words

    def key(self, path: str) -> str:
        # Raw bytes of a name that is not UTF-8 would make a file that few programs read.
        return path.encode("utf-8", "backslashreplace").decode("utf-8")

    def rows(self, prediction: Prediction) -> bytes:
        path, mark = self.key(prediction.path), str(self._maker)
        file = io.StringIO(newline="")
        table = csv.writer(file, lineterminator="\n")
        if prediction.error:
            table.writerow((path, "", "", self.key(prediction.error), mark))
        texts = texts_of(prediction, self._words)
        for caption, text in zip(prediction.captions, texts, strict=True):
            table.writerow((path, text, f"{caption.score:.4f}", "", mark))
        return file.getvalue().encode("utf-8", "backslashreplace")

    def split(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        record, quotes = b"", 0
        for line in lines:
            record += line
            quotes += line.count(b'"')
            if quotes % 2 == 0:  # else a line break within quotes
                yield record
                record, quotes = b"", 0
        if record:
            yield record.removesuffix(b"\n")  # torn within quotes

    def may_begin(self, torn: bytes) -> bool:
        return False  # the header is before it

    def read(self, record: bytes) -> Record:
        text = record.decode("utf-8")
        (row,) = csv.reader(io.StringIO(text, newline=""), strict=True)
        path, caption, score, error, mark = row
        if not mark or bool(score) == bool(error):
            raise ValueError
        return Record(path, mark, bool(error), caption)


class JsonLines:
    """The objects of `cap predict --json`, with the member `written_by_cap`."""

    header = b""

    def __init__(self, maker: Maker, *, log_probs: bool) -> None:
        self._maker, self._log_probs = maker, log_probs

    def key(self, path: str) -> str:
        return path

    def rows(self, prediction: Prediction) -> bytes:
        record = {**prediction.as_dict(log_probs=self._log_probs), MARK: str(self._maker)}
        text = json.dumps(record, ensure_ascii=False)
        # Of a name that is not UTF-8: `\udcff`, which is JSON.
        return text.encode("utf-8", "backslashreplace") + b"\n"

    def split(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        yield from lines

    def may_begin(self, torn: bytes) -> bool:
        begins = b'{"path": "'
        if not torn.startswith(begins):
            return begins.startswith(torn)
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(torn)
            return isinstance(found, dict) and MARK in found  # whole, but for the line break
        return True

    def read(self, record: bytes) -> Record:
        try:
            found = json.loads(record)
        except RecursionError:
            raise ValueError from None
        if not isinstance(found, dict):
            raise ValueError
        path, mark, caption = found.get("path"), found.get(MARK), found.get("caption", "")
        if not all(isinstance(value, str) for value in (path, mark, caption)):
            raise ValueError
        return Record(str(path), str(mark), "error" in found, str(caption))
