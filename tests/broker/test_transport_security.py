"""TLS, passwords and WebSockets, against a Mosquitto that asks for them. Certificates are made for each run."""

from __future__ import annotations

import hashlib
import random
import socket
import ssl
import subprocess
from pathlib import Path

import pytest

from midge.transport.base import Connected, Disconnected

KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


def openssl(directory: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)


def make_signed(directory: Path, name: str, authority: str, extension: str = "", days: int = 30) -> None:
    """Make NAME.crt and NAME.key, signed by AUTHORITY and good for so long; with -1 day it has expired."""
    openssl(directory, "req", *KEY, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
    (directory / f"{name}.ext").write_text(extension)
    signer = ["-days", str(days), "-CA", f"{authority}.crt", "-CAkey", f"{authority}.key", "-CAcreateserial"]
    openssl(directory, "x509", "-req", "-in", f"{name}.csr", *signer, "-extfile", f"{name}.ext", "-out", f"{name}.crt")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """A directory: ca.crt signed server.crt (for 127.0.0.1), elsewhere.crt (for another name) and client.crt."""
    directory = tmp_path_factory.mktemp("certificates")
    for name in ("ca", "other"):
        openssl(
            directory, "req", "-x509", *KEY, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.crt"
        )
    make_signed(directory, "server", "ca", "subjectAltName=IP:127.0.0.1,DNS:localhost")
    make_signed(directory, "elsewhere", "ca", "subjectAltName=DNS:broker.example.com")
    make_signed(directory, "client", "ca")
    make_signed(directory, "stranger", "other")
    return directory


@pytest.fixture
def start_tls(start_mosquitto, certificates, free_port):
    """Start a Mosquitto with a TLS listener, and return what follows the scheme in its URL."""

    def start(*options: str, server: str = "server") -> str:
        files = [f"certfile {certificates / server}.crt", f"keyfile {certificates / server}.key"]
        start_mosquitto(f"listener {free_port} 127.0.0.1", f"cafile {certificates / 'ca.crt'}", *files, *options)
        return f"127.0.0.1:{free_port}"

    return start


def exchange(sender, receiver=None, size_bytes=200_000, count=5):
    """Send messages, to oneself if to nobody else, and see that they arrive as they were sent."""
    receiver = receiver or sender
    receiver.transport.subscribe(["t/+"])
    receiver.sync()
    sent = {f"t/{index}": random.Random(index).randbytes(size_bytes) for index in range(count)}
    for topic, payload in sent.items():
        sender.transport.publish(topic, payload)
    for topic, payload in sent.items():
        received = receiver.expect_message(topic).payload
        assert hashlib.sha256(received).digest() == hashlib.sha256(payload).digest()


def fatal_reason(agent) -> str:
    return agent.expect(Disconnected, lambda event: event.fatal).reason


def test_a_connection_with_the_right_ca_is_encrypted_and_carries_frames(start_tls, certificates, peer):
    agent = peer(f"mqtts://{start_tls()}", "a", security={"ca_file": certificates / "ca.crt"})
    assert agent.link._client.socket().version() in {"TLSv1.2", "TLSv1.3"}
    exchange(agent)


def test_many_messages_in_one_tls_record_are_all_read_at_once(scripted_broker, certificates, peer):
    def script(connection, version):
        connection.send(b"\x20\x03\x00\x00\x00")
        connection.send(b"".join(b"\x30\x05\x00\x01t\x00" + bytes([number]) for number in range(200)))
        connection.wait_for_end()

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / "server.crt", certificates / "server.key")
    broker = scripted_broker(script, context)
    agent = peer(broker.url, "a", security={"ca_file": certificates / "ca.crt"})
    # The socket has nothing more to say: what is not read now waits for the next look at the keep-alive, in 5 s.
    assert [agent.expect_message("t", timeout_s=3).payload[0] for _ in range(200)] == list(range(200))


def test_it_reconnects_over_tls(start_tls, certificates, peer):
    agent = peer(f"mqtts://{start_tls()}", "a", security={"ca_file": certificates / "ca.crt"})
    agent.cut()
    agent.expect(Disconnected)
    agent.expect(Connected)
    exchange(agent, count=1)


@pytest.mark.parametrize("ca", ["", "other.crt"])
def test_a_broker_whose_ca_is_not_trusted_gets_nothing_from_us(start_tls, certificates, peer, ca):
    security = {"ca_file": certificates / ca} if ca else {}
    agent = peer(f"mqtts://{start_tls()}", "a", wait=False, security=security)
    reason = fatal_reason(agent)
    assert "the broker's certificate is not trusted" in reason
    assert "give the certificate of the CA that signed it (ca_file)" in reason
    assert not any(isinstance(event, Connected) for event in agent.seen)


@pytest.mark.fault(33)
def test_a_certificate_for_another_name_is_not_trusted(start_tls, certificates, peer):
    agent = peer(
        f"mqtts://{start_tls(server='elsewhere')}", "a", wait=False, security={"ca_file": certificates / "ca.crt"}
    )
    reason = fatal_reason(agent)
    assert "not trusted" in reason
    assert "127.0.0.1" in reason


def test_a_broker_that_asks_for_a_certificate_takes_one_that_its_ca_signed(start_tls, certificates, peer):
    security = {
        "ca_file": certificates / "ca.crt",
        "cert_file": certificates / "client.crt",
        "key_file": certificates / "client.key",
    }
    exchange(peer(f"mqtts://{start_tls('require_certificate true')}", "a", security=security))


@pytest.mark.parametrize("name", [None, "stranger"])
def test_without_a_certificate_that_its_ca_signed_it_says_what_to_do(start_tls, certificates, peer, name):
    security = {"ca_file": certificates / "ca.crt"}
    if name:
        security |= {"cert_file": certificates / f"{name}.crt", "key_file": certificates / f"{name}.key"}
    agent = peer(f"mqtts://{start_tls('require_certificate true')}", "a", wait=False, security=security)
    reason = fatal_reason(agent)
    assert "the broker does not accept our certificate" in reason
    assert "(cert_file, key_file)" in reason


def test_tls_to_a_port_without_it_says_so(mosquitto, certificates, peer):
    url = mosquitto.url.replace("mqtt://", "mqtts://")
    agent = peer(url, "a", wait=False, security={"ca_file": certificates / "ca.crt"})
    assert "does it speak TLS on this port?" in agent.expect(Disconnected).reason


def test_no_tls_to_a_port_with_it_never_connects(start_tls, peer):
    agent = peer(f"mqtt://{start_tls()}", "a", wait=False)
    assert "is this its port for connections without TLS?" in agent.expect(Disconnected).reason
    agent.watch(1.0)
    assert not any(isinstance(event, Connected) for event in agent.seen)


@pytest.mark.parametrize("broken", ["ca_file", "cert_file"])
def test_a_file_that_holds_no_certificate_is_named(start_tls, certificates, peer, tmp_path, broken):
    empty = tmp_path / "empty.pem"
    empty.touch()
    security = {"ca_file": certificates / "ca.crt"}
    if broken == "ca_file":
        security = {"ca_file": empty}
    else:
        security |= {"cert_file": empty, "key_file": empty}
    agent = peer(f"mqtts://{start_tls()}", "a", wait=False, security=security)
    assert "check ca_file, cert_file and key_file" in fatal_reason(agent)


@pytest.fixture
def start_with_password(start_mosquitto, tmp_path):
    def start() -> str:
        passwords = tmp_path / "passwords"
        subprocess.run(["mosquitto_passwd", "-b", "-c", passwords, "pi-3", "s3cret"], check=True, capture_output=True)
        return start_mosquitto("allow_anonymous false", f"password_file {passwords}").url

    return start


def test_the_right_password_opens(start_with_password, peer):
    agent = peer(start_with_password(), "a", security={"username": "pi-3", "password": "s3cret"})
    agent.sync()


@pytest.mark.parametrize(
    ("security", "who"),
    [
        ({"username": "pi-3", "password": "wr0ng"}, "as user 'pi-3'"),
        ({"username": "nobody", "password": "wr0ng"}, "as user 'nobody'"),
        ({}, "without a user name"),
    ],
)
def test_a_wrong_password_says_so_and_shows_no_password(start_with_password, peer, caplog, security, who):
    agent = peer(start_with_password(), "a", wait=False, security=security)
    reason = fatal_reason(agent)
    assert f"not authorised {who}: check user name, password and the broker's access list" in reason
    assert "wr0ng" not in reason + caplog.text


@pytest.fixture
def start_websocket(start_mosquitto, free_port):
    """Start a Mosquitto with a WebSocket listener, and return its two URLs: TCP, WebSocket."""

    def start() -> tuple[str, str]:
        broker = start_mosquitto(f"listener {free_port} 127.0.0.1", "protocol websockets")
        return broker.url, f"ws://127.0.0.1:{free_port}"

    return start


def test_a_websocket_carries_frames_both_ways(start_websocket, peer):
    tcp, websocket = start_websocket()
    agent, other = peer(websocket, "a"), peer(tcp, "b")
    assert agent.seen == [Connected("5", 2_000_000)]
    exchange(agent, other)
    exchange(other, agent, size_bytes=5_000, count=2)  # Mosquitto 2.0 writes 4 KB per 100 ms to a WebSocket


def test_a_websocket_over_tls_carries_frames(start_tls, certificates, peer):
    agent = peer(f"wss://{start_tls('protocol websockets')}/mqtt", "a", security={"ca_file": certificates / "ca.crt"})
    exchange(agent, size_bytes=5_000, count=2)


def test_packets_that_a_websocket_takes_in_parts_arrive_whole(start_websocket, peer):
    tcp, websocket = start_websocket()
    agent, other = peer(websocket, "a"), peer(tcp, "b")
    agent.raw_socket().setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # far less than a packet
    exchange(agent, other, size_bytes=100_000, count=20)
    agent.sync()


def test_a_port_without_websockets_says_so(mosquitto, peer):
    agent = peer(mosquitto.url.replace("mqtt://", "ws://"), "a", wait=False)
    assert "no WebSocket there" in agent.expect(Disconnected).reason
