"""What coverage follows: it makes pure Python three times as long, so of many tests of one kind it measures the first alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def first(num_measured: int, values: Iterable[Any]) -> list[Any]:
    """Parameters of a test, of which only the first are measured."""
    return [
        pytest.param(value, marks=[pytest.mark.no_cover] if number >= num_measured else [])
        for number, value in enumerate(values)
    ]
