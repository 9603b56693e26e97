"""What the command line says about a setting, written beside the setting and its default.

    from_cache: Path = field(metadata=about("Cache of the training photos."))
    epochs: int = option(2, "Passes over the training captions.", min=1)

are fields of a dataclass, the first required, the second with a default. `pipeline/cli/options.py`
turns them into `--from-cache` and `--epochs`; a field without a description is no option of any
command. Imports nothing heavy.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

from cache.errors import CapError

T = TypeVar("T")

_KEY = "option"


class SettingError(CapError):
    """Raised for a setting that is out of bounds or has no effect beside the others.

    The message is one line.
    """


@dataclass(frozen=True)
class Option:
    """The help text of an option and the values it accepts."""

    help: str
    min: float | None = None
    max: float | None = None
    choices: tuple[str, ...] = ()
    # Turns the user's text into the value; raises ValueError.
    parse: Callable[[str], Any] | None = None
    # For a field that is a dataclass itself: the values the user can name. The fields of that
    # dataclass become options too, each of which overrides one field of the named value.
    presets: Mapping[str, Any] | None = None
    # The type of each value of an option that may be given several times, which makes a tuple.
    many: type | None = None
    # Values that a shell completes, although others are accepted too.
    usual: tuple[str, ...] = ()


def about(help: str, parse: Callable[[str], Any] | None = None) -> dict[str, Option]:
    """The metadata of a field that is a required option."""
    return {_KEY: Option(help, parse=parse)}


def option(
    default: T,
    help: str,
    *,
    min: float | None = None,
    max: float | None = None,
    choices: tuple[str, ...] = (),
    parse: Callable[[str], Any] | None = None,
    presets: Mapping[str, Any] | None = None,
    many: type | None = None,
    usual: tuple[str, ...] = (),
) -> T:
    """A field with a default that is an option."""
    metadata = {_KEY: Option(help, min, max, choices, parse, presets, many, usual)}
    return field(default=default, metadata=metadata)


def described(config: type) -> list[tuple[Field[Any], Option]]:
    """The fields of a dataclass that are options, in order."""
    return [(each, each.metadata[_KEY]) for each in fields(config) if _KEY in each.metadata]


def check_bounds(config: Any) -> None:
    """Raise SettingError if a field of a dataclass has a value that its option does not accept.

    None is always accepted.
    """
    for each, option in described(type(config)):
        value = getattr(config, each.name)
        problem = None if value is None else _problem(value, option)
        if problem is not None:
            raise SettingError(f"{each.name.replace('_', ' ')} {problem}")


def nearest(word: str, words: Iterable[str], count: int = 3) -> list[str]:
    """The words that are most like a misspelt or incomplete one, the most alike first."""
    known = {each.lower(): each for each in words}
    word = word.lower()
    alike = difflib.get_close_matches(word, known, count, 0.7)
    # `vit` is unlike `vit_b_16` by its letters alone.
    begins = sorted(name for name in known if len(word) > 1 and name.startswith(word))
    return [known[name] for name in dict.fromkeys([*alike, *begins])][:count]


def or_list(words: Iterable[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _problem(value: Any, option: Option) -> str | None:
    if option.choices and value not in option.choices:
        return f"{value!r} is not {or_list(option.choices)}"
    low, high = option.min, option.max
    if isinstance(value, float) and math.isnan(value):
        return "nan is not a number"
    if low is not None and value < low:
        return f"{value} must be at least {low}"
    if high is not None and value > high:
        return f"{value} must be at most {high}"
    return None
