"""Lines of a text file to rows of cells.

Python's csv module splits only single rows that it finds no fault with. It reads on to the next
quote, however far, if one is not closed, and its limit on the length of a cell holds for the whole
process.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

_MOST_LINES = 200  # of one row
_MOST_LETTERS = 100_000  # that follow the first line of one row


class Row(NamedTuple):
    """A row of a table. `line` is the number of its first line."""

    line: int
    cells: list[str]
    text: str  # as in the file
    fault: str  # why it cannot be split; empty if it can


def split_rows(
    numbered: Iterable[tuple[int, str]],
    delimiter: str,
    *,
    quoting: bool,
    is_row: Callable[[list[str]], bool],
) -> Iterator[Row]:
    """The rows of lines with their numbers. Empty lines are no rows.

    delimiter: one character; a space stands for the first space or tab of a line. quoting: whether
    a cell may stand in quotes, and go on over several lines in them. is_row: whether the cells of a
    line that should continue a quoted cell are a row of their own. Then a quote is unbalanced.
    """
    lines, ahead = iter(numbered), list[tuple[int, str]]()
    while (numbered_line := ahead.pop() if ahead else next(lines, None)) is not None:
        number, line = numbered_line
        text = line.rstrip("\n")
        if not text or text.isspace():
            continue
        if delimiter == " ":
            yield Row(number, text.split(None, 1), text, "")
        elif not quoting or '"' not in text:
            yield Row(number, text.split(delimiter), text, "")
        else:
            cells, is_open = split_line(text, delimiter)
            whole, following = text, list[tuple[int, str]]()
            while is_open and len(following) < _MOST_LINES:
                more = ahead.pop() if ahead else next(lines, None)
                if more is None:
                    break
                following.append(more)
                if len(whole) - len(text) > _MOST_LETTERS or is_row(more[1].split(delimiter)):
                    break
                whole += "\n" + more[1].rstrip("\n")
                if '"' in more[1]:
                    cells, is_open = split_line(whole, delimiter)
            if is_open:
                ahead.extend(reversed(following))
                yield Row(number, cells, text, "a quote is not closed")
            else:
                yield Row(number, cells, whole, "")


def split_line(text: str, delimiter: str) -> tuple[list[str], bool]:
    """(cells, whether a quote of the last cell is open).

    A cell that begins with a quote ends with one, before a delimiter or the end. Two quotes, or a
    backslash and a quote, are a quote inside it. Otherwise quotes are letters like others.
    """
    if ' "' not in text:  # a space before a quote is a letter to the csv module
        try:
            return next(csv.reader([text], delimiter=delimiter, strict=True)), False
        except csv.Error:  # a quote is not where that module wants it, or a cell is too long
            pass
    cells, place = list[str](), 0
    while True:
        start = place
        while text[start : start + 1] == " ":
            start += 1
        if text[start : start + 1] == '"':
            end, doubled = _closing_quote(text, start + 1, delimiter)
            if end < 0 and not doubled:
                cells.append(text[place:])
                return cells, True
            if end >= 0:
                cell = text[start + 1 : end].replace('""', '"').replace('\\"', '"')
                cells.append(cell)
                place = text.find(delimiter, end + 1)
                if place < 0:
                    return cells, False
                place += 1
                continue
        end = text.find(delimiter, place)
        if end < 0:
            cells.append(text[place:])
            return cells, False
        cells.append(text[place:end])
        place = end + 1


def _closing_quote(text: str, place: int, delimiter: str) -> tuple[int, bool]:
    """(where the quote is that closes a cell, whether there is another quote instead).

    The place is -1 if nothing closes the cell.
    """
    while (place := text.find('"', place)) >= 0:
        if text.startswith('""', place):
            place += 2
            continue
        after = place + 1
        while text[after : after + 1] == " ":
            after += 1
        if after == len(text) or text[after] == delimiter:
            return place, False
        if text[place - 1] != "\\":
            return -1, True
        place += 1
    return -1, False
