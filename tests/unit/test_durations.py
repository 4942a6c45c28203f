"""Durations in words."""

from __future__ import annotations

import pytest

from coordinator.durations import in_words


@pytest.mark.parametrize(
    ("duration_s", "words"),
    [
        (-3.0, "0 s"),
        (0.4, "0 s"),
        (87.2, "87 s"),
        (119.4, "119 s"),
        (119.6, "2 min"),
        (598.0, "9 min 58 s"),
        (3598.0, "59 min 58 s"),
        (3600.0, "60 min"),
        (7500.0, "2 h 5 min"),
        (172800.0, "48 h"),
    ],
)
def test_a_duration_is_said_in_the_units_that_a_person_would_use(duration_s, words):
    assert in_words(duration_s) == words
