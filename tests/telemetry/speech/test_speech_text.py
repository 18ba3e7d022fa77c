"""Normalization, error rates and leaked words against answers worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telemetry.speech.text import character_errors, leaked_share, normalize, word_errors

REFERENCE = "The red fox runs home tonight."
TARGET = "Rain falls on the roof."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Hello,\n WORLD! ", "hello world"),
        ("Don't stop - it’s well-known", "dont stop its well known"),
        ("نَشْرَبُ الشَّايَ صَبَاحًا.", "نشرب الشاي صباحا"),
        ("مـــرحبا", "مرحبا"),
        ("¿Qué tal, mañana?", "qué tal mañana"),
        ("ﬁve ½ ①", "five 1 2 1"),
        ("ＡＢＣ", "abc"),
        ("हिन्दी", "हिन्दी"),
        ("", ""),
        ("?!", ""),
    ],
)
def test_normalized_text(text: str, expected: str) -> None:
    assert normalize(text) == expected


@given(st.text())
def test_normalizing_twice_changes_nothing(text: str) -> None:
    once = normalize(text)
    assert normalize(once) == once


@pytest.mark.parametrize(
    ("said", "asked", "wrong", "length"),
    [
        ("rain falls on the roof", TARGET, 0, 5),
        ("RAIN, falls on a roof?", TARGET, 1, 5),
        ("", TARGET, 5, 5),
        ("so rain falls on the roof", TARGET, 1, 5),
        ("one two three four", "one", 3, 1),
    ],
)
def test_word_errors(said: str, asked: str, wrong: int, length: int) -> None:
    assert word_errors(said, asked) == (wrong, length)


def test_character_errors() -> None:
    assert character_errors("abxd", "abcd") == (1, 4)
    assert character_errors("a b", "ab") == (1, 2)
    found = character_errors("", "abcd")
    assert found is not None
    assert found.rate == 1.0


@pytest.mark.parametrize("asked", ["", " ?! "])
def test_nothing_to_say_has_no_error_rate(asked: str) -> None:
    assert word_errors("word", asked) is None
    assert character_errors("word", asked) is None


@pytest.mark.parametrize(
    ("said", "leaked"),
    [
        (f"{REFERENCE} {TARGET}", 1.0),
        ("the red fox rain falls on the roof", 0.5),
        (TARGET, 0.0),
        ("rain falls", 0.0),
        ("", 0.0),
        ("something else altogether", 0.0),
    ],
)
def test_a_planted_leak_is_found(said: str, leaked: float) -> None:
    assert leaked_share(said, TARGET, REFERENCE) == pytest.approx(leaked)


def test_words_that_the_target_begins_with_are_no_leak() -> None:
    assert leaked_share("the red fox sleeps", "The red fox sleeps.", REFERENCE) == 0.0


def test_without_a_reference_text_there_is_no_leak_to_measure() -> None:
    assert leaked_share("words", TARGET, "") is None
