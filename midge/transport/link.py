"""A link: one attempt at one connection, and what may be asked of it.

A link is used once. The next attempt is a new one, so that nothing stale, half sent or oversized survives a reconnection;
whoever needs a message to arrive sends it again. All methods are called from the network thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from midge.transport.base import Connected
from midge.transport.failures import Failure


@dataclass(frozen=True, slots=True)
class PublishRequest:
    """Send a message."""

    token: int
    topic: str
    payload: bytes
    qos: int
    retain: bool
    expiry_s: float | None


@dataclass(frozen=True, slots=True)
class SubscribeRequest:
    """Read these topics."""

    topics: tuple[str, ...]
    qos: int


@dataclass(frozen=True, slots=True)
class UnsubscribeRequest:
    """Read these topics no more."""

    topics: tuple[str, ...]


Request = PublishRequest | SubscribeRequest | UnsubscribeRequest


def packet_size_bytes(topic: str, payload: bytes, *, qos: int, expires: bool) -> int:
    """The length of a PUBLISH packet, header included, as version 5 has it (3.1.1 needs up to 6 bytes less)."""
    properties = 1 + (5 if expires else 0)
    remaining = 2 + len(topic.encode()) + (2 if qos else 0) + properties + len(payload)
    length_of_length = 1 + (remaining >= 2**7) + (remaining >= 2**14) + (remaining >= 2**21)
    return 1 + length_of_length + remaining


class Link(Protocol):
    """One attempt at one connection.

    Attributes:
        accepted: what the broker said when it took us; None until then.
        failure: why it is over; None while it is not.
    """

    accepted: Connected | None
    failure: Failure | None

    def open(self) -> int:
        """Connect, for some seconds at most, and return the socket's descriptor.

        Raises:
            LinkError, OSError: it did not work.
        """

    def close(self) -> None:
        """Let go of the socket at once, with no goodbye."""

    def has_room(self) -> bool:
        """Whether another message may be sent now."""

    def largest_pending_bytes(self) -> int:
        """The largest message on its way that the broker has not taken; 0 where there is none."""

    def is_settled(self) -> bool:
        """Whether all that was sent is written, and acknowledged where it should be."""

    def send(self, request: Request) -> None:
        """Queue what the request asks for."""

    def wants_write(self) -> bool:
        """Whether something is queued."""

    def write(self) -> None:
        """Write what is queued, as far as the socket takes it."""

    def read(self) -> None:
        """Read what is there, and emit events."""

    def has_unread(self) -> bool:
        """Whether bytes left the socket (TLS takes whole records) that `read` has not given out yet."""

    def keep_alive(self, now: float, *, busy: bool) -> None:
        """Ping when it is time; end the link where the broker is silent.

        Args:
            now: monotonic seconds.
            busy: whether bytes may wait that were not read yet, so that silence says nothing about the broker.
        """

    def disconnect(self) -> None:
        """Queue the goodbye; once it is written, the link is over."""
