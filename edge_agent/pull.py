"""Pulling a model from the broker: a window of subscriptions to retained frames that moves as they arrive.

The coordinator published each frame once; the broker keeps it. To subscribe to a frame's topic is to ask for it, and to
subscribe again is to ask again. A frame that does not come is asked for again after a while, with back-off, since a broker
may drop it under load or be restarted. Pure: indices and times, no bytes.
"""

from __future__ import annotations

import math
import random

from msgspec import Struct

WINDOW = 16
"""Frames asked for at once: enough to keep a connection busy, and below a default Mosquitto's 20 in flight."""
_FIRST_PATIENCE_S = 2.0
_LONGEST_PATIENCE_S = 30.0


class Ask(Struct, frozen=True):
    """Subscribe to these frames' topics, and first unsubscribe from those that came."""

    wanted: tuple[int, ...]
    done: tuple[int, ...] = ()


class Pull:
    """One version on its way down.

    Args:
        num_frames: of the version.
        rng: of the jitter.
        now: monotonic seconds.
    """

    def __init__(self, num_frames: int, rng: random.Random, now: float) -> None:
        self.num_frames = num_frames
        self.arrived: set[int] = set()
        self._next = 0
        self._asked: set[int] = set()
        self._done: list[int] = []
        self._rng = rng
        self._patience_s = _FIRST_PATIENCE_S
        self._ask_again_at = now + self._jittered()

    @property
    def is_complete(self) -> bool:
        """Whether every frame arrived."""
        return len(self.arrived) == self.num_frames

    @property
    def fraction(self) -> float:
        """How much arrived, 0 to 1."""
        return len(self.arrived) / self.num_frames

    def wants(self, index: int) -> bool:
        """Whether this frame is still missing."""
        return 0 <= index < self.num_frames and index not in self.arrived

    def start(self) -> Ask:
        """Ask for the first window."""
        return self._fill()

    def take(self, index: int, now: float) -> Ask | None:
        """A frame arrived and is stored. Returns what to ask for next, half a window at a time."""
        self.arrived.add(index)
        self._asked.discard(index)
        self._done.append(index)
        self._patience_s = _FIRST_PATIENCE_S
        self._ask_again_at = now + self._jittered()
        if self.is_complete or len(self._asked) <= WINDOW // 2:
            return self._fill()
        return None

    def ask_again(self, now: float) -> Ask | None:
        """What to ask for again because it did not come; None before the deadline."""
        if now < self._ask_again_at:
            return None
        self._patience_s = min(self._patience_s * 2, _LONGEST_PATIENCE_S)
        return self.reconnect(now)

    def reconnect(self, now: float) -> Ask:
        """Ask for the whole window again: the connection is new."""
        self._ask_again_at = now + self._jittered()
        return Ask(tuple(sorted(self._asked)))

    def restart(self, now: float) -> Ask:
        """Ask for every frame again: together they were not what the head says."""
        self.arrived.clear()
        self._next = 0
        self._ask_again_at = now + self._jittered()
        return self._fill()

    def deadline(self) -> float:
        """When to ask again."""
        return math.inf if self.is_complete else self._ask_again_at

    def _fill(self) -> Ask:
        wanted: list[int] = []
        while len(self._asked) < WINDOW and self._next < self.num_frames:
            if self._next not in self.arrived:
                self._asked.add(self._next)
                wanted.append(self._next)
            self._next += 1
        done, self._done = tuple(self._done), []
        return Ask(tuple(wanted), done)

    def _jittered(self) -> float:
        return self._patience_s * self._rng.uniform(0.75, 1.25)
