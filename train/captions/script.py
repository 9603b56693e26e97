"""The script that captions are written in, and the tokenizers, one of which fits it.

Chinese, Japanese, Thai and a few more scripts have no spaces between words. A tokenizer that looks
for spaces makes one word of a whole sentence there, which no other caption has. Imports nothing
heavy, since `--help` shows the names of the tokenizers.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache

# NLTK's Penn Treebank words; what is between spaces; single characters of the scripts without
# spaces, and words of the others.
TREEBANK, WHITESPACE, CHARACTERS = "treebank", "whitespace", "characters"
TOKENIZERS = (TREEBANK, WHITESPACE, CHARACTERS)
TOKENIZER_HELP = (
    "How captions are split: treebank (NLTK's words), whitespace, or characters (for Chinese, "
    "Japanese and Thai)."
)

# How Unicode begins the names of the characters of these scripts → the longest mean run of such
# characters between two others in text whose words somebody has separated by spaces. Words have
# about two characters in Chinese and five, with vowel signs and tones, in Thai; sentences of
# captions begin at twice that.
_WITHOUT_SPACES = {
    **dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO"), 4),
    **dict.fromkeys(("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"), 8),
}
_JAPANESE_SHARE = 0.05  # of kana; Chinese has none, and Japanese sentences have a third at least
_SAMPLED_TEXTS = 2000


def script_of(texts: Sequence[str]) -> str | None:
    """The name of the script of most letters, in English; None for texts without a letter.

    It is `Latin`, `Cyrillic`, `Arabic` and so on, as Unicode calls it, except that Han characters
    are `Chinese` or, among kana, `Japanese`. Of many texts a sample is looked at.
    """
    scripts = Counter(
        _script(letter) for text in _sample(texts) for letter in text if letter.isalpha()
    )
    if not scripts:
        return None
    kana = scripts.pop("HIRAGANA", 0) + scripts.pop("KATAKANA", 0)
    scripts["CJK"] += kana
    script = max(scripts, key=lambda name: (scripts[name], name))
    if script == "CJK":
        return "Japanese" if kana > _JAPANESE_SHARE * scripts["CJK"] else "Chinese"
    return script.capitalize()


def has_no_spaces(character: str) -> bool:
    """Whether a character belongs to a script that is written without spaces between words."""
    return _script(character) in _WITHOUT_SPACES


def misfit(texts: Sequence[str], tokenizer: str) -> str | None:
    """One line that says that a tokenizer does not fit the script of captions; None if it does."""
    if tokenizer == CHARACTERS:
        return None
    runs = [run for text in _sample(texts) for run in _runs(text)]
    script = script_of(texts)
    if not runs or script is None:
        return None
    allowed = sum(_WITHOUT_SPACES[_script(run[0])] for run in runs)
    letters = sum(character.isalpha() for text in _sample(texts) for character in text)
    inside = sum(map(len, runs))
    if 2 * inside <= letters or inside <= allowed:
        return None
    return (
        f"the captions are in {script}, without spaces between words, and --tokenizer {tokenizer} "
        f"makes one word of a sentence; use --tokenizer {CHARACTERS}"
    )


def _runs(text: str) -> Iterator[str]:
    """The runs of characters of scripts without spaces."""
    start = None
    for place, character in enumerate(text):
        inside = has_no_spaces(character)
        if inside and start is None:
            start = place
        elif not inside and start is not None:
            yield text[start:place]
            start = None
    if start is not None:
        yield text[start:]


def _sample(texts: Sequence[str]) -> Sequence[str]:
    return texts[:: -(-len(texts) // _SAMPLED_TEXTS) or 1]


@cache
def _script(character: str) -> str:
    """The first word of a character's name in Unicode, which is its script if it is a letter."""
    words = unicodedata.name(character, "").replace("-", " ").split()
    if words and words[0] in ("FULLWIDTH", "HALFWIDTH"):
        words = words[1:]
    if not words or character.isspace():
        return ""
    return "CJK" if words[0] == "IDEOGRAPHIC" else words[0]  # such as 々 and 。
