"""A simulated process: it has a clock of its own, wakes when it asked to, and can be killed between any two operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from midge.transport.memory_client import MemoryTransport

if TYPE_CHECKING:
    from tests.sim.federation import Federation

_MAX_WAKES_AT_ONCE = 100


class Crash(BaseException):
    """The process was killed. Not an `Exception`: nothing in the code under test may catch it."""

    def __init__(self, process: Process) -> None:
        super().__init__(process.name)
        self.process = process


class Process:
    """What coordinator and agents have in common.

    Attributes:
        wake_at: when it wants to be called, in the federation's time; infinity for never.
        generation: counts its starts; what an earlier one asked for does not reach a later one.
        num_operations: that it has done since it was made.
    """

    def __init__(self, federation: Federation, name: str) -> None:
        self.federation = federation
        self.name = name
        self.wake_at = math.inf
        self.is_up = False
        self.generation = 0
        self.num_operations = 0
        self.transport: MemoryTransport | None = None
        self._fuse = 0
        self._clock_offset = 0.0
        self._deadline = math.inf
        self._num_wakes = 0
        self._woken_at = -math.inf

    def now(self) -> float:
        """This process's monotonic clock: no other's."""
        return self.federation.broker.now + self._clock_offset

    def tick(self) -> None:
        """An operation is about to be done, or was just done: the process may die here."""
        self.num_operations += 1
        if self._fuse:
            self._fuse -= 1
            if not self._fuse:
                raise Crash(self)

    def light_fuse(self, num_operations: int) -> None:
        """Have it die at this operation from now, at least 1."""
        self._fuse = num_operations

    def boot(self) -> None:
        """Start it."""
        self.is_up = True
        self.generation += 1
        self._clock_offset = self.federation.rng.choice((0.0, 1e3, 1e6)) if self.federation.has_faults else 0.0
        self._start()

    def die(self, noticed_after_s: float) -> None:
        """End it without a word; the broker notices later."""
        self.is_up = False
        self.generation += 1
        self._fuse = 0
        self.wake_at = self._deadline = math.inf
        if self.transport is not None:
            self.transport.kill(noticed_after_s=noticed_after_s)
            self.transport = None
        self._lost()

    def wake(self) -> None:
        """Its deadline has come."""
        broker = self.federation.broker
        self._num_wakes = self._num_wakes + 1 if broker.now <= self._woken_at + 1e-6 else 0
        self._woken_at = broker.now
        assert self._num_wakes < _MAX_WAKES_AT_ONCE, (
            f"busy loop: {self.name} wants to wake again and again at {broker.now}"
        )
        self._on_deadline(max(self.now(), self._deadline if self._deadline < math.inf else 0.0))

    def came(self) -> None:
        """Something came: to wake for it is no busy loop."""
        self._num_wakes = 0

    def wait_for(self, deadline: float) -> None:
        """Remember when to wake, by this process's clock."""
        self._deadline = deadline
        self.wake_at = deadline - self._clock_offset

    def leap(self, seconds: float) -> None:
        """Its clock goes on by so much at once, as that of a machine that was suspended: no monotonic clock goes back."""
        self._clock_offset += seconds
        self.wake_at = max(self.federation.now, self._deadline - self._clock_offset)

    def call_later(self, delay_s: float, action: Callable[[], None]) -> None:
        """Have `action` called, unless the process is killed before."""
        generation = self.generation

        def call() -> None:
            if generation == self.generation:
                action()

        broker = self.federation.broker
        broker.call_at(broker.now + delay_s, call)

    # What each kind brings.

    def _start(self) -> None:
        raise NotImplementedError

    def _lost(self) -> None:
        raise NotImplementedError

    def _on_deadline(self, now: float) -> None:
        raise NotImplementedError


class WatchedTransport:
    """A connection whose process may die at each operation, and whose messages are audited."""

    def __init__(self, process: Process, inner: MemoryTransport, audit: Callable[[str, bytes], None]) -> None:
        self._process = process
        self._inner = inner
        self._audit = audit

    def start(self) -> None:
        """See `Transport`; so do all that follow."""
        self._inner.start()

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, expiry_s: float | None = None
    ) -> int:
        self._process.tick()
        self._audit(topic, payload)
        return self._inner.publish(topic, payload, qos=qos, retain=retain, expiry_s=expiry_s)

    def subscribe(self, topics: Sequence[str], *, qos: int = 1) -> None:
        self._process.tick()
        self._inner.subscribe(topics, qos=qos)

    def unsubscribe(self, topics: Sequence[str]) -> None:
        self._process.tick()
        self._inner.unsubscribe(topics)

    def stop(self, timeout_s: float = 2.0) -> None:
        self._inner.stop(timeout_s)
