"""How people write words that the model knows in lower case: `paris` is `Paris`.

A word gets the capitals that the captions nearly always give it within a sentence. At the start of
a sentence every word has a capital, so these occurrences say nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
from numpy.typing import NDArray

from cache.record import CaptionTable, Strings

_NEARLY_ALWAYS = 0.8
_LEAST_OCCURRENCES = 2
_PART_CAPTIONS = 1 << 18  # read at a time, since it takes 200 bytes for each of their tokens
_ENDS = (".", "!", "?")
# A full stop behind these does not end a sentence.
_ABBREVIATIONS = frozenset(("dr", "jr", "mr", "mrs", "ms", "st", "vs"))


def ends_sentence(token: str, before: str) -> bool:
    """Whether a sentence ends with this token. before: the token in front of it, or "".

    The full stop of an abbreviation (`mr .`, `t.v .`, `j .`) ends none, nor do three of them. A
    tokenizer that splits at spaces alone leaves the sign at the end of the word.
    """
    if not token.endswith(_ENDS) or token.endswith(".."):
        return False
    word = (token.rstrip("".join(_ENDS)) or before).lower()
    is_abbreviation = (len(word) == 1 and word.isalpha()) or "." in word or word in _ABBREVIATIONS
    return not (token.endswith(".") and is_abbreviation)


def written_cases(table: CaptionTable, rows: NDArray[np.int64] | None = None) -> dict[str, str]:
    """The words that captions nearly always write with capitals within a sentence, and the form
    that most of these occurrences have: `{"paris": "Paris", "tv": "TV"}`.

    rows: read only the captions of these photos, or None for all. A caption whose every word has a
    capital is left out.
    """
    words, chosen = list(table.words), table.of_photos(rows)
    forms: defaultdict[str, Counter[str]] = defaultdict(Counter)
    totals = np.zeros(len(words), np.int64)
    for start in range(0, len(table), _PART_CAPTIONS):
        stop = min(len(table), start + _PART_CAPTIONS)
        totals += _count_forms(table.part(start, stop), words, chosen[start:stop], forms)
    cases = {}
    for word, total in zip(words, totals.tolist(), strict=True):
        written = forms.get(word, Counter())
        if total >= _LEAST_OCCURRENCES and written.total() >= _NEARLY_ALWAYS * total:
            cases[word] = min(written.items(), key=lambda item: (-item[1], item[0]))[0]
    return cases


def _count_forms(
    table: CaptionTable,
    words: list[str],
    chosen: NDArray[np.bool_],
    forms: defaultdict[str, Counter[str]],
) -> NDArray[np.int64]:
    """Add the forms of words with capitals to `forms`. Returns how often each word (W,) is within a
    sentence. words: those of the table. chosen: (M,) the captions to read.
    """
    within = _within_sentences(table, words) & np.repeat(chosen, np.diff(table.token_offsets))
    for index in np.flatnonzero(chosen & _may_have_capitals(table.texts)).tolist():
        text = table.texts[index]
        place = slice(*table.token_offsets[index : index + 2].tolist())
        tokens = [words[number] for number in table.tokens[place].tolist()]
        pairs = zip(tokens, _as_written(tokens, text), within[place].tolist(), strict=True)
        inside = [(word, form) for word, form, is_within in pairs if is_within]
        if len(inside) > 1 and all(form != word for word, form in inside):
            within[place] = False
            continue
        for word, form in inside:
            if form != word:
                forms[word][form] += 1
    counts: NDArray[np.int64] = np.bincount(table.tokens[within], minlength=len(words))
    return counts


def _may_have_capitals(texts: Strings) -> NDArray[np.bool_]:
    """(M,) false for a text whose letters are all ASCII, and lower-case but for the first byte."""
    capital = (texts.text >= ord("A")) & (texts.text <= ord("Z")) | (texts.text >= 0x80)
    capital[texts.offsets[:-1][np.diff(texts.offsets) > 0]] = False
    before = np.searchsorted(np.flatnonzero(capital), texts.offsets)  # how many there are
    found: NDArray[np.bool_] = before[1:] > before[:-1]
    return found


def _as_written(tokens: list[str], text: str) -> list[str]:
    """Each lower-case token as it stands in the text, where it is found; else the token itself.

    Tokens are parts of the text in its order, but for quotation marks, which NLTK replaces. Looking
    them up takes a fifteenth of the time of splitting the text again.
    """
    lowered, start, found = text.lower(), 0, []
    if len(lowered) != len(text):  # as with İ, whose dot becomes a character of its own
        return tokens
    for token in tokens:
        place = lowered.find(token, start)
        if place < 0 or any(map(str.isalnum, lowered[start:place])):
            found.append(token)
        else:
            start = place + len(token)
            found.append(text[place:start])
    return found


def _within_sentences(table: CaptionTable, words: list[str]) -> NDArray[np.bool_]:
    """(K,) whether a token is a word with another word before it in its sentence."""
    tokens, count = table.tokens.astype(np.int64), len(words)
    begins = np.zeros(len(tokens), bool)
    begins[table.token_offsets[:-1][np.diff(table.token_offsets) > 0]] = True
    before = np.roll(tokens, 1)
    before[begins] = count  # no word
    may_end = np.array([word.endswith(_ENDS) for word in words], bool)
    places = np.flatnonzero(may_end[tokens])
    # Each pair of a word that may end a sentence and the word before it is looked at once.
    pairs, which = np.unique(before[places] * count + tokens[places], return_inverse=True)
    ends = [
        ends_sentence(words[last], words[earlier] if earlier < count else "")
        for earlier, last in (divmod(pair, count) for pair in pairs.tolist())
    ]
    after = places[np.array(ends, bool)[which]] + 1
    begins[after[after < len(tokens)]] = True
    is_word = np.array([any(map(str.isalnum, word)) for word in words], bool)[tokens]
    earlier_words = np.cumsum(is_word) - is_word
    first = np.maximum.accumulate(np.where(begins, np.arange(len(tokens)), 0))
    within: NDArray[np.bool_] = is_word & (earlier_words > earlier_words[first])
    return within
