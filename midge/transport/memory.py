"""A broker in memory, with virtual time and seeded faults: whole federations run on it without a socket or a sleep.

It does what MQTT does and no more: QoS 1 with retained messages, wills, `+` wildcards, and a message sent again for each
new subscription. Its faults are what real networks and brokers do: lose, delay, double and reorder. Time passes only when
`deliver_next` is called, and a seed gives the same history every time.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from midge.transport.base import (
    Connected,
    Disconnected,
    MessageReceived,
    PacketTooLargeError,
    Published,
    TransportEvent,
    Will,
)


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What goes wrong, as probabilities per delivery and a range of delays.

    Attributes:
        loss: a message does not reach one subscriber.
        duplication: it reaches one twice.
        reorder: it is held back for up to `reorder_s`, while later ones pass.
        delay_s: every delivery takes up to so many seconds.
        reorder_s: see `reorder`.
    """

    loss: float = 0.0
    duplication: float = 0.0
    reorder: float = 0.0
    delay_s: float = 0.001
    reorder_s: float = 0.5


@dataclass(order=True, slots=True)
class _Delivery:
    at: float
    order: int
    client: MemoryTransport = field(compare=False)
    session: int = field(compare=False)
    event: TransportEvent = field(compare=False)


class MemoryBroker:
    """The broker, and the clock of everything on it.

    Args:
        rng: of all faults.
        faults: what goes wrong; may be changed at any time.
        packet_limit_bytes: a larger message is refused at its sender.
    """

    def __init__(self, rng: random.Random, faults: Faults = Faults(), packet_limit_bytes: int | None = None) -> None:
        self.now = 0.0
        self.faults = faults
        self.packet_limit_bytes = packet_limit_bytes
        self.retained: dict[str, bytes] = {}
        self.num_delivered = 0
        self.is_up = True
        self._rng = rng
        self._clients: dict[str, MemoryTransport] = {}
        self._queue: list[_Delivery] = []
        self._order = 0

    def transport(
        self, client_id: str, sink: Callable[[TransportEvent], None], will: Will | None = None
    ) -> MemoryTransport:
        """A connection for `client_id`; `sink` takes its events when they are due."""
        return MemoryTransport(self, client_id, sink, will)

    def next_at(self) -> float | None:
        """When the next delivery is due; None if none is."""
        return self._queue[0].at if self._queue else None

    def deliver_next(self) -> bool:
        """Let time pass to the next delivery and make it. False if there was none."""
        if not self._queue:
            return False
        delivery = heapq.heappop(self._queue)
        self.now = max(self.now, delivery.at)
        if delivery.session == delivery.client.session:
            self.num_delivered += 1
            delivery.client.sink(delivery.event)
        return True

    def stop(self, *, forget: bool) -> None:
        """Kill the broker: everyone is cut off; with `forget`, what it retained is gone too."""
        self.is_up = False
        if forget:
            self.retained.clear()
        for client in list(self._clients.values()):
            client.cut(fire_will=False)

    def start(self) -> None:
        """Start it again: all that want to be connected are, each at its own random moment."""
        self.is_up = True

    # For the transports.

    def attach(self, client: MemoryTransport) -> None:
        """Connect; another connection with the same client id is cut off."""
        known = self._clients.get(client.client_id)
        if known is not None:
            known.cut(fire_will=True)
        self._clients[client.client_id] = client
        self.send(client, Connected("memory", self.packet_limit_bytes), faultless=True)

    def detach(self, client: MemoryTransport, *, fire_will: bool) -> None:
        """Disconnect."""
        if self._clients.get(client.client_id) is client:
            del self._clients[client.client_id]
            if fire_will and client.will is not None and self.is_up:
                self.route(client.will.topic, client.will.payload, retain=True)

    def route(self, topic: str, payload: bytes, *, retain: bool) -> None:
        """A message came: keep it if it is to be kept, and send it to whom it concerns."""
        if retain:
            if payload:
                self.retained[topic] = payload
            else:
                self.retained.pop(topic, None)
        for client in self._clients.values():
            if client.reads(topic):
                self.send(client, MessageReceived(topic, payload))

    def send(self, client: MemoryTransport, event: TransportEvent, *, faultless: bool = False) -> None:
        """Deliver an event, sooner or later, once, twice or never."""
        faults, rng = self.faults, self._rng
        times = 1
        delay_s = faults.delay_s * rng.random()
        if not faultless:
            if faults.loss and rng.random() < faults.loss:
                return
            if faults.duplication and rng.random() < faults.duplication:
                times = 2
            if faults.reorder and rng.random() < faults.reorder:
                delay_s += rng.uniform(0.0, faults.reorder_s)
        at = self.now + delay_s
        if delay_s <= faults.delay_s:  # in order, as one connection is
            at = client.last_at = max(at, client.last_at)
        for _ in range(times):
            self._order += 1
            heapq.heappush(self._queue, _Delivery(at, self._order, client, client.session, event))


class MemoryTransport:
    """One connection to a `MemoryBroker`; a `Transport` whose events go to `sink` instead of a queue."""

    def __init__(
        self, broker: MemoryBroker, client_id: str, sink: Callable[[TransportEvent], None], will: Will | None
    ) -> None:
        self.broker = broker
        self.client_id = client_id
        self.sink = sink
        self.will = will
        self.session = 0
        self.last_at = 0.0
        self._topics: set[str] = set()
        self._wildcards: list[list[str]] = []
        self._is_connected = False
        self._token = 0

    def start(self) -> None:
        """Connect, if the broker is up."""
        if self.broker.is_up and not self._is_connected:
            self._is_connected = True
            self.session += 1
            self.broker.attach(self)

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        expiry_s: float | None = None,  # noqa: ARG002
    ) -> int:
        """See `Transport.publish`."""
        if not self._is_connected:
            return 0
        limit = self.broker.packet_limit_bytes
        if limit is not None and len(payload) + len(topic) > limit:
            raise PacketTooLargeError(f"{topic}: {len(payload)} bytes, the broker takes {limit}")
        self._token += 1
        self.broker.route(topic, payload, retain=retain)
        if qos:
            self.broker.send(self, Published(self._token), faultless=True)
        return self._token

    def subscribe(self, topics: Sequence[str], *, qos: int = 1) -> None:  # noqa: ARG002
        """See `Transport.subscribe`."""
        if not self._is_connected:
            return
        for topic in topics:
            if "+" in topic:
                self._wildcards.append(topic.split("/"))
                for known, payload in self.broker.retained.items():
                    if _matches(self._wildcards[-1], known):
                        self.broker.send(self, MessageReceived(known, payload, retained=True))
            else:
                self._topics.add(topic)
                if topic in self.broker.retained:
                    self.broker.send(self, MessageReceived(topic, self.broker.retained[topic], retained=True))

    def unsubscribe(self, topics: Sequence[str]) -> None:
        """See `Transport.unsubscribe`."""
        self._topics.difference_update(topics)

    def stop(self, timeout_s: float = 2.0) -> None:  # noqa: ARG002
        """Disconnect cleanly: no will."""
        self.session += 1
        self._is_connected = False
        self.broker.detach(self, fire_will=False)

    def cut(self, *, fire_will: bool) -> None:
        """The connection breaks."""
        if self._is_connected:
            self._is_connected = False
            self.session += 1
            self._topics.clear()
            self._wildcards.clear()
            self.broker.detach(self, fire_will=fire_will)
            self.broker.send(self, Disconnected("the connection was cut"), faultless=True)

    def reads(self, topic: str) -> bool:
        """Whether a message on this topic concerns it."""
        return topic in self._topics or any(_matches(levels, topic) for levels in self._wildcards)


def _matches(levels: list[str], topic: str) -> bool:
    parts = topic.split("/")
    return len(parts) == len(levels) and all(level in ("+", part) for level, part in zip(levels, parts, strict=True))
