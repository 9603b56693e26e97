"""Fonts for the scripts of captions: DejaVu Sans, then those that are installed.

DejaVu Sans comes with Matplotlib, so that sheets look alike everywhere. Other fonts are looked for
only when a text has letters that it lacks.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageFont, features

_SUFFIXES = (".ttf", ".otf", ".ttc")
_FANCY = re.compile(
    "bold|italic|oblique|light|thin|black|medium|condensed|mono|serif|kufi|nastaliq|looped|display"
    "|rashi|symbols|fallback",
    re.IGNORECASE,
)
# How names of fonts call the scripts of which they have no other name.
_CALLED = {"Hani": "cjk", "Hira": "cjk", "Kana": "cjk", "Hang": "cjk", "Bopo": "cjk"}
_NO_LETTERS = re.compile("lastresort|adobeblank|notdef", re.IGNORECASE)  # a sign for any letter
NEUTRAL = ("Zyyy", "Zinh")  # digits, punctuation, marks: they belong to the letters around them
# Scripts whose letters change their form or their place, which only Raqm knows.
_SHAPED = frozenset(
    (
        *("Arab", "Syrc", "Hebr", "Thaa", "Nkoo", "Deva", "Beng", "Guru", "Gujr", "Orya", "Taml"),
        *("Telu", "Knda", "Mlym", "Sinh", "Thai", "Laoo", "Khmr", "Mymr", "Tibt", "Mong"),
    )
)


def script_of(letter: str) -> str:
    """Unicode's four letters for the script: `Latn`, `Thai`; one of NEUTRAL for what has none."""
    from fontTools import unicodedata as scripts

    return str(scripts.script(letter))


def script_name(script: str) -> str:
    from fontTools import unicodedata as scripts

    return str(scripts.script_name(script, default=script))


def is_right_to_left(text: str) -> bool:
    """Whether the first letter that has a direction is written from right to left."""
    for letter in text:
        direction = unicodedata.bidirectional(letter)
        if direction in ("L", "R", "AL"):
            return direction != "L"
    return False


@functools.cache
def has_raqm() -> bool:
    """Whether this Pillow has the library that joins letters and knows directions."""
    return bool(features.check("raqm"))


def font_folders() -> list[Path]:
    """Where Linux has its fonts."""
    home = Path.home()
    data = os.environ.get("XDG_DATA_HOME") or str(home / ".local" / "share")
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    folders = [Path(folder) / "fonts" for folder in (data, *shared.split(":")) if folder]
    folders += [home / ".fonts", Path("/usr/local/share/fonts"), Path("/usr/share/fonts")]
    return list(dict.fromkeys(folders))


def installed_fonts() -> list[Path]:
    """The files of installed fonts, plain ones first, sans serif before others."""
    found = {
        Path(folder) / name
        for top in font_folders()
        for folder, _, names in os.walk(top)
        for name in names
        if name.lower().endswith(_SUFFIXES) and not _NO_LETTERS.search(name)
    }
    return sorted(found, key=lambda file: (len(_FANCY.findall(file.name)), file.name, str(file)))


@functools.lru_cache(maxsize=512)
def letters_of(file: Path) -> frozenset[int]:
    """The code points that a font has glyphs of; none if it cannot be read."""
    from fontTools.ttLib import TTFont

    try:
        with TTFont(file, fontNumber=0, lazy=True) as font:
            return frozenset(font.getBestCmap() or ())
    except Exception:  # whatever a damaged font makes of the library
        return frozenset()


@dataclass(frozen=True)
class Run:
    """Letters of one font."""

    text: str
    font: ImageFont.FreeTypeFont


class Fonts:
    """The fonts of one size, and the scripts for which there is none."""

    def __init__(self, size: int, installed: Sequence[Path] | None = None) -> None:
        """size: in pixels. installed: files to choose from; None for those of the system."""
        import matplotlib

        self.size = size
        self.missing: dict[str, str] = {}  # script → a letter without a glyph
        self.unshaped: set[str] = set()  # scripts that are drawn without Raqm, but need it
        self._installed = None if installed is None else list(installed)
        plain = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
        self._fonts: dict[Path, ImageFont.FreeTypeFont | None] = {}
        opened = self._open(plain)
        assert opened is not None  # Matplotlib itself needs it
        self.plain, self._plain_file = opened, plain
        self._known: dict[str, Path] = {}  # letter → file

    def prepare(self, text: str) -> None:
        """Choose one font for all letters of a script in a text, if one has them all."""
        plain = letters_of(self._plain_file)
        lacking: dict[str, set[str]] = {}
        for letter in set(text):
            if ord(letter) not in plain and not letter.isspace() and letter not in self._known:
                lacking.setdefault(script_of(letter), set()).add(letter)
        for script, letters in lacking.items():
            wanted = set(map(ord, letters))
            for file in self._candidates(script):
                if wanted <= letters_of(file) and self._open(file) is not None:
                    self._known |= dict.fromkeys(letters, file)
                    break

    def runs(self, text: str) -> list[Run]:
        """A text in pieces of one font each, in the order in which it is read."""
        pieces: list[tuple[str, Path]] = []
        for letter in text:
            script = script_of(letter)
            if script in _SHAPED and not has_raqm():
                self.unshaped.add(script)
            if pieces and script in NEUTRAL and ord(letter) in letters_of(pieces[-1][1]):
                file = pieces[-1][1]
            elif pieces and (unicodedata.category(letter)[0] == "M" or letter in "\u200c\u200d"):
                file = pieces[-1][1]  # a mark stays with its letter
            else:
                file = self._file_for(letter, script)
            if pieces and pieces[-1][1] == file:
                pieces[-1] = (pieces[-1][0] + letter, file)
            else:
                pieces.append((letter, file))
        return [Run(piece, self._fonts[file] or self.plain) for piece, file in pieces]

    def notices(self) -> list[str]:
        """What could not be set, a line each."""
        lines = []
        for script, letter in sorted(self.missing.items()):
            if script in NEUTRAL:
                lines.append(f"no installed font has the sign {letter} (U+{ord(letter):04X})")
            else:
                lines.append(
                    f"no installed font has the letters of {script_name(script)} ({letter}); "
                    "install one, such as a Noto Sans of that script"
                )
        if self.unshaped:
            names = ", ".join(sorted(map(script_name, self.unshaped)))
            lines.append(
                f"{names}: letters are not joined or ordered as they should be, because this "
                "Pillow has no Raqm (see its page on installation)"
            )
        return lines

    def _file_for(self, letter: str, script: str) -> Path:
        if letter not in self._known:
            self._known[letter] = self._find(letter, script)
        return self._known[letter]

    def _find(self, letter: str, script: str) -> Path:
        if ord(letter) in letters_of(self._plain_file) or letter.isspace():
            return self._plain_file
        if script in self.missing and script not in NEUTRAL:
            return self._plain_file  # all fonts have been looked at
        for file in self._candidates(script):
            if ord(letter) in letters_of(file) and self._open(file) is not None:
                return file
        self.missing.setdefault(script, letter)
        return self._plain_file

    def _candidates(self, script: str) -> Iterator[Path]:
        """The fonts that are in use, those that are called like the script, then all others."""
        if self._installed is None:
            self._installed = installed_fonts()
        name = _CALLED.get(script, script_name(script).replace("_", "").replace(" ", "").lower())
        called = [file for file in self._installed if name in file.name.lower()]
        in_use = [file for file, font in self._fonts.items() if font is not None]
        yield from dict.fromkeys([*in_use, *called, *self._installed])

    def _open(self, file: Path) -> ImageFont.FreeTypeFont | None:
        if file not in self._fonts:
            self._fonts[file] = None
            layout = ImageFont.Layout.RAQM if has_raqm() else ImageFont.Layout.BASIC
            with contextlib.suppress(OSError, ValueError):  # pictures of one size, such as emoji
                self._fonts[file] = ImageFont.truetype(str(file), self.size, layout_engine=layout)
        return self._fonts[file]
