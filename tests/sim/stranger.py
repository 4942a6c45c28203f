"""A stranger at the broker: sends garbage to everyone, and repeats what it heard, long after."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from midge import PROTOCOL
from midge.transport.base import MessageReceived, TransportEvent
from midge.wire.messages import Presence, encode

if TYPE_CHECKING:
    from tests.sim.federation import Federation

_MAX_HEARD = 300


class Stranger:
    """A client without an access list to hold it: it may read and write every topic, but forges nothing that is well formed.

    Under its own name, `mallory`, it says whatever can be made of what it heard by changing and cutting bytes; to others it
    says what is certainly not of the protocol, or exactly what was said there before.
    """

    def __init__(self, federation: Federation, rng: random.Random) -> None:
        self._topics = federation.topics
        self._rng = rng
        self._heard: list[tuple[str, bytes]] = [("", b"{}")]
        self._transport = federation.broker.transport("mallory", self._listen)
        self._transport.start()
        self._transport.subscribe(
            [
                self._topics.coordinator,
                self._topics.all_outboxes,
                self._topics.all_update_frames,
                *(self._topics.inbox(agent.name) for agent in federation.agents),
            ]
        )
        self._victims = [agent.name for agent in federation.agents]

    def speak(self) -> None:
        """Say one thing."""
        rng, topics = self._rng, self._topics
        topic, payload = rng.choice(self._heard)
        kind = rng.randrange(4)
        if kind == 0:
            own = rng.choice(
                (
                    topics.outbox("mallory"),
                    topics.presence("mallory"),
                    topics.update_frame("mallory", 0, rng.randrange(5)),
                )
            )
            self._transport.publish(own, self._mangled(payload))
        elif kind == 1:
            birth = Presence(online=rng.random() < 0.7, incarnation="bad", protocol=PROTOCOL, task="another task")
            self._transport.publish(topics.presence("mallory"), encode(birth), retain=True)
        elif kind == 2:
            victim = rng.choice(self._victims)
            others = (
                topics.inbox(victim),
                topics.coordinator,
                topics.rollcall,
                topics.head("sim-1"),
                topics.outbox(victim),
            )
            others += (
                topics.model_frame("sim-1", 0, 0),
                topics.presence(victim),
                topics.prefix + "/agent/" + "x" * 300,
            )
            self._transport.publish(rng.choice(others), self._nonsense())
        elif topic:
            self._transport.publish(topic, payload)

    def _listen(self, event: TransportEvent) -> None:
        if isinstance(event, MessageReceived) and event.payload and len(self._heard) < _MAX_HEARD:
            self._heard.append((event.topic, event.payload))

    def _mangled(self, payload: bytes) -> bytes:
        rng = self._rng
        mangled = bytearray(payload)
        for _ in range(rng.randrange(4)):
            if mangled:
                mangled[rng.randrange(len(mangled))] = rng.randrange(256)
        start = rng.choice((0, 0, rng.randrange(len(mangled) + 1)))
        return bytes(mangled[start : rng.choice((len(mangled), rng.randrange(len(mangled) + 1)))])

    def _nonsense(self) -> bytes:
        rng = self._rng
        return rng.choice(
            (
                b"{",
                b"[" * 5000,
                b"null",
                b'{"type":"nothing"}',
                rng.randbytes(rng.randrange(1, 80)),
                b"MF" + rng.randbytes(60),
            )
        )
