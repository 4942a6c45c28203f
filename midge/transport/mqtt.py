"""MQTT, by paho: version 5 where the broker speaks it, else 3.1.1. The one file that imports paho.

paho is driven through its documented interface for an external loop: the network thread watches the socket (with
epoll or kqueue, so that the number of descriptors has no limit) and calls `loop_read`, `loop_write` and `loop_misc`. Since
`on_socket_register_write` is set, paho never writes from a call to `publish`; and no other thread calls paho at all.

Three things that paho leaves to its caller are done here, others in quirks.py:

* It ignores the limits in CONNACK. `Connected` carries the packet limit, and the window keeps to Receive Maximum.
* Its `loop_misc` ends a connection whose PINGRESP was not read in time. While reading pauses, or a backlog is being read,
  the ping is written here instead.
* It waits two keep-alives before it calls a broker lost. Here that are one and a half, as on the broker's side.
"""

from __future__ import annotations

import logging
import math
import os
import random
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage, WebsocketConnectionError
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from midge.log import log_event
from midge.transport.address import Address
from midge.transport.base import Connected, MessageReceived, Published, SubscriptionDenied, TransportEvent, Will
from midge.transport.failures import (
    Failure,
    Kind,
    LinkError,
    Reason,
    explain_disconnect,
    explain_end,
    explain_error,
    explain_refusal,
)
from midge.transport.link import PublishRequest, Request, SubscribeRequest, UnsubscribeRequest
from midge.transport.network import EventSink, NetworkThread
from midge.transport.quirks import error_logger, send_again
from midge.transport.tls import tls_context
from midge.transport.versions import Version, Versions

MAX_IN_FLIGHT = 64
"""Messages of ours on their way, unacknowledged: enough for throughput, and bounded in memory."""
RECEIVE_MAXIMUM = 256
"""Messages to us on their way, unacknowledged: the credit that a coordinator gives in all."""
MAX_INCOMING_BYTES = 5 * 1024 * 1024
"""Larger packets are not sent to us (version 5): above the largest message that has a meaning."""
EVENT_OVERHEAD_BYTES = 256
"""What an event costs beside its payload, roughly: a flood of empty messages must fill the queue too."""

_BURST = 64
_SILENCE = 1.5
"""Keep-alives without a word from the broker, which is asked for one after the first of them; then it is lost."""
_CONNECT_TIMEOUT_S = 5.0
_MAX_TICK_S = 5.0
_PINGREQ = b"\xc0\x00"
_PROTOCOLS: dict[Version, MQTTProtocolVersion] = {
    "5": MQTTProtocolVersion.MQTTv5,
    "3.1.1": MQTTProtocolVersion.MQTTv311,
}

log = logging.getLogger("midge.transport")


class MqttTransport(NetworkThread):
    """A connection to an MQTT broker that keeps itself up. See `midge.transport.base.Transport` for what it promises.

    Args:
        address: where the broker is, and our credentials.
        client_id: ours; another connection with the same one ends this one.
        events: where everything that happens is put, with its size.
        will: what the broker publishes for us when it loses us.
        keepalive_s: seconds of silence after which each side asks whether the other is there.
        session_expiry_s: seconds for which the broker keeps our subscriptions, and what comes for them, while we are away.
        clean_start: forget at first what the broker kept from an earlier process; reconnections resume the session.
        jitter: randomness of the waits between attempts; None for one of its own.
    """

    def __init__(
        self,
        address: Address,
        client_id: str,
        events: EventSink,
        *,
        will: Will | None = None,
        keepalive_s: int = 30,
        session_expiry_s: int = 3600,
        clean_start: bool = True,
        jitter: random.Random | None = None,
    ) -> None:
        tick_s = min(max(keepalive_s / 6, 0.1), _MAX_TICK_S)
        super().__init__(address, f"mqtt {client_id}", events, tick_s, jitter or random.Random())  # noqa: S311
        self._settings = _Settings(address, client_id, will, keepalive_s, session_expiry_s)
        self._clean_start = clean_start
        self._versions = Versions()

    def _make_link(self) -> _PahoLink:
        return _PahoLink(
            self._settings,
            self._versions.current,
            probing=self._versions.probing,
            clean_start=self._clean_start,
            emit=self._emit,
        )

    def _judge(self, failure: Failure, *, accepted: bool) -> Failure:
        if accepted:
            self._clean_start = False
        return self._versions.learn(failure, accepted=accepted)


@dataclass(frozen=True, slots=True)
class _Settings:
    """What all connections of a transport share."""

    address: Address
    client_id: str
    will: Will | None
    keepalive_s: int
    session_expiry_s: int


class _PahoLink:
    """One connection: one paho client, which is thrown away with it. A `midge.transport.link.Link`."""

    def __init__(
        self,
        settings: _Settings,
        version: Version,
        *,
        probing: bool,
        clean_start: bool,
        emit: Callable[[TransportEvent, int], None],
    ) -> None:
        self.accepted: Connected | None = None
        self.failure: Failure | None = None
        self._settings = settings
        self._address = settings.address
        self._version: Version = version
        self._probing = probing
        self._clean_start = clean_start
        self._emit = emit
        self._error: OSError | None = None
        self._window = MAX_IN_FLIGHT
        self._burst = 0
        self._tokens: dict[int, tuple[int, int]] = {}
        self._subscriptions: dict[int, tuple[str, ...]] = {}
        self._write_wanted = False
        self._looked_at = self._heard_at = time.monotonic()
        self._client = self._make_client()

    # What the network thread asks for.

    def open(self) -> int:
        """Connect, and return the socket's descriptor. See `Link`, as for all that follows."""
        settings = self._settings
        if self._address.uses_tls:
            self._client.tls_set_context(tls_context(self._address))
        options: dict[str, Any] = {}
        if self._version == "5":
            options = {"clean_start": self._clean_start, "properties": _connect_properties(settings)}
        try:
            self._client.connect(self._address.host, self._address.port, settings.keepalive_s, **options)
        except WebsocketConnectionError as error:
            reason = f"{self._address}: no WebSocket there ({error}): check the port and the path"
            raise LinkError(Failure(Kind.LOST, reason)) from error
        except (ConnectionResetError, ssl.SSLEOFError) as error:
            hint = ": does it speak TLS on this port?" if self._address.uses_tls else ""
            reason = f"{self._address}: the broker closed the connection while it was opened{hint}"
            raise LinkError(Failure(Kind.LOST, reason)) from error
        self._looked_at = self._heard_at = time.monotonic()
        opened = self._client.socket()
        if opened is None:
            raise LinkError(self.failure or Failure(Kind.LOST, f"{self._address}: the socket closed at once"))
        return opened.fileno()

    def close(self) -> None:
        opened = self._client.socket()
        if opened is not None:
            with suppress(OSError):
                opened.close()

    def has_room(self) -> bool:
        if not self._client.want_write():
            self._burst = 0
        return len(self._tokens) < self._window and self._burst < _BURST

    def largest_pending_bytes(self) -> int:
        return max((size for _, size in self._tokens.values()), default=0)

    def is_settled(self) -> bool:
        return not self._tokens and not self._client.want_write()

    def wants_write(self) -> bool:
        return self._write_wanted

    def write(self) -> None:
        self._client.loop_write()
        self._check()

    def read(self) -> None:
        self._heard_at = time.monotonic()
        self._client.loop_read()
        self._check()

    def has_unread(self) -> bool:
        pending = getattr(self._client.socket(), "pending", None)
        return pending is not None and pending() > 0

    def disconnect(self) -> None:
        self._client.disconnect()

    def send(self, request: Request) -> None:
        try:
            match request:
                case PublishRequest():
                    self._publish(request)
                case SubscribeRequest(topics, qos):
                    _, mid = self._client.subscribe([(topic, qos) for topic in topics])
                    if mid is not None:
                        self._subscriptions[mid] = topics
                case UnsubscribeRequest(topics):
                    self._client.unsubscribe(list(topics))
        except ValueError as error:
            log_event(log, logging.ERROR, "request dropped", error=error, topics=_shown(request))

    def keep_alive(self, now: float, *, busy: bool) -> None:
        if not busy:
            self._client.loop_misc()
            self._looked_at = now
            self._check()
            silent_s = now - self._heard_at
            if self.failure is None and self.accepted is not None and silent_s >= _SILENCE * self._settings.keepalive_s:
                self.failure = explain_end(Reason.KEEP_ALIVE_TIMEOUT, None, self._address, accepted=True)
            return
        self._heard_at = max(self._heard_at, now)  # as far as can be told
        if now - self._looked_at >= self._client.keepalive / 4 and not self._client.want_write():
            self._looked_at = now
            self._ping()

    # How it is done.

    def _make_client(self) -> Client:
        settings, will = self._settings, None if self._probing else self._settings.will
        client = Client(
            CallbackAPIVersion.VERSION2,
            settings.client_id,
            clean_session=None if self._version == "5" else self._clean_start or settings.session_expiry_s == 0,
            protocol=_PROTOCOLS[self._version],
            transport="websockets" if self._address.uses_websocket else "tcp",
            reconnect_on_failure=False,
        )
        client.connect_timeout = _CONNECT_TIMEOUT_S
        client.max_inflight_messages = 0  # no limit of paho's: `has_room` keeps the window
        client.suppress_exceptions = True  # of callbacks: they come to `_on_error` instead of up through the thread
        client.enable_logger(error_logger(self._on_error))
        if self._address.username is not None:
            client.username_pw_set(self._address.username, self._address.password)
        if self._address.uses_websocket:
            client.ws_set_options(path=self._address.path)
        if will is not None:
            properties = None
            if self._version == "5":
                properties = _properties(PacketTypes.WILLMESSAGE, WillDelayInterval=will.delay_s)
            client.will_set(will.topic, will.payload, qos=1, retain=True, properties=properties)
        client.on_socket_open = self._on_socket_open
        client.on_socket_register_write = self._on_register_write
        client.on_socket_unregister_write = self._on_unregister_write
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        return client

    def _publish(self, request: PublishRequest) -> None:
        properties = None
        if request.expiry_s is not None and self._version == "5":
            expiry_s = max(1, math.ceil(request.expiry_s))
            properties = _properties(PacketTypes.PUBLISH, MessageExpiryInterval=expiry_s)
        sent = self._client.publish(request.topic, request.payload, request.qos, request.retain, properties)
        self._burst += 1
        if sent.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            log_event(log, logging.WARNING, "request dropped", error=sent.rc.name, topics=_shown(request))
        elif request.qos:
            self._tokens[sent.mid] = request.token, len(request.payload)

    def _ping(self) -> None:
        """Write a PINGREQ past paho, which has nothing to write now. Its answer is read by paho as any other."""
        opened = self._client.socket()
        try:
            if opened is not None and opened.send(_PINGREQ) != len(_PINGREQ):
                self.failure = Failure(Kind.LOST, f"{self._address}: the broker reads nothing any more")
        except OSError as error:  # also where the socket takes nothing: then the broker reads nothing
            self.failure = explain_error(error, self._address)

    def _check(self) -> None:
        if self.failure is None and self._client.socket() is None:
            self.failure = Failure(Kind.LOST, f"{self._address}: connection lost")

    # What paho calls.

    def _on_socket_open(self, _client: Client, _userdata: object, opened: Any) -> None:
        with socket.socket(fileno=os.dup(opened.fileno())) as twin:  # `opened` may be wrapped, and the option is shared
            twin.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._address.uses_websocket:
            opened.send = send_again(opened.send)

    def _on_register_write(self, _client: Client, _userdata: object, _opened: object) -> None:
        self._write_wanted = True

    def _on_unregister_write(self, _client: Client, _userdata: object, _opened: object) -> None:
        self._write_wanted = False

    def _on_error(self, error: BaseException | None, text: str) -> None:
        """Paho has logged an error: remember what broke the socket, and show what else it was."""
        if isinstance(error, OSError):
            self._error = error
        else:
            log_event(log, logging.ERROR, "paho failed", exc_info=error, text=text)

    def _on_connect(
        self, _client: Client, _userdata: object, _flags: ConnectFlags, code: ReasonCode, properties: Properties | None
    ) -> None:
        if code.is_failure:
            self.failure = explain_refusal(code.value, str(code), self._address, self._settings.client_id)
        elif self._probing:
            self.failure = Failure(Kind.PROBED, f"{self._address}: MQTT {self._version} would be accepted")
        elif lacking := _lacking(properties):
            self.failure = Failure(Kind.FATAL, f"{self._address}: the broker offers no {lacking}: use another broker")
        else:
            self._window = min(MAX_IN_FLIGHT, getattr(properties, "ReceiveMaximum", MAX_IN_FLIGHT))
            self.accepted = Connected(self._version, getattr(properties, "MaximumPacketSize", None))

    def _on_disconnect(
        self, _client: Client, _userdata: object, flags: DisconnectFlags, code: ReasonCode, _properties: object
    ) -> None:
        if self.failure is not None:
            return
        if flags.is_disconnect_packet_from_server:
            self.failure = explain_disconnect(code.value, str(code), self._address, self._settings.client_id)
        else:
            self.failure = explain_end(code.value, self._error, self._address, accepted=self.accepted is not None)

    def _on_message(self, _client: Client, _userdata: object, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            log_event(log, logging.DEBUG, "message dropped: its topic is not UTF-8", size_bytes=len(message.payload))
            return
        payload = bytes(message.payload)
        self._emit(MessageReceived(topic, payload, message.retain), len(payload) + EVENT_OVERHEAD_BYTES)

    def _on_publish(
        self, _client: Client, _userdata: object, mid: int, code: ReasonCode, _properties: Properties
    ) -> None:
        token, _ = self._tokens.pop(mid, (None, 0))
        if code.is_failure:  # not told to the driver: 3.1.1 could not tell it either, and only receipts count
            log_event(log, logging.WARNING, "message refused by the broker", reason=str(code))
        if token is not None:
            self._emit(Published(token), 0)

    def _on_subscribe(
        self, _client: Client, _userdata: object, mid: int, codes: list[ReasonCode], _properties: Properties | None
    ) -> None:
        topics = self._subscriptions.pop(mid, ())
        denied = tuple(topic for topic, code in zip(topics, codes, strict=False) if code.is_failure)
        if denied:
            self._emit(SubscriptionDenied(denied), 0)


def _connect_properties(settings: _Settings) -> Properties:
    return _properties(
        PacketTypes.CONNECT,
        SessionExpiryInterval=settings.session_expiry_s,
        ReceiveMaximum=RECEIVE_MAXIMUM,
        MaximumPacketSize=MAX_INCOMING_BYTES,
    )


def _properties(packet_type: int, **values: int) -> Properties:
    properties = Properties(packet_type)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        setattr(properties, name, value)
    return properties


def _lacking(properties: Properties | None) -> str:
    """What a broker says it has not, and we cannot do without."""
    needed = {
        "MaximumQoS": "QoS 1",
        "RetainAvailable": "retained messages",
        "WildcardSubscriptionAvailable": "wildcards",
    }
    return " and no ".join(name for key, name in needed.items() if getattr(properties, key, 1) == 0)


def _shown(request: Request) -> str:
    return request.topic if isinstance(request, PublishRequest) else ", ".join(request.topics[:3])
