"""A wall clock that is wrong, and set this way and that."""

from __future__ import annotations

import time

import pytest

DAY_S = 86_400.0


class Wall:
    """Stands in for `time.time`.

    Attributes:
        ahead_s: of the true time.
        num_read: how often somebody asked.
    """

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self.num_read = 0
        self._true = time.time

    def jump(self, seconds: float) -> None:
        """Set it forward, or back."""
        self.ahead_s += seconds

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Have everyone read this one."""
        patch.setattr(time, "time", self.read)
        patch.setattr(time, "time_ns", lambda: int(self.read() * 1e9))

    def read(self) -> float:
        """Seconds since 1970, as it has them."""
        self.num_read += 1
        return self._true() + self.ahead_s
