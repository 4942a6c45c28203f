"""What a driver sees of a connection, whichever it is.

A transport keeps itself connected, with jittered back-off, until it is stopped. It tells what happens by events, put into
the driver's queue from its own thread; it never calls the driver. It promises little: a message may be lost, doubled or
late, and what is published while there is no connection is dropped. Whatever a round depends on is acknowledged end to
end and sent again by its owner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct


class TransportError(Exception):
    """The connection cannot do what was asked, now or with this configuration."""


class PacketTooLargeError(TransportError):
    """A message is above the broker's packet limit: it was not sent, since the broker would cut the connection."""


class Connected(Struct, frozen=True):
    """The connection is up. All subscriptions must be made again.

    Attributes:
        version: of MQTT, "5" or "3.1.1".
        packet_limit_bytes: the largest packet that the broker takes; None where it names no limit.
    """

    version: str
    packet_limit_bytes: int | None = None


class Disconnected(Struct, frozen=True):
    """The connection is down; the transport tries again by itself. Outstanding tokens are void.

    Attributes:
        reason: in words, with what to do where a person must act ("not authorised: ...").
        fatal: trying again cannot help (wrong credentials, an untrusted certificate); the transport goes on trying all
            the same, more slowly.
    """

    reason: str
    fatal: bool = False


class MessageReceived(Struct, frozen=True):
    """A message came in. `retained` is true where the broker sent it because of a new subscription."""

    topic: str
    payload: bytes
    retained: bool = False


class Published(Struct, frozen=True):
    """The broker took the message with this token (it says nothing about any subscriber)."""

    token: int


class SubscriptionDenied(Struct, frozen=True):
    """The broker refuses to let us read these topics."""

    topics: tuple[str, ...]


TransportEvent = Connected | Disconnected | MessageReceived | Published | SubscriptionDenied


class Will(Struct, frozen=True):
    """What the broker publishes for us, retained and at QoS 1, when it loses us."""

    topic: str
    payload: bytes
    delay_s: int = 10


class Transport(Protocol):
    """A connection to a broker. Its methods may be called from any one thread."""

    def start(self) -> None:
        """Begin to connect; `Connected` or `Disconnected` follows."""

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, expiry_s: float | None = None
    ) -> int:
        """Send a message and return its token; `Published` with it follows once the broker took it (QoS 1).

        Returns 0, and drops the message, where there is no connection.

        Raises:
            PacketTooLargeError: the message is above the packet limit.
        """

    def subscribe(self, topics: Sequence[str], *, qos: int = 1) -> None:
        """Read these topics. Subscribing again to one sends its retained message again."""

    def unsubscribe(self, topics: Sequence[str]) -> None:
        """Read these topics no more."""

    def stop(self, timeout_s: float = 2.0) -> None:
        """Send what is queued, for at most `timeout_s`, disconnect cleanly (no will), and end the thread."""
