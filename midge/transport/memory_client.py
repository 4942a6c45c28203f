"""The client's end of a connection to a broker in memory, and what the broker remembers of it.

A connection that is cut comes back by itself after a moment, as `Transport` promises. What was handed to it and had not
reached the broker yet is lost.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from midge.transport.base import MessageReceived, PacketTooLargeError, Published, TransportEvent, Will

if TYPE_CHECKING:
    from midge.transport.memory import MemoryBroker


class Session:
    """What a broker knows of one client id, connected or not.

    Attributes:
        client: its connection; None while it has none.
        topics: that it reads, in order.
        wildcards: that it reads, by their levels.
        waiting: what came while it was away, and until when each is of interest.
        will: to be published unless it comes back in time.
    """

    def __init__(self) -> None:
        self.client: MemoryTransport | None = None
        self.topics: dict[str, None] = {}
        self.wildcards: list[list[str]] = []
        self.waiting: deque[tuple[MessageReceived, float]] = deque()
        self.will: Will | None = None


class MemoryTransport:
    """One connection to a `MemoryBroker`; a `Transport` whose events go to `sink` instead of a queue."""

    def __init__(
        self,
        broker: MemoryBroker,
        client_id: str,
        sink: Callable[[TransportEvent], None],
        will: Will | None,
        *,
        keeps_session: bool = False,
    ) -> None:
        self.broker = broker
        self.client_id = client_id
        self.sink = sink
        self.will = will
        self.keeps_session = keeps_session
        self.session = 0
        self.last_at = 0.0
        self.is_dark = False
        self._session: Session | None = None
        self._is_wanted = False
        self._sent_at = 0.0
        self._token = 0

    # What a driver calls.

    def start(self) -> None:
        """See `Transport.start`."""
        if not self._is_wanted:
            self._is_wanted = True
            self.broker.attach(self)

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, expiry_s: float | None = None
    ) -> int:
        """See `Transport.publish`."""
        if self._session is None:
            return 0
        broker = self.broker
        limit = broker.packet_limit_bytes
        if limit is not None and len(payload) + len(topic) > limit:
            raise PacketTooLargeError(f"{topic}: {len(payload)} bytes, the broker takes {limit}")
        self._token += 1
        token, expires_at = self._token, math.inf if expiry_s is None else broker.now + expiry_s

        def arrive() -> None:
            broker.route(topic, payload, retain=retain, expires_at=expires_at)
            if qos:
                broker.send(self, Published(token), faultless=True)

        self._send(arrive)
        return token

    def subscribe(self, topics: Sequence[str], *, qos: int = 1) -> None:  # noqa: ARG002
        """See `Transport.subscribe`."""
        session, wanted = self._session, tuple(topics)

        def arrive() -> None:
            assert session is not None
            for topic in wanted:
                self.broker.subscribe(session, topic)

        self._send(arrive)

    def unsubscribe(self, topics: Sequence[str]) -> None:
        """See `Transport.unsubscribe`."""
        session, unwanted = self._session, tuple(topics)

        def arrive() -> None:
            assert session is not None
            for topic in unwanted:
                self.broker.unsubscribe(session, topic)

        self._send(arrive)

    def stop(self, timeout_s: float = 2.0) -> None:  # noqa: ARG002
        """See `Transport.stop`: what was handed over still arrives, and no will follows."""
        self._is_wanted = False
        self.sink = _ignore
        if self.is_dark and self._session is not None:
            self._drop(0.0)  # the broker never hears of it
        else:
            self._send(lambda: self._drop(math.inf))

    # Faults.

    def cut(self, *, for_s: float = 0.0, noticed_after_s: float = 0.0) -> None:
        """The connection breaks, for at least `for_s`; the broker notices later, and the will's delay counts from then."""
        if self._session is not None:
            self._drop(noticed_after_s)
            self.broker.tell_cut(self)
            self.come_back(for_s)

    def go_dark(self) -> None:
        """Whatever is sent either way vanishes, and neither side notices, until `cut`."""
        self.is_dark = True

    def kill(self, *, noticed_after_s: float = 0.0) -> None:
        """The process is gone: nothing reaches it any more."""
        self._is_wanted = False
        self.sink = _ignore
        if self._session is not None:
            self._drop(noticed_after_s)

    # For the broker.

    def connected(self, session: Session) -> None:
        """The connection is up."""
        self.session += 1
        self._session = session
        self.is_dark = False

    def come_back(self, after_s: float) -> None:
        """Connect again, a moment after `after_s`."""
        broker = self.broker

        def reconnect() -> None:
            if self._is_wanted and self._session is None:
                broker.attach(self)

        broker.call_at(broker.now + after_s + broker.rng.uniform(0.0, broker.faults.reconnect_s), reconnect)

    def _drop(self, noticed_after_s: float) -> None:
        session, self._session = self._session, None
        assert session is not None
        self.session += 1
        self.broker.detach(self, session, noticed_after_s)

    def _send(self, arrive: Callable[[], None]) -> None:
        """Have the broker do this once it has reached it, in order with all else on this connection."""
        if self._session is None or self.is_dark:
            return
        broker = self.broker
        uplink_s = broker.faults.uplink_s
        if not uplink_s and self._sent_at <= broker.now:
            arrive()
            return
        sent_in = self.session
        self._sent_at = max(self._sent_at, broker.now + uplink_s * broker.rng.random())

        def arrive_if_up() -> None:
            if self.session == sent_in and not self.is_dark:
                arrive()

        broker.call_at(self._sent_at, arrive_if_up)


def _ignore(event: TransportEvent) -> None:
    """A process that is gone takes nothing."""
