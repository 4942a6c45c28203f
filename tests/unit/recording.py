"""A connection that sends nothing and remembers everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from midge.transport.base import PacketTooLargeError


@dataclass(frozen=True)
class Sent:
    """A message that was published."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    expiry_s: float | None


class RecordingTransport:
    """See `midge.transport.base.Transport`.

    Args:
        packet_limit_bytes: a larger payload is refused; None for no limit.
        heard: called with a word for each thing that is done, for tests of the order in which things happen.
    """

    def __init__(self, packet_limit_bytes: int | None = None, heard: Callable[[str], Any] = lambda _: None) -> None:
        self.sent: list[Sent] = []
        self.subscribed: list[str] = []
        self.unsubscribed: list[str] = []
        self.is_connected = True
        self.packet_limit_bytes = packet_limit_bytes
        self._heard = heard
        self._token = 0

    def start(self) -> None:
        pass

    def stop(self, timeout_s: float = 2.0) -> None:
        pass

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, expiry_s: float | None = None
    ) -> int:
        if self.packet_limit_bytes is not None and len(payload) > self.packet_limit_bytes:
            raise PacketTooLargeError(f"{topic}: packet of {len(payload)} bytes: raise the limit on the broker")
        if not self.is_connected:
            return 0
        self._heard(f"publish {topic.rsplit('/', 1)[-1]}")
        self.sent.append(Sent(topic, payload, qos, retain, expiry_s))
        self._token += 1
        return self._token

    def subscribe(self, topics: Sequence[str], *, qos: int = 1) -> None:
        self.subscribed += topics

    def unsubscribe(self, topics: Sequence[str]) -> None:
        self.unsubscribed += topics

    def take(self) -> list[Sent]:
        """What was published since the last call."""
        sent, self.sent = self.sent, []
        return sent

    @property
    def read(self) -> set[str]:
        """The topics that are subscribed to, were each subscription to last."""
        left = list(self.subscribed)
        for topic in self.unsubscribed:
            while topic in left:
                left.remove(topic)
        return set(left)
