"""What coverage follows: it makes pure Python three times as long, so of many tests of one kind it measures the first alone.

And which of them `make test` runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest


def first(num_measured: int, values: Iterable[Any], num_short: float = math.inf) -> list[Any]:
    """Parameters of a test, of which only the first are measured, and all but the first `num_short` are for `make faults`."""
    return [
        pytest.param(
            value,
            marks=[
                *([pytest.mark.no_cover] if number >= num_measured else []),
                *([pytest.mark.long] if number >= num_short else []),
            ],
        )
        for number, value in enumerate(values)
    ]
