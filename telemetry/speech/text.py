"""What was said against what should have been: normalization, word and character errors, leaked words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Any, NamedTuple

_ARABIC_MARKS = re.compile("[\u0610-\u061a\u0640\u064b-\u065f\u0670\u06d6-\u06ed]")
_JOINED = re.compile("['\u2019\u02bc]")  # "don't" stays one word


class Errors(NamedTuple):
    """``wrong`` words or characters for ``length`` in what should have been said."""

    wrong: int
    length: int

    @property
    def rate(self) -> float:
        """Errors per word or character; above 1 where more was said than should have been."""
        return self.wrong / self.length


def normalize(text: str) -> str:
    """Text as error rates compare it: NFKC, lower case, no punctuation, symbol or Arabic vowel mark, single spaces."""
    plain = _ARABIC_MARKS.sub("", _JOINED.sub("", unicodedata.normalize("NFKC", text).lower()))
    kept = (" " if unicodedata.category(sign)[0] in "PS" else sign for sign in plain)
    return " ".join("".join(kept).split())


def word_errors(said: str, asked: str) -> Errors | None:
    """Substituted, deleted and inserted words; None where nothing was to be said."""
    import jiwer

    return _errors(jiwer.process_words, said, asked)


def character_errors(said: str, asked: str) -> Errors | None:
    """Substituted, deleted and inserted characters, spaces included; None where nothing was to be said."""
    import jiwer

    return _errors(jiwer.process_characters, said, asked)


def _errors(process: Callable[[str, str], Any], said: str, asked: str) -> Errors | None:
    if not (wanted := normalize(asked)):
        return None
    found = process(wanted, normalize(said))
    missed = found.substitutions + found.deletions
    return Errors(missed + found.insertions, missed + found.hits)


def leaked_share(said: str, asked: str, reference: str) -> float | None:
    """Which share of the reference's words the speech begins with instead of its own; None without a reference text.

    The reference's words are aligned with as many words from the beginning of what was said. Where the words that
    should have been said fit the beginning at least as well, nothing has leaked.
    """
    own, theirs = _begins_with(said, asked), _begins_with(said, reference)
    if theirs is None:
        return None
    return theirs if theirs > (own or 0.0) else 0.0


def _begins_with(said: str, text: str) -> float | None:
    import jiwer

    words = normalize(text).split()
    if not words:
        return None
    beginning = normalize(said).split()[: len(words)]
    return jiwer.process_words(" ".join(words), " ".join(beginning)).hits / len(words)
