"""Sending an update: its header at once, then its frames within the credit that the coordinator gave.

The coordinator acknowledges with what it still lacks. A frame that was sent and is not lacked has arrived. When the
coordinator says nothing for a while, the header is sent again, which asks it what it lacks; after its answer, whatever
it lacks is sent again, since nothing older can still be on its way. Pure: indices and times, no bytes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

MAX_CREDIT = 256
"""Frames that are sent at once at most, whatever credit comes: they wait in memory. A coordinator gives no more in all."""
_FIRST_PATIENCE_S = 2.0
_LONGEST_PATIENCE_S = 30.0


class Push:
    """One update on its way up.

    Args:
        num_frames: of the update.
        credit: frames that may be on their way, unacknowledged, at once; 0 to wait for some.
        rng: of the jitter.
        now: monotonic seconds.
    """

    def __init__(self, num_frames: int, credit: int, rng: random.Random, now: float) -> None:
        self.num_frames = num_frames
        self.credit = min(credit, MAX_CREDIT)
        self._missing: list[tuple[int, int]] = [(0, num_frames)]
        self._outstanding: set[int] = set()
        self._sent_up_to = 0
        self._asking = False
        self._rng = rng
        self._patience_s = _FIRST_PATIENCE_S
        self._ask_at = now + self._jittered()

    @property
    def all_sent(self) -> bool:
        """Whether every frame that the coordinator may lack is on its way."""
        return self._sent_up_to >= self.num_frames and not self._asking

    @property
    def fraction(self) -> float:
        """How much was sent, 0 to 1."""
        return self._sent_up_to / self.num_frames

    def next_frames(self) -> tuple[int, ...]:
        """The frames to send now, within credit; they count as sent."""
        frames: list[int] = []
        for start, stop in self._missing:
            for index in range(start, stop):
                if len(self._outstanding) >= self.credit:
                    return tuple(frames)
                if index not in self._outstanding:
                    self._outstanding.add(index)
                    self._sent_up_to = max(self._sent_up_to, index + 1)
                    frames.append(index)
        return tuple(frames)

    def acknowledge(self, missing: Sequence[tuple[int, int]], credit: int, now: float) -> None:
        """The coordinator lacks these ranges."""
        self.credit = min(credit, MAX_CREDIT)
        self._missing = [(max(0, start), min(stop, self.num_frames)) for start, stop in missing]
        if self._asking:
            self._asking = False
            self._outstanding.clear()
        else:
            self._outstanding = {index for index in self._outstanding if self._lacks(index)}
        if credit:  # without any, it waits in line: the back-off goes on
            self._patience_s = _FIRST_PATIENCE_S
        self._ask_at = now + self._jittered()

    def ask(self, now: float) -> bool:
        """Whether it is time to send the header again; it then counts as sent."""
        if now < self._ask_at:
            return False
        self._patience_s = min(self._patience_s * 2, _LONGEST_PATIENCE_S)
        self.asked(now)
        return True

    def asked(self, now: float) -> None:
        """The header was sent again: what the coordinator answers tells what is lost."""
        self._asking = True
        self._ask_at = now + self._jittered()

    def deadline(self) -> float:
        """When to ask."""
        return self._ask_at if self.num_frames else math.inf

    def _lacks(self, index: int) -> bool:
        return any(start <= index < stop for start, stop in self._missing)

    def _jittered(self) -> float:
        return self._patience_s * self._rng.uniform(0.75, 1.25)
