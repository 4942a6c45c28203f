"""The queue through which everything reaches a driver: transport events, timers' ends, results of other threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

E = TypeVar("E")


class EventQueue(Generic[E]):
    """A thread-safe queue that is drained a turn at a time and knows how many bytes wait in it.

    Its producers never block. One that can pause (a transport, by not reading its socket) asks `is_full` and is
    called back through `on_drained` when there is room again.

    Args:
        limit_bytes: above this, `is_full` is true. Events whose size nobody gives count nothing.
    """

    def __init__(self, limit_bytes: int = 64 * 1024 * 1024) -> None:
        self._limit_bytes = limit_bytes
        self._events: deque[tuple[E, int]] = deque()
        self._size_bytes = 0
        self._ready = threading.Condition()
        self._was_full = False
        self.on_drained: Callable[[], None] | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of the events that wait."""
        return self._size_bytes

    def __len__(self) -> int:
        return len(self._events)

    def is_full(self) -> bool:
        """Whether a producer that can pause should; `on_drained` is then called once there is room."""
        with self._ready:
            if self._size_bytes > self._limit_bytes:
                self._was_full = True
                return True
            return False

    def put(self, event: E, size_bytes: int = 0) -> None:
        """Add an event. Never blocks."""
        with self._ready:
            self._events.append((event, size_bytes))
            self._size_bytes += size_bytes
            self._ready.notify()

    def take(self, timeout_s: float | None, max_events: int = 512) -> list[E]:
        """Wait for at least one event, at most `timeout_s` (None: for ever), and return up to `max_events` in order."""
        with self._ready:
            if not self._events:
                self._ready.wait(timeout_s)
            num_events = min(len(self._events), max_events)
            taken = [self._events.popleft() for _ in range(num_events)]
            self._size_bytes -= sum(size for _, size in taken)
            call_back = self._was_full and self._size_bytes <= self._limit_bytes // 2
            if call_back:
                self._was_full = False
        if call_back and self.on_drained is not None:
            self.on_drained()
        return [event for event, _ in taken]
