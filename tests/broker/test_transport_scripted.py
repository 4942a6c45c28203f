"""The MQTT transport and brokers that misbehave, each scripted byte by byte."""

from __future__ import annotations

import threading

import pytest

from midge.eventqueue import EventQueue
from midge.transport import network
from midge.transport.base import Connected, Disconnected, MessageReceived, Published, SubscriptionDenied, Will

CONNACK_5 = b"\x20\x03\x00\x00\x00"
CONNACK_3 = b"\x20\x02\x00\x00"
REFUSED_VERSION = b"\x20\x02\x00\x01"
WILL_FLAG = 0x04
PATIENCE_S = 15.0


def connack(version: int) -> bytes:
    return CONNACK_5 if version == 5 else CONNACK_3


def has_will(connect: bytes) -> bool:
    return bool(connect[7] & WILL_FLAG)


def test_a_broker_that_closes_on_version_5_gets_3_1_1_once_that_is_certain(scripted_broker, peer):
    def script(connection, version):
        if version == 4:
            connection.send(CONNACK_3)
            connection.wait_for_end()

    broker = scripted_broker(script)
    agent = peer(broker.url, "a", will=Will("presence", b"offline"))
    assert broker.versions == [5, 4, 5, 4]
    assert [has_will(connect) for connect in broker.connects] == [True, False, True, True]
    assert agent.seen[-1] == Connected("3.1.1", None)


def test_a_broker_that_says_nothing_to_version_5_gets_3_1_1(scripted_broker, peer, monkeypatch):
    monkeypatch.setattr(network, "ANSWER_TIMEOUT_S", 0.2)

    def script(connection, version):
        if version == 4:
            connection.send(CONNACK_3)
        connection.wait_for_end()

    broker = scripted_broker(script)
    agent = peer(broker.url, "a", keepalive_s=1)
    assert broker.versions == [5, 4, 5, 4]
    assert agent.seen == [Disconnected(f"{broker.url}: no answer to CONNECT in 0.2 s"), Connected("3.1.1", None)]


def test_a_broker_that_is_only_starting_up_does_not_cost_version_5(scripted_broker, peer):
    attempts = []

    def script(connection, version):
        attempts.append(version)
        if len(attempts) > 1:
            connection.send(connack(version))
            connection.wait_for_end()

    agent = peer(scripted_broker(script).url, "a")
    assert attempts == [5, 4, 5]
    assert agent.seen[-1] == Connected("5", None)


@pytest.mark.fault(30)
def test_a_broker_of_neither_version_needs_a_person(scripted_broker, peer):
    broker = scripted_broker(lambda connection, _: connection.send(REFUSED_VERSION))
    agent = peer(broker.url, "a", wait=False)
    lost = agent.expect(Disconnected, lambda event: event.fatal)
    assert lost.reason.endswith("(5 and 3.1.1 were tried)")
    assert broker.versions[:2] == [5, 4]


@pytest.mark.parametrize(
    ("connack", "reason", "fatal"),
    [
        (b"\x20\x03\x00\x86\x00", "not authorised as user 'pi-3': check user name, password", True),
        (b"\x20\x03\x00\x87\x00", "not authorised as user 'pi-3': check user name, password", True),
        (b"\x20\x03\x00\x85\x00", "does not accept the client id 'a'", True),
        (b"\x20\x03\x00\x8a\x00", "has banned 'a'", True),
        (b"\x20\x03\x00\x88\x00", "refuses us for now: Server unavailable (reason code 136)", False),
        (b"\x20\x05\x00\x00\x02\x25\x00", "the broker offers no retained messages: use another broker", True),
        (b"\x20\x07\x00\x00\x04\x24\x00\x28\x00", "offers no QoS 1 and no wildcards", True),
    ],
)
def test_a_refusal_says_what_to_do_and_whether_a_person_must(scripted_broker, peer, connack, reason, fatal):
    broker = scripted_broker(lambda connection, _: connection.send(connack))
    agent = peer(broker.url, "a", wait=False, security={"username": "pi-3", "password": "s3cret"})
    lost = agent.expect(Disconnected)
    assert reason in lost.reason
    assert lost.fatal is fatal
    assert "s3cret" not in lost.reason


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (0x8E, "another connection uses client id 'a': give each its own, or end the other one"),
        (0x8B, "the broker ended the connection: Server shutting down (reason code 139)"),
        (0x87, "no longer authorised"),
    ],
)
def test_a_broker_that_ends_the_connection_says_why(scripted_broker, peer, code, reason):
    def script(connection, version):
        connection.send(connack(version))
        connection.send(bytes([0xE0, 0x02, code, 0x00]))
        connection.wait_for_end()

    agent = peer(scripted_broker(script).url, "a")
    assert reason in agent.expect(Disconnected).reason


@pytest.mark.fault(17)
def test_after_a_takeover_it_waits_before_it_comes_back(scripted_broker, peer):
    def script(connection, version):
        connection.send(connack(version))
        connection.send(bytes([0xE0, 0x02, 0x8E, 0x00]))
        connection.wait_for_end()

    broker = scripted_broker(script)
    agent = peer(broker.url, "a")
    agent.expect(Disconnected)
    agent.watch(1.0)
    assert len(broker.connects) == 1  # the first wait is 2.5 s at least


def test_denied_topics_are_named(scripted_broker, peer):
    def script(connection, version):
        connection.send(connack(version))
        body = connection.expect(8)
        connection.send(b"\x90\x06" + body[:2] + b"\x00\x01\x87\x80")
        connection.wait_for_end()

    agent = peer(scripted_broker(script).url, "a")
    agent.transport.subscribe(["open", "closed", "shut"])
    assert agent.expect(SubscriptionDenied).topics == ("closed", "shut")


def test_a_message_that_the_broker_refuses_still_frees_its_place(scripted_broker, peer, caplog):
    def script(connection, version):
        connection.send(connack(version))
        body = connection.expect(3)
        packet_id = body[2 + 1 : 2 + 1 + 2]
        connection.send(b"\x40\x04" + packet_id + b"\x87\x00")
        connection.wait_for_end()

    agent = peer(scripted_broker(script).url, "a")
    agent.expect_published(agent.transport.publish("t", b"x"))
    assert "message refused by the broker" in caplog.text


def test_it_keeps_to_the_brokers_receive_maximum(scripted_broker, peer):
    seen_before_an_answer = []

    def script(connection, version):
        connection.send(b"\x20\x06\x00\x00\x03\x21\x00\x02")  # Receive Maximum 2
        waiting = connection.read_for(0.5)
        seen_before_an_answer.append(len(waiting))
        while True:
            for _, body in waiting:
                connection.send(b"\x40\x02" + body[3:5])
            waiting = [connection.read()]

    agent = peer(scripted_broker(script).url, "a")
    tokens = [agent.transport.publish("t", b"x") for _ in range(50)]
    for token in tokens:
        agent.expect_published(token)
    assert seen_before_an_answer == [2]


def test_a_read_pause_longer_than_the_keep_alive_does_not_cost_the_connection(scripted_broker, peer):
    pinged = threading.Event()

    def script(connection, version):
        connection.send(connack(version))
        for _ in range(10):
            connection.send(b"\x30\xd4\x86\x03\x00\x01t\x00" + bytes(50_000))
        for _ in range(12):  # each quarter of a second: paho would give up after 2 s without an answer that it can read
            connection.expect(12)
        pinged.set()
        while True:
            connection.expect(12)
            connection.send(b"\xd0\x00")

    agent = peer(scripted_broker(script).url, "a", keepalive_s=1, events=EventQueue(limit_bytes=100_000))
    assert pinged.wait(PATIENCE_S)
    assert len(agent.events) < 10
    for _ in range(10):
        assert len(agent.expect_message("t").payload) == 50_000
    assert not any(isinstance(event, Disconnected) for event in agent.seen)


def test_a_topic_that_is_not_utf_8_is_dropped_and_the_next_message_comes(scripted_broker, peer, caplog):
    def script(connection, version):
        connection.send(connack(version))
        connection.send(b"\x30\x06\x00\x02\xff\xfe\x00x")
        connection.send(b"\x30\x05\x00\x01t\x00y")
        connection.wait_for_end()

    agent = peer(scripted_broker(script).url, "a")
    assert agent.expect(MessageReceived) == MessageReceived("t", b"y")
    assert agent.transport.healthy
    assert caplog.text == ""  # a peer's mistake is no error of ours


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\x00",
        b"\xf0\xff\xff\xff\xff\x7f",
        b"\x30\x02\x00\xff",
        b"\x90\x01\x00",
        b"\x40\x01\x00",
        b"\x30\x05\x00\x01t\x09\x01",
        b"\x20\x01\x00",
        b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(99),
    ],
)
def test_garbage_costs_the_connection_and_nothing_else(scripted_broker, peer, garbage):
    rounds = []

    def script(connection, version):
        rounds.append(version)
        connection.send(connack(version))
        if len(rounds) == 1:
            connection.send(garbage)
        connection.wait_for_end()

    agent = peer(scripted_broker(script).url, "a")
    agent.expect(Disconnected)
    agent.expect(Connected)
    assert agent.transport.healthy


def test_published_means_that_the_broker_acknowledged(scripted_broker, peer):
    def script(connection, version):
        connection.send(connack(version))
        connection.wait_for_end()

    agent = peer(scripted_broker(script).url, "a")
    agent.transport.publish("t", b"x")
    agent.watch(0.3)
    assert not any(isinstance(event, Published) for event in agent.seen)


@pytest.mark.fault(16)
def test_a_broker_that_falls_silent_is_noticed(scripted_broker, peer):
    def script(connection, version):
        connection.send(connack(version))
        connection.wait_for_end()

    agent = peer(scripted_broker(script).url, "a", keepalive_s=1)
    assert agent.expect(Disconnected).reason.endswith("no answer to a ping: network or broker is down")
    agent.expect(Connected)


def test_a_stop_does_not_wait_longer_than_it_was_told(scripted_broker, peer):
    def script(connection, version):
        connection.send(connack(version))
        connection.wait_for_end()

    agent = peer(scripted_broker(script).url, "a")
    agent.transport.publish("t", b"never acknowledged")
    agent.stop(timeout_s=0.2)
    assert not agent.transport.healthy
    assert not any(isinstance(event, Disconnected) for event in agent.seen)
