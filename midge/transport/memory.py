"""A broker in memory, with virtual time and seeded faults: whole federations run on it without a socket or a sleep.

It does what MQTT does and no more: QoS 1 with retained messages, wills and their delays, `+` wildcards, sessions that
outlive a connection, a retained message sent again for each subscription. Its faults are what real networks and brokers do:
lose, delay, double and reorder messages, cut connections, notice a cut late, swallow what is sent on a dead one, die and
come back with all, some or none of what they kept. Time passes only when `deliver_next` or `wait_until` is called, and a
seed gives the same history every time.

A connection that is cut comes back by itself after a moment, as `Transport` promises. What was handed to it and had not
reached the broker yet is lost.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from midge.transport.base import (
    Connected,
    Disconnected,
    MessageReceived,
    PacketTooLargeError,
    Published,
    TransportEvent,
    Will,
)

MAX_WAITING = 1000
"""Messages kept for a session whose client is away; the oldest stay, as with Mosquitto's `max_queued_messages`."""


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What goes wrong, as probabilities per delivery and ranges of delays.

    Attributes:
        loss: a message does not reach one subscriber.
        duplication: it reaches one twice, the second time up to `reorder_s` later.
        reorder: it is held back for up to `reorder_s`, while later ones pass.
        delay_s: every delivery takes up to so many seconds.
        reorder_s: see `duplication` and `reorder`.
        uplink_s: what a client sends takes up to so many seconds to reach the broker, and is lost with the connection.
        reconnect_s: a connection that was lost comes back within so many seconds.
    """

    loss: float = 0.0
    duplication: float = 0.0
    reorder: float = 0.0
    delay_s: float = 0.001
    reorder_s: float = 0.5
    uplink_s: float = 0.0
    reconnect_s: float = 1.0


class _Session:
    """What the broker knows of one client id, connected or not."""

    def __init__(self) -> None:
        self.client: MemoryTransport | None = None
        self.topics: dict[str, None] = {}
        self.wildcards: list[list[str]] = []
        self.waiting: deque[tuple[MessageReceived, float]] = deque()
        self.will: Will | None = None


class MemoryBroker:
    """The broker, and the clock of everything on it.

    Args:
        rng: of all faults.
        faults: what goes wrong; may be changed at any time.
        packet_limit_bytes: a larger message is refused at its sender.
        delays_wills: whether a will waits for its delay (MQTT 5), or is published at once (3.1.1).
    """

    def __init__(
        self,
        rng: random.Random,
        faults: Faults = Faults(),
        packet_limit_bytes: int | None = None,
        *,
        delays_wills: bool = True,
    ) -> None:
        self.now = 0.0
        self.faults = faults
        self.packet_limit_bytes = packet_limit_bytes
        self.delays_wills = delays_wills
        self.retained: dict[str, bytes] = {}
        self.num_delivered = 0
        self.num_waiting = 0
        self.is_up = True
        self.rng = rng
        self._sessions: dict[str, _Session] = {}
        self._readers: dict[str, dict[_Session, None]] = {}
        self._wildcard_readers: dict[str, tuple[_Session, ...]] = {}
        self._absent: list[MemoryTransport] = []
        self._queue: list[
            tuple[float, int, MemoryTransport, int, TransportEvent] | tuple[float, int, None, int, Callable[[], None]]
        ] = []
        self._order = 0

    def transport(
        self,
        client_id: str,
        sink: Callable[[TransportEvent], None],
        will: Will | None = None,
        *,
        keeps_session: bool = False,
    ) -> MemoryTransport:
        """A connection for `client_id`; `sink` takes its events when they are due.

        With `keeps_session` the broker keeps its subscriptions, and what comes for them, while it is away.
        """
        return MemoryTransport(self, client_id, sink, will, keeps_session=keeps_session)

    # Time.

    def next_at(self) -> float:
        """When the next delivery or action is due; infinity if none is."""
        return self._queue[0][0] if self._queue else math.inf

    def deliver_next(self) -> bool:
        """Let time pass to the next delivery or action and make it. False if there was none."""
        if not self._queue:
            return False
        at, _, client, session, what = heapq.heappop(self._queue)
        self.now = max(self.now, at)
        if client is None:
            what()  # type: ignore[operator]  # no client: an action
        elif session in (client.session, _ALWAYS):
            self.num_delivered += 1
            client.sink(what)  # type: ignore[arg-type]
        return True

    def wait_until(self, at: float) -> None:
        """Let time pass; nothing must be due before."""
        self.now = max(self.now, at)

    def call_at(self, at: float, action: Callable[[], None]) -> None:
        """Have `action` called at this time, in order with the deliveries."""
        self._order += 1
        heapq.heappush(self._queue, (max(at, self.now), self._order, None, 0, action))

    @property
    def queue_length(self) -> int:
        """Deliveries and actions that are to come."""
        return len(self._queue)

    # Faults of the broker itself.

    def stop(self, *, restored: Mapping[str, bytes] | None = None, forget: bool = False) -> None:
        """Kill the broker: everyone is cut off, and no will is published.

        Args:
            restored: what it will have retained, read from an older file; by default all that it has now.
            forget: it will have retained nothing, and know of no session.
        """
        self.is_up = False
        self.retained = {} if forget else dict(self.retained if restored is None else restored)
        for session in self._sessions.values():
            if session.client is not None:
                session.client.cut(noticed_after_s=math.inf)
            session.will = None
            if forget or restored is not None:
                self._forget(session)

    def start(self) -> None:
        """Start it again: all that want to be connected are soon, each at its own moment."""
        self.is_up = True
        absent, self._absent = self._absent, []
        for client in absent:
            client.come_back(0.0)

    # For the transports.

    def attach(self, client: MemoryTransport) -> None:
        """Connect, or note that the client waits for the broker. An older connection of the same client id is cut off."""
        if not self.is_up:
            self._absent.append(client)
            return
        session = self._sessions.setdefault(client.client_id, _Session())
        if session.client is not None:
            session.client.cut(noticed_after_s=0.0)
        pending, session.will = session.will, None
        if pending is not None and not self.delays_wills:
            self.route(pending.topic, pending.payload, retain=True)
        session.client = client
        client.connected(session)
        self.send(client, Connected("memory", self.packet_limit_bytes), faultless=True)
        if client.keeps_session:
            waiting, session.waiting = session.waiting, deque()
            self.num_waiting -= len(waiting)
            for message, expires_at in waiting:
                if self.now < expires_at:
                    self.send(client, message)
        else:
            self._forget(session)

    def detach(self, client: MemoryTransport, session: _Session, noticed_after_s: float) -> None:
        """Disconnect; the will follows once the broker has noticed, unless the client is back by then."""
        session.client = None
        if not client.keeps_session:
            self._forget(session)
        will = client.will
        if will is None or noticed_after_s == math.inf:
            return
        session.will = will
        delay_s = noticed_after_s + (will.delay_s if self.delays_wills else 0)
        if delay_s > 0:
            self.call_at(self.now + delay_s, lambda: self._publish_will(session, will))
        else:
            self._publish_will(session, will)

    def route(self, topic: str, payload: bytes, *, retain: bool, expires_at: float = math.inf) -> None:
        """A message came: keep it if it is to be kept, and send it to whom it concerns."""
        if retain:
            if payload:
                self.retained[topic] = payload
            else:
                self.retained.pop(topic, None)
        message = MessageReceived(topic, payload)
        for session in (*self._readers.get(topic, ()), *self._matching(topic)):
            if session.client is not None:
                self.send(session.client, message)
            elif len(session.waiting) < MAX_WAITING:
                session.waiting.append((message, expires_at))
                self.num_waiting += 1

    def subscribe(self, session: _Session, topic: str) -> None:
        """Note who reads what, and send what is retained."""
        if "+" in topic:
            levels = topic.split("/")
            if levels not in session.wildcards:
                session.wildcards.append(levels)
                self._wildcard_readers.clear()
            found = [known for known in self.retained if _matches(levels, known)]
        else:
            session.topics[topic] = None
            self._readers.setdefault(topic, {})[session] = None
            found = [topic] if topic in self.retained else []
        if session.client is not None:
            for known in found:
                self.send(session.client, MessageReceived(known, self.retained[known], retained=True))

    def unsubscribe(self, session: _Session, topic: str) -> None:
        """Note that it is not read any more."""
        if session.topics.pop(topic, _Session) is None:
            readers = self._readers[topic]
            del readers[session]
            if not readers:
                del self._readers[topic]

    def send(self, client: MemoryTransport, event: TransportEvent, *, faultless: bool = False) -> None:
        """Deliver an event, sooner or later, once, twice or never."""
        faults, rng = self.faults, self.rng
        at = client.last_at = max(
            self.now + faults.delay_s * rng.random(), client.last_at
        )  # in order, as a connection is
        if not faultless:
            if client.is_dark or (faults.loss and rng.random() < faults.loss):
                return
            if faults.duplication and rng.random() < faults.duplication:
                self._push(at + rng.uniform(0.0, faults.reorder_s), client, client.session, event)
            if faults.reorder and rng.random() < faults.reorder:
                at += rng.uniform(0.0, faults.reorder_s)
        self._push(at, client, client.session, event)

    def tell_cut(self, client: MemoryTransport) -> None:
        """Let a client know that it is cut off, whatever became of its connection since."""
        self._push(self.now, client, _ALWAYS, Disconnected("the connection was cut"))

    def _publish_will(self, session: _Session, will: Will) -> None:
        if session.will is will:
            session.will = None
            self.route(will.topic, will.payload, retain=True)

    def _push(self, at: float, client: MemoryTransport, session: int, event: TransportEvent) -> None:
        self._order += 1
        heapq.heappush(self._queue, (at, self._order, client, session, event))

    def _matching(self, topic: str) -> tuple[_Session, ...]:
        known = self._wildcard_readers.get(topic)
        if known is None:
            known = self._wildcard_readers[topic] = tuple(
                session
                for session in self._sessions.values()
                if any(_matches(levels, topic) for levels in session.wildcards)
            )
        return known

    def _forget(self, session: _Session) -> None:
        for topic in list(session.topics):
            self.unsubscribe(session, topic)
        if session.wildcards:
            session.wildcards.clear()
            self._wildcard_readers.clear()
        self.num_waiting -= len(session.waiting)
        session.waiting.clear()


_ALWAYS = -1


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
        self._session: _Session | None = None
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

    def connected(self, session: _Session) -> None:
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


def _matches(levels: list[str], topic: str) -> bool:
    parts = topic.split("/")
    return len(parts) == len(levels) and all(level in ("+", part) for level, part in zip(levels, parts, strict=True))
