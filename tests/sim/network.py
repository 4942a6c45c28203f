"""Virtual time, and connections that lose, delay, double and reorder what is sent over them: seeded, no bytes, no topics."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any

from midge.transport.memory import Faults

INSTANT = Faults(delay_s=0.0)
"""Nothing goes wrong, and nothing takes any time."""


class Network:
    """All that is on its way, and the clock.

    Args:
        rng: of all faults and delays.
        faults: per message, as the broker in memory has them; may be changed at any time.

    Attributes:
        queue: what is to be called: when, in which order, and with what. The first comes first.
    """

    def __init__(self, rng: random.Random, faults: Faults = INSTANT) -> None:
        self.now = 0.0
        self.rng = rng
        self.faults = faults
        self.num_messages = 0
        self.queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0

    def call_at(self, at: float, act: Callable[..., None], *args: Any) -> None:
        """Have `act` called at this time."""
        self._order += 1
        heapq.heappush(self.queue, (at, self._order, act, args))

    def after(self, delay_s: float, act: Callable[..., None], *args: Any) -> None:
        """Have `act` called after so many seconds."""
        self.call_at(self.now + delay_s, act, *args)

    def send(self, last_at: float, act: Callable[..., None], *args: Any) -> float:
        """Have `act` called when a message arrives: never, once or twice.

        Returns:
            When it would arrive in order, that is behind the one that arrives at `last_at`.
        """
        faults, rng = self.faults, self.rng
        self.num_messages += 1
        at = in_order_at = max(self.now + faults.delay_s * rng.random(), last_at)
        if faults.loss and rng.random() < faults.loss:
            return in_order_at
        if faults.duplication and rng.random() < faults.duplication:
            self.call_at(at + rng.uniform(0.0, faults.reorder_s), act, *args)
        if faults.reorder and rng.random() < faults.reorder:
            at += rng.uniform(0.0, faults.reorder_s)
        self.call_at(at, act, *args)
        return in_order_at
