"""The proxy that spoils the network for other tests does what it says."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

import pytest

from tests.broker.federation import wait_until
from tests.broker.proxy import Proxy

PATIENCE_S = 10.0


class Echo:
    """Sends back what it is sent; `ends` says how each connection ended."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.ends: list[str] = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=[self._listener.accept()[0]], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65_536):
                    connection.sendall(data)
                self.ends.append("closed")
            except ConnectionResetError:
                self.ends.append("reset")

    def stop(self) -> None:
        with suppress(OSError):  # stopped already
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def echo():
    one = Echo()
    yield one
    one.stop()


@pytest.fixture
def proxy(echo):
    with Proxy(echo.port) as one:
        yield one


@pytest.fixture
def client(proxy):
    with connect(proxy) as one:
        yield one


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2])), timeout=PATIENCE_S)


def exactly(client: socket.socket, size: int) -> bytes:
    read = b""
    while len(read) < size:
        part = client.recv(size - len(read))
        assert part, f"closed after {len(read)} bytes"
        read += part
    return read


def test_what_goes_in_comes_out_and_is_counted(proxy, client):
    sent = bytes(range(256)) * 2000
    threading.Thread(target=client.sendall, args=[sent]).start()
    assert exactly(client, len(sent)) == sent
    wait_until(lambda: proxy.down.num_bytes == len(sent), "what came was counted")  # which is after it was sent on
    assert proxy.up.num_bytes == len(sent)
    assert proxy.num_accepted == 1


@pytest.mark.parametrize("way", ["up", "down"])
def test_what_is_held_comes_once_it_is_let_go_and_nobody_is_told_meanwhile(proxy, client, way):
    getattr(proxy, way).is_held = True
    client.sendall(b"x")
    client.settimeout(0.2)
    with pytest.raises(TimeoutError):
        client.recv(1)
    proxy.let_go()
    client.settimeout(PATIENCE_S)
    assert client.recv(1) == b"x"


def test_the_end_of_a_connection_is_held_too(proxy, client, echo):
    client.sendall(b"x")
    assert client.recv(1) == b"x"
    proxy.hold()
    client.close()
    time.sleep(0.1)
    assert echo.ends == []
    proxy.let_go()
    wait_until(lambda: echo.ends, "the other side hears of the end", PATIENCE_S)


def test_a_slow_line_and_a_long_one_take_their_time(proxy, client):
    proxy.up.bytes_per_s = 10_000
    began = time.monotonic()
    client.sendall(bytes(3000))
    exactly(client, 3000)
    assert time.monotonic() - began >= 0.2  # 3000 bytes at 10 KB/s, but for what the last step waits
    proxy.up.bytes_per_s = 0
    proxy.down.delay_s = 0.2
    began = time.monotonic()
    client.sendall(b"x")
    exactly(client, 1)
    assert time.monotonic() - began >= 0.2


def test_a_cut_ends_both_sides_each_in_its_way(proxy, echo):
    for reset, end in ((False, "closed"), (True, "reset")):
        with connect(proxy) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            assert proxy.cut(reset=reset) == 1
            if reset:
                with pytest.raises(ConnectionResetError):
                    client.recv(1)
            else:
                assert client.recv(1) == b""
        wait_until(lambda end=end: echo.ends[-1:] == [end], f"the other side is {end}", PATIENCE_S)


def test_where_nobody_listens_a_connection_is_closed_and_the_next_one_may_find_somebody(proxy, echo):
    echo.stop()
    with connect(proxy) as client:
        assert client.recv(1) == b""
