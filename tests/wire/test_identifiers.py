"""Identifiers: what may be one, and that nothing which is special on a path, in a topic or in a label may."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midge.wire.errors import TopicError
from midge.wire.identifiers import PATTERN, check_identifier, is_identifier

BAD = {
    "nothing": "",
    "65 characters": "a" * 65,
    "a capital": "Pi",
    "a sign at the start": "-pi",
    "an underscore at the start": "_pi",
    "a space": "pi 3",
    "a dot": "pi.3",
    "this directory": ".",
    "the directory above": "..",
    "a path": "../etc/passwd",
    "an absolute path": "/etc",
    "a backslash": "a\\b",
    "a level of a topic": "a/b",
    "a wildcard for one level": "+",
    "a wildcard at the end": "a+",
    "a wildcard for the rest": "#",
    "a topic of the broker": "$sys",
    "NUL": "a\0",
    "a line feed at the end": "a\n",
    "a line feed in the middle": "a\nb",
    "a carriage return": "a\r",
    "a tab": "a\tb",
    "a quote": 'a"b',
    "a brace": "a{b}",
    "a percent sign": "%u",
    "a Cyrillic a": "\u0430gent",
    "a fullwidth a": "\uff41",
    "an Arabic digit": "\u0663",
    "a superscript": "a\u00b2",
    "a sharp s": "stra\u00dfe",
    "a dotless i": "p\u0131",
    "a combining accent": "e\u0301",
    "a zero-width joiner": "a\u200db",
    "a lone surrogate": "a\ud800",
}


@pytest.mark.parametrize("text", ["a", "0", "pi-3", "site_1", "a-", "a" * 64, "coordinator", "0-0_0"])
def test_lower_case_letters_digits_and_inner_signs_are_identifiers(text):
    assert is_identifier(text)
    assert check_identifier("agent", text) == text


@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_nothing_else_is(text):
    assert not is_identifier(text)
    with pytest.raises(TopicError, match=r"^agent .*: expected 1 to 64 characters of a-z, 0-9, _ and -, starting with"):
        check_identifier("agent", text)


@given(st.text())
def test_any_text_is_one_or_is_refused_with_the_right_error(text):
    expected = (
        1 <= len(text) <= 64 and text[0] not in "-_" and set(text) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_")
    )
    assert is_identifier(text) == expected


def test_the_pattern_says_the_same_to_a_search_as_to_a_full_match():
    # msgspec searches: a pattern that ends in $ would let "a\n" through.
    for text in BAD.values():
        assert re.search(PATTERN, text) is None


def test_the_message_shows_what_was_seen_though_not_all_of_something_long():
    with pytest.raises(TopicError) as caught:
        check_identifier("run", "X" * 10_000)
    assert str(caught.value) == (
        f"run '{'X' * 77}...': expected 1 to 64 characters of a-z, 0-9, _ and -, starting with a-z or 0-9"
    )
