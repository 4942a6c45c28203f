"""Identifiers: what may be one, and that nothing which is special on a path, in a topic or in a label may."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midge.wire.errors import TopicError
from midge.wire.identifiers import PATTERN, check_identifier, is_identifier, task_name
from tests.wire.examples import NOT_IDENTIFIERS


@pytest.mark.parametrize("text", ["a", "0", "pi-3", "site_1", "a-", "a" * 64, "coordinator", "0-0_0"])
def test_lower_case_letters_digits_and_inner_signs_are_identifiers(text):
    assert is_identifier(text)
    assert check_identifier("agent", text) == text


@pytest.mark.fault(23)
@pytest.mark.parametrize("text", NOT_IDENTIFIERS.values(), ids=NOT_IDENTIFIERS.keys())
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
    for text in NOT_IDENTIFIERS.values():
        assert re.search(PATTERN, text) is None


def test_the_message_shows_what_was_seen_though_not_all_of_something_long():
    with pytest.raises(TopicError) as caught:
        check_identifier("run", "X" * 10_000)
    assert str(caught.value) == (
        f"run '{'X' * 77}...': expected 1 to 64 characters of a-z, 0-9, _ and -, starting with a-z or 0-9"
    )


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("digits", "digits"),
        ("my.tasks:Images.best", "my.tasks:Images.best"),
        ("./my_task.py", "my_task.py"),
        ("/opt/ta:sks/my_task.py:task", "my_task.py:task"),
        ("~/my_task.py", "my_task.py"),
    ],
)
def test_the_name_of_a_task_has_no_directories(reference, name):
    assert task_name(reference) == name
    assert task_name(name) == name
