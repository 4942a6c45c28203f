"""Brokers and connections for the tests of this folder.

broker            a running broker, each test once with Mosquitto and once with the embedded one
mosquitto         a running Mosquitto
start_mosquitto   starts a Mosquitto with further lines of configuration
free_port         a TCP port of 127.0.0.1 that nobody listens on
peer              connects to an address and keeps what happens
federation        coordinators and agents, as processes, over `broker`; its processes are ended
make_federation   the same over a broker of one's own, and as many as are wanted
unmeasured        coverage does not follow child processes, in which torch's import would take half as long again
scripted_broker   answers as a test says, for what no real broker can be made to say

A test never skips for want of a broker: what is not installed fails.
"""

from __future__ import annotations

import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from midge.eventqueue import EventQueue
from midge.transport import brokers
from midge.transport.address import Address
from midge.transport.base import Connected, MessageReceived, Published, TransportEvent
from midge.transport.mqtt import MqttTransport
from tests.broker.federation import Federation

PATIENCE_S = 15.0


class BrokerUnderTest:
    """A broker that can be stopped, killed and started again on the same port."""

    def __init__(self, kind: brokers.Kind, directory: Path, options: Sequence[str] = ()) -> None:
        self._directory = directory
        self._options = options
        self._broker = brokers.start_local_broker(kind, directory=directory, options=options)

    @property
    def kind(self) -> str:
        return self._broker.kind

    @property
    def port(self) -> int:
        return self._broker.port

    @property
    def url(self) -> str:
        return self._broker.url

    @property
    def pid(self) -> int:
        return self._broker.pid

    def log(self) -> str:
        return self._broker.log()

    def stop(self) -> None:
        """End it cleanly."""
        self._broker.stop()

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._broker.kill()

    def start(self) -> None:
        """Start it again, where it was."""
        self._broker = brokers.start_local_broker(
            self._broker.kind, directory=self._directory, port=self.port, options=self._options
        )


class Peer:
    """A connection, and all that it was told."""

    def __init__(self, transport: MqttTransport, events: EventQueue[TransportEvent]) -> None:
        self.transport = transport
        self.events = events
        self.seen: list[TransportEvent] = []
        self.link = None
        self._cursor = 0
        make_link = transport._make_link

        def make_and_keep():
            self.link = make_link()
            return self.link

        transport._make_link = make_and_keep

    def expect(
        self, kind: type, match: Callable[[TransportEvent], bool] = lambda _: True, timeout_s: float = PATIENCE_S
    ):
        """The next event of this kind that matches; those before it are passed over."""
        deadline = time.monotonic() + timeout_s
        while True:
            while self._cursor < len(self.seen):
                event = self.seen[self._cursor]
                self._cursor += 1
                if isinstance(event, kind) and match(event):
                    return event
            left_s = deadline - time.monotonic()
            assert left_s > 0, f"no {kind.__name__} in {timeout_s} s, but {[_short(event) for event in self.seen[-8:]]}"
            self.take(left_s)

    def expect_message(self, topic: str, timeout_s: float = PATIENCE_S) -> MessageReceived:
        return self.expect(MessageReceived, lambda event: event.topic == topic, timeout_s)

    def expect_published(self, token: int) -> None:
        self.expect(Published, lambda event: event.token == token)

    def take(self, timeout_s: float) -> None:
        """Take what is in the queue, or wait for it."""
        self.seen += self.events.take(timeout_s)

    def watch(self, duration_s: float) -> None:
        """Take what comes for so long: for what must not happen."""
        deadline = time.monotonic() + duration_s
        while (left_s := deadline - time.monotonic()) > 0:
            self.take(left_s)

    def messages(self) -> list[MessageReceived]:
        return [event for event in self.seen if isinstance(event, MessageReceived)]

    def sync(self, prefix: str = "sync") -> None:
        """Wait until the broker has dealt with all that was asked of it."""
        topic = f"{prefix}/{id(self)}"
        self.transport.subscribe([topic])
        self.transport.publish(topic, random.randbytes(4))
        self.expect_message(topic)

    def cut(self) -> None:
        """End the connection as a broken network does: the broker hears no goodbye."""
        with (
            self.raw_socket() as twin
        ):  # closed at once: a selector would go on to report the end of a twin that is open
            twin.shutdown(socket.SHUT_RDWR)

    def raw_socket(self) -> socket.socket:
        """The connection's socket, which others own."""
        twin = socket.socket(fileno=os.dup(self.link._client.socket().fileno()))
        self._twins = [*getattr(self, "_twins", []), twin]
        return twin

    def stop(self, timeout_s: float = 2.0) -> None:
        self.transport.stop(timeout_s)
        for twin in getattr(self, "_twins", []):
            twin.close()


class Connection:
    """A client of a scripted broker: raw packets in and out."""

    def __init__(self, accepted: socket.socket) -> None:
        self._socket = accepted
        self._socket.settimeout(PATIENCE_S)

    def read(self) -> tuple[int, bytes]:
        """The next packet: its type, such as 1 for CONNECT, and its body. EOFError where the client is gone."""
        start, length = self._exactly(1)[0], 0
        for shift in (0, 7, 14, 21):
            byte = self._exactly(1)[0]
            length |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
        return start >> 4, self._exactly(length)

    def read_for(self, duration_s: float) -> list[tuple[int, bytes]]:
        """All packets that come in so long."""
        packets, deadline = [], time.monotonic() + duration_s
        with suppress(TimeoutError):
            while (left_s := deadline - time.monotonic()) > 0:
                self._socket.settimeout(left_s)
                packets.append(self.read())
        self._socket.settimeout(PATIENCE_S)
        return packets

    def expect(self, packet_type: int) -> bytes:
        """The body of the next packet of this type; others are passed over."""
        while True:
            seen, body = self.read()
            if seen == packet_type:
                return body

    def send(self, packet: bytes) -> None:
        self._socket.sendall(packet)

    def wait_for_end(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                self.read()

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, size_bytes: int) -> bytes:
        read = b""
        while len(read) < size_bytes:
            part = self._socket.recv(size_bytes - len(read))
            if not part:
                raise EOFError
            read += part
        return read


class ScriptedBroker:
    """Takes one connection after the other and does with each what `script` says; then it is closed.

    Attributes:
        connects: the body of each CONNECT.
        versions: the protocol level in each: 4 for 3.1.1, 5 for 5.
    """

    def __init__(self, script: Callable[[Connection, int], None], tls: ssl.SSLContext | None) -> None:
        self._script = script
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"{'mqtts' if tls else 'mqtt'}://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connects: list[bytes] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def versions(self) -> list[int]:
        return [body[6] for body in self.connects]

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(PATIENCE_S)

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                accepted = self._listener.accept()[0]
                connection = Connection(self._tls.wrap_socket(accepted, server_side=True) if self._tls else accepted)
                with suppress(EOFError, OSError):
                    self.connects.append(connection.expect(1))
                    self._script(connection, self.connects[-1][6])
                connection.close()


def _short(event: TransportEvent) -> object:
    return (event.topic, len(event.payload)) if isinstance(event, MessageReceived) else event


@pytest.fixture(params=["mosquitto", "embedded"])
def broker(request, tmp_path):
    under_test = BrokerUnderTest(request.param, tmp_path / "broker")
    yield under_test
    under_test.stop()


@pytest.fixture
def start_mosquitto(tmp_path):
    started = []

    def start(*options: str) -> BrokerUnderTest:
        started.append(BrokerUnderTest("mosquitto", tmp_path / f"mosquitto-{len(started)}", options))
        return started[-1]

    yield start
    for under_test in started:
        under_test.stop()


@pytest.fixture
def mosquitto(start_mosquitto):
    return start_mosquitto()


@pytest.fixture
def scripted_broker():
    started = []

    def start(script: Callable[[Connection, int], None], tls: ssl.SSLContext | None = None) -> ScriptedBroker:
        started.append(ScriptedBroker(script, tls))
        return started[-1]

    yield start
    for scripted in started:
        scripted.stop()


@pytest.fixture
def unmeasured(monkeypatch):
    for name in tuple(os.environ):
        if name.startswith("COVERAGE_"):
            monkeypatch.delenv(name)


@pytest.fixture
def free_port():
    return brokers.free_port()


@pytest.fixture
def peer():
    """Make a `Peer`; by default, wait until it is connected."""
    peers = []

    def make(url, client_id, *, wait=True, events=None, security=None, **options) -> Peer:
        events = events if events is not None else EventQueue[TransportEvent]()
        address = Address.parse(url, **(security or {}))
        options = {"jitter": random.Random(0), **options}
        peers.append(Peer(MqttTransport(address, client_id, events, **options), events))
        peers[-1].transport.start()
        if wait:
            peers[-1].expect(Connected)
        return peers[-1]

    yield make
    for made in peers:
        made.stop(timeout_s=0.5)


@pytest.fixture
def make_federation(tmp_path):
    made = []

    def make(url, *arguments, **options) -> Federation:
        made.append(Federation(tmp_path, url, *arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.end()


@pytest.fixture
def federation(broker, make_federation):
    return make_federation(broker.url)
