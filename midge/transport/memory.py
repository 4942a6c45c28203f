"""A broker in memory, with virtual time and seeded faults: whole federations run on it without a socket or a sleep.

It does what MQTT does and no more: QoS 1 with retained messages, wills and their delays, `+` wildcards, sessions that
outlive a connection, a retained message sent again for each subscription. Its faults are what real networks and brokers do:
lose, delay, double and reorder messages, cut connections, notice a cut late, swallow what is sent on a dead one, die and
come back with all, some or none of what they kept. Time passes only when `deliver_next` or `wait_until` is called, and a
seed gives the same history every time.

It is harsher than MQTT where it is simpler: what was on its way when a connection broke is lost, also for a session that
the broker keeps; only what comes while the client is away waits for it. memory_client.py has the other end.
"""

from __future__ import annotations

import copy
import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from midge.transport.base import Connected, Disconnected, MessageReceived, TransportEvent, Will
from midge.transport.memory_client import MemoryTransport, Session

MAX_WAITING = 1000
"""Messages kept for a session whose client is away; the oldest stay, as with Mosquitto's `max_queued_messages`."""
_ALWAYS = -1


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
        self._sessions: dict[str, Session] = {}
        self._readers: dict[str, dict[Session, None]] = {}
        self._wildcard_readers: dict[str, tuple[Session, ...]] = {}
        self._absent: list[MemoryTransport] = []
        self._queue: list[tuple[float, int, MemoryTransport | None, int, Any]] = []
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
            what()
        elif session in (client.session, _ALWAYS):
            self.num_delivered += 1
            client.sink(what)
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
        session = self._sessions.setdefault(client.client_id, Session())
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

    def detach(self, client: MemoryTransport, session: Session, noticed_after_s: float) -> None:
        """Disconnect; the will follows once the broker has noticed, unless the client is back by then."""
        session.client = None
        if not client.keeps_session:
            self._forget(session)
        if client.will is None or noticed_after_s == math.inf:
            return
        will = session.will = copy.copy(client.will)  # told from the will of another cut by its identity
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

    def subscribe(self, session: Session, topic: str) -> None:
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

    def unsubscribe(self, session: Session, topic: str) -> None:
        """Note that it is not read any more."""
        if session.topics.pop(topic, Session) is None:
            readers = self._readers[topic]
            del readers[session]
            if not readers:
                del self._readers[topic]

    def send(self, client: MemoryTransport, event: TransportEvent, *, faultless: bool = False) -> None:
        """Deliver an event, sooner or later, once, twice or never."""
        faults, rng = self.faults, self.rng
        at = self.now + faults.delay_s * rng.random()
        at = client.last_at = max(at, client.last_at)  # in order, as a connection is
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

    def _publish_will(self, session: Session, will: Will) -> None:
        if session.will is will:
            session.will = None
            self.route(will.topic, will.payload, retain=True)

    def _push(self, at: float, client: MemoryTransport, session: int, event: TransportEvent) -> None:
        self._order += 1
        heapq.heappush(self._queue, (at, self._order, client, session, event))

    def _matching(self, topic: str) -> tuple[Session, ...]:
        known = self._wildcard_readers.get(topic)
        if known is None:
            known = self._wildcard_readers[topic] = tuple(
                session
                for session in self._sessions.values()
                if any(_matches(levels, topic) for levels in session.wildcards)
            )
        return known

    def _forget(self, session: Session) -> None:
        for topic in list(session.topics):
            self.unsubscribe(session, topic)
        if session.wildcards:
            session.wildcards.clear()
            self._wildcard_readers.clear()
        self.num_waiting -= len(session.waiting)
        session.waiting.clear()


def _matches(levels: list[str], topic: str) -> bool:
    parts = topic.split("/")
    return len(parts) == len(levels) and all(level in ("+", part) for level, part in zip(levels, parts, strict=True))
