"""The network thread: it keeps one connection up, and carries requests to it and events from it.

Other threads queue requests and wake this one; they never touch the connection. Each turn:

    1. queued requests go to the link, as far as it has room
    2. what the link has queued is written
    3. wait: for the socket, for a request, or until the next look at the keep-alive
    4. read, which puts events into the driver's queue

While that queue is full the socket is not read, so that the broker holds what waits, not this process; pings and writes go
on. Nothing that fails in a turn ends the thread: the link is thrown away and, after a wait, another one is made.
"""

from __future__ import annotations

import logging
import random
import selectors
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from midge.log import Throttle, log_event
from midge.transport.address import Address
from midge.transport.base import Connected, Disconnected, PacketTooLargeError, TransportEvent
from midge.transport.failures import Backoff, Failure, Kind, LinkError, explain_error
from midge.transport.link import (
    Link,
    PublishRequest,
    Request,
    SubscribeRequest,
    UnsubscribeRequest,
    packet_size_bytes,
)

ANSWER_TIMEOUT_S = 10.0
"""How long a broker may take to answer a CONNECT."""
LASTING_S = 30.0
"""A connection that lived this long was a good one: the next wait is a short one again."""
NUM_SHORT_LIVED = 3
"""After so many in a row that did not, a likely cause is named."""
MAX_PACKET_BYTES = 2**28 + 4
"""The largest packet that MQTT can express."""
LARGE_BYTES = 16_384
"""A message that a broker may take offence at."""
STUCK_S = 60.0
"""A thread that has not come round for this long is stuck."""

MAX_QUEUED_BYTES = 256 * 1024 * 1024
"""Of messages that wait to be sent. Senders keep to windows far below; past it, one is dropped as without a connection."""
_QUEUED_OVERHEAD_BYTES = 512
"""What a message costs beside its payload, roughly."""
_FAREWELL_S = 0.5
_STOPPING_TICK_S = 0.05
_CONNECTING_TICK_S = 1.0
_WAKE_BYTES = 4096

log = logging.getLogger("midge.transport")


class EventSink(Protocol):
    """What is needed of a `midge.eventqueue.EventQueue`, whatever else goes through it."""

    on_drained: Callable[[], None] | None

    def is_full(self) -> bool:
        """Whether to pause; `on_drained` is then called once there is room."""

    def put(self, event: TransportEvent, size_bytes: int = 0) -> None:
        """Add an event, which never blocks."""


class NetworkThread(ABC):
    """All of a `Transport` but its protocol, which comes with the links.

    Args:
        address: where the broker is.
        name: of the thread.
        events: where events go; its `on_drained` is taken.
        tick_s: longest time between two looks at the keep-alive.
        jitter: randomness of the waits between attempts.
    """

    def __init__(self, address: Address, name: str, events: EventSink, tick_s: float, jitter: random.Random) -> None:
        self._address = address
        self._events = events
        self._tick_s = tick_s
        self._backoff = Backoff(jitter)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._lock = threading.Lock()  # over these four
        self._online: Connected | None = None
        self._last_token = 0
        self._controls: deque[Request] = deque()
        self._messages: deque[PublishRequest] = deque()
        self._queued_bytes = 0
        self._overflows_logged = Throttle(burst=1)
        self._stop_requested = threading.Event()
        self._stop_at = 0.0
        self._said_goodbye = False
        self._selector = selectors.DefaultSelector()  # from here on: of the thread alone
        self._watched = 0
        self._turned_at = time.monotonic()
        self._online_at = 0.0
        self._num_short_lived = 0
        self._reported = ""

    @abstractmethod
    def _make_link(self) -> Link:
        """A new attempt."""

    @abstractmethod
    def _judge(self, failure: Failure, *, accepted: bool) -> Failure:
        """Learn from the end of a link that the broker had accepted or not; what is returned is reported."""

    def start(self) -> None:
        """Begin to connect; `Connected` or `Disconnected` follows. Once only."""
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._events.on_drained = self._wake
        self._thread.start()

    def stop(self, timeout_s: float = 2.0) -> None:
        """Send what is queued, for at most `timeout_s`, disconnect cleanly (no will), and end the thread."""
        self._stop_at = time.monotonic() + timeout_s
        self._stop_requested.set()
        self._wake()
        if self._thread.ident is None:
            self._release()
        else:
            self._thread.join(timeout_s + 2 * _FAREWELL_S)

    @property
    def is_alive(self) -> bool:
        """Whether the network thread has not died; it may be stuck."""
        return self._thread.is_alive()

    @property
    def healthy(self) -> bool:
        """Whether the network thread lives and comes round; for a watchdog."""
        return self.is_alive and time.monotonic() - self._turned_at < STUCK_S

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, expiry_s: float | None = None
    ) -> int:
        """Send a message and return its token; `Published` with it follows once the broker took it (QoS 1 only).

        Returns 0, and drops the message, where there is no connection, or `MAX_QUEUED_BYTES` wait already.

        Raises:
            PacketTooLargeError: the message is above the packet limit.
        """
        size = packet_size_bytes(topic, payload, qos=qos, expires=expiry_s is not None)
        with self._lock:
            if self._online is None:
                return 0
            limit = self._online.packet_limit_bytes or MAX_PACKET_BYTES
            if size > limit:
                advice = "send smaller frames, or raise the limit on the broker (max_packet_size)"
                raise PacketTooLargeError(f"{topic}: packet of {size} bytes, the broker takes {limit}: {advice}")
            is_full = self._queued_bytes + size > MAX_QUEUED_BYTES
            if not is_full:
                self._queued_bytes += len(payload) + _QUEUED_OVERHEAD_BYTES
                self._last_token = token = self._last_token + 1
                self._messages.append(PublishRequest(token, topic, payload, qos, retain, expiry_s))
        if is_full:
            self._overflows_logged.log(log, logging.WARNING, "message dropped: too many wait", time.monotonic())
            return 0
        self._wake()
        return token

    def subscribe(self, topics: Sequence[str], *, qos: int = 1) -> None:
        """Read these topics. Subscribing again to one sends its retained message again."""
        if topics:
            self._request(SubscribeRequest(tuple(topics), qos))

    def unsubscribe(self, topics: Sequence[str]) -> None:
        """Read these topics no more."""
        if topics:
            self._request(UnsubscribeRequest(tuple(topics)))

    def _request(self, request: Request) -> None:
        with self._lock:
            if self._online is None:
                return
            self._controls.append(request)
        self._wake()

    def _wake(self) -> None:
        with suppress(OSError):  # full: it wakes anyway; closed: it has ended
            self._wake_writer.send(b"\0")

    def _emit(self, event: TransportEvent, size_bytes: int = 0) -> None:
        try:
            self._events.put(event, size_bytes)
        except Exception:  # noqa: BLE001  # whatever a sink does, the thread goes on
            log_event(log, logging.ERROR, "event lost: its queue raised", exc_info=True, kind=type(event).__name__)

    # From here on: the thread.

    def _run(self) -> None:
        while not self._stop_requested.is_set():
            try:
                failure = self._attempt()
            except Exception:  # noqa: BLE001  # the thread outlives every bug
                log_event(log, logging.ERROR, "network thread recovered", exc_info=True)
                failure = Failure(Kind.LOST, f"{self._address}: internal error, see the log")
                self._report(failure, was_online=True)
            wait_s = self._backoff.next_wait_s(failure.kind)
            self._turned_at = time.monotonic() + wait_s
            self._stop_requested.wait(wait_s)
        self._release()

    def _release(self) -> None:
        self._selector.close()
        self._wake_reader.close()
        self._wake_writer.close()

    def _attempt(self) -> Failure:
        link = self._make_link()
        try:
            failure = self._serve(link)
        except Exception as error:  # noqa: BLE001  # a link may raise anything
            failure = explain_error(error, self._address)
            if not isinstance(error, OSError | LinkError):
                log_event(log, logging.ERROR, "connection given up: internal error", exc_info=True)
        finally:
            was_online = self._go_offline()
            link.close()
        failure = self._judge(failure, accepted=link.accepted is not None)
        if was_online:
            failure = self._look_back(failure, time.monotonic() - self._online_at, link.largest_pending_bytes())
        if not self._stop_requested.is_set():
            self._report(failure, was_online=was_online)
        return failure

    def _serve(self, link: Link) -> Failure:
        """Open a link and take turns until it is over; why it is."""
        self._turned_at = time.monotonic()
        descriptor = link.open()
        answer_by = time.monotonic() + ANSWER_TIMEOUT_S
        try:
            while link.failure is None:
                self._turned_at = now = time.monotonic()
                if link.accepted is None and now > answer_by:
                    return Failure(Kind.NO_ANSWER, f"{self._address}: no answer to CONNECT in {ANSWER_TIMEOUT_S:g} s")
                if self._stop_requested.is_set() and self._farewell(link, now):
                    return Failure(Kind.LOST, "stopped")
                self._turn(link, descriptor, now)
        finally:
            self._watch(descriptor, 0)
        return link.failure

    def _turn(self, link: Link, descriptor: int, now: float) -> None:
        if link.accepted is not None and self._online is None:
            self._go_online(link.accepted)
        self._send_requests(link)
        if link.wants_write():
            link.write()
        if link.failure is not None:
            return
        full = self._events.is_full()
        ready = self._wait(link, descriptor, read=not full)
        if ready & selectors.EVENT_WRITE:
            link.write()
        if ready & selectors.EVENT_READ:
            link.read()
        link.keep_alive(now, busy=full or bool(ready & selectors.EVENT_READ))

    def _wait(self, link: Link, descriptor: int, *, read: bool) -> int:
        """Wait for something to do; which of EVENT_READ and EVENT_WRITE the socket is ready for."""
        unread = read and link.has_unread()
        wanted = (selectors.EVENT_READ if read else 0) | (selectors.EVENT_WRITE if link.wants_write() else 0)
        self._watch(descriptor, wanted)
        ready = selectors.EVENT_READ if unread else 0
        for key, mask in self._selector.select(0 if unread else self._patience_s(link)):
            if key.fileobj is self._wake_reader:
                with suppress(BlockingIOError):
                    self._wake_reader.recv(_WAKE_BYTES)
            else:
                ready |= mask
        return ready

    def _patience_s(self, link: Link) -> float:
        if self._stop_requested.is_set():
            return _STOPPING_TICK_S
        return self._tick_s if link.accepted is not None else min(self._tick_s, _CONNECTING_TICK_S)

    def _watch(self, descriptor: int, wanted: int) -> None:
        if wanted == self._watched:
            return
        if self._watched == 0:
            self._selector.register(descriptor, wanted)
        elif wanted == 0:
            self._selector.unregister(descriptor)
        else:
            self._selector.modify(descriptor, wanted)
        self._watched = wanted

    def _send_requests(self, link: Link) -> None:
        """Hand over what is queued: subscriptions first, since a full window must not hold them up."""
        while True:
            with self._lock:
                if self._controls:
                    request = self._controls.popleft()
                elif self._messages and link.has_room():
                    request = self._messages.popleft()
                    self._queued_bytes -= len(request.payload) + _QUEUED_OVERHEAD_BYTES
                else:
                    return
            link.send(request)

    def _farewell(self, link: Link, now: float) -> bool:
        """Say goodbye once all is sent, or time is up. Whether to wait no longer."""
        if link.accepted is None or now > self._stop_at + _FAREWELL_S:
            return True
        settled = not self._controls and not self._messages and link.is_settled()
        if (settled or now > self._stop_at) and not self._said_goodbye:
            self._said_goodbye = True
            link.disconnect()
        return False

    def _go_online(self, accepted: Connected) -> None:
        log_event(log, logging.DEBUG, "connected", broker=str(self._address), mqtt=accepted.version)
        self._online_at = time.monotonic()
        self._reported = ""
        with self._lock:
            self._online = accepted
        self._events.put(accepted)  # may raise: a driver that does not know of the connection has no use for it

    def _look_back(self, failure: Failure, lived_s: float, pending_bytes: int) -> Failure:
        """Start over with short waits after a good connection; name the likely cause where there is none for long."""
        if lived_s >= LASTING_S:
            self._backoff.reset()
            self._num_short_lived = 0
            return failure
        self._num_short_lived += 1
        if self._num_short_lived < NUM_SHORT_LIVED or failure.kind is not Kind.LOST:
            return failure
        causes = ["is our client id, an agent's id, in use by another connection to this broker?"]
        if pending_bytes >= LARGE_BYTES:
            cause = (
                f"has the broker a limit that it does not tell (in Mosquitto message_size_limit)? {pending_bytes} bytes"
            )
            causes.insert(0, f"{cause} were on their way in one message; else")
        hint = f"{self._num_short_lived} times soon after connecting: {' '.join(causes)}"
        return Failure(failure.kind, f"{failure.reason}, {hint}")

    def _go_offline(self) -> bool:
        with self._lock:
            was_online = self._online is not None
            self._online = None
            self._controls.clear()
            self._messages.clear()
            self._queued_bytes = 0
        return was_online

    def _report(self, failure: Failure, *, was_online: bool) -> None:
        """Tell the driver, but not of each attempt that fails as the one before did."""
        if failure.kind in (Kind.WRONG_VERSION, Kind.PROBED) or (not was_online and failure.reason == self._reported):
            log_event(log, logging.DEBUG, "not connected", reason=failure.reason)
            return
        log_event(log, logging.WARNING, "disconnected" if was_online else "not connected", reason=failure.reason)
        self._reported = failure.reason
        self._emit(Disconnected(failure.reason, failure.fatal))
