"""The MQTT transport on both brokers: what a driver relies on."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from midge.eventqueue import EventQueue
from midge.transport.base import Connected, Disconnected, MessageReceived, Published, Will

VERSIONS = {"mosquitto": "5", "embedded": "3.1.1"}
PACKET_LIMITS = {"mosquitto": 2_000_000, "embedded": None}


def test_it_speaks_version_5_where_the_broker_does_and_3_1_1_where_not(broker, peer):
    agent = peer(broker.url, "a")
    assert agent.seen == [Connected(VERSIONS[broker.kind], PACKET_LIMITS[broker.kind])]
    assert agent.transport.healthy


def test_small_packets_leave_at_once(broker, peer):
    assert peer(broker.url, "a").raw_socket().getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def test_it_remembers_the_version_that_worked(broker, peer):
    agent = peer(broker.url, "a")
    agent.cut()
    agent.expect(Disconnected)
    started = time.monotonic()
    assert agent.expect(Connected).version == VERSIONS[broker.kind]
    assert time.monotonic() - started < 5


def test_200_kilobytes_arrive_as_they_were_sent(broker, peer):
    sender, receiver = peer(broker.url, "a"), peer(broker.url, "b")
    receiver.transport.subscribe(["frames/+"])
    receiver.sync()
    payloads = {f"frames/{index}": random.Random(index).randbytes(200_000) for index in range(8)}
    tokens = [sender.transport.publish(topic, payload) for topic, payload in payloads.items()]
    for topic, payload in payloads.items():
        received = receiver.expect_message(topic)
        assert hashlib.sha256(received.payload).digest() == hashlib.sha256(payload).digest()
        assert not received.retained
    for token in tokens:
        sender.expect_published(token)


def test_tokens_differ_and_qos_0_is_not_acknowledged(broker, peer):
    agent = peer(broker.url, "a")
    agent.transport.subscribe(["t"])
    agent.sync()
    first = agent.transport.publish("t", b"0", qos=0)
    second = agent.transport.publish("t", b"1", qos=1)
    agent.expect_published(second)
    assert 0 < first < second
    assert Published(first) not in agent.seen


def test_a_retained_message_comes_by_exact_topic_and_again_on_subscribing_again(broker, peer):
    sender, receiver = peer(broker.url, "a"), peer(broker.url, "b")
    sender.expect_published(sender.transport.publish("model/0", b"weights", retain=True))
    for _ in range(3):
        receiver.transport.subscribe(["model/0"])
        assert receiver.expect_message("model/0") == MessageReceived("model/0", b"weights", retained=True)


def test_an_empty_retained_message_clears_the_topic(broker, peer):
    sender, receiver = peer(broker.url, "a"), peer(broker.url, "b")
    sender.expect_published(sender.transport.publish("model/0", b"weights", retain=True))
    sender.expect_published(sender.transport.publish("model/0", b"", retain=True))
    receiver.transport.subscribe(["model/0"])
    receiver.sync()
    assert [message.topic for message in receiver.messages() if message.topic == "model/0"] == []


def test_a_window_of_16_subscriptions_in_one_packet_brings_16_frames(broker, peer):
    sender, receiver = peer(broker.url, "a"), peer(broker.url, "b")
    topics = [f"model/{index}" for index in range(16)]
    tokens = [sender.transport.publish(topic, topic.encode(), retain=True) for topic in topics]
    sender.expect_published(tokens[-1])
    receiver.transport.subscribe(topics)
    seen = {}
    while len(seen) < 16:
        message = receiver.expect(MessageReceived)
        seen[message.topic] = message.payload
    assert seen == {topic: topic.encode() for topic in topics}
    receiver.transport.unsubscribe(topics)
    receiver.sync()
    sender.expect_published(sender.transport.publish("model/3", b"new", retain=True))
    receiver.sync()
    assert b"new" not in [message.payload for message in receiver.messages()]


def test_a_will_fires_when_the_connection_breaks(broker, peer):
    watcher = peer(broker.url, "watcher")
    watcher.transport.subscribe(["agent/a/presence"])
    watcher.sync()
    agent = peer(broker.url, "a", will=Will("agent/a/presence", b"offline", delay_s=0))
    agent.cut()
    assert watcher.expect_message("agent/a/presence") == MessageReceived("agent/a/presence", b"offline", retained=False)
    agent.expect(Disconnected)
    agent.expect(Connected)
    latecomer = peer(broker.url, "latecomer")
    latecomer.transport.subscribe(["agent/a/presence"])
    assert latecomer.expect_message("agent/a/presence") == MessageReceived(
        "agent/a/presence", b"offline", retained=True
    )


@pytest.mark.fault(35)
def test_it_works_with_more_descriptors_than_select_can_watch(broker, peer):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, hard), hard))
    try:
        with ExitStack() as opened:
            null = opened.enter_context(Path(os.devnull).open("rb"))
            for _ in range(1050):
                opened.callback(os.close, os.dup(null.fileno()))
            agent = peer(broker.url, "a")
            assert agent.raw_socket().fileno() > 1024
            agent.sync()
            agent.stop()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_will_fires_on_a_clean_stop_and_what_was_queued_is_sent(broker, peer):
    watcher = peer(broker.url, "watcher")
    watcher.transport.subscribe(["agent/a/presence", "last"])
    watcher.sync()
    agent = peer(broker.url, "a", will=Will("agent/a/presence", b"offline", delay_s=0))
    for number in range(100):
        agent.transport.publish("last", f"{number}".encode())
    agent.stop()
    assert not agent.transport.healthy
    for number in range(100):
        assert watcher.expect_message("last").payload == f"{number}".encode()
    watcher.sync()
    assert b"offline" not in [message.payload for message in watcher.messages()]


@pytest.mark.fault(1)
def test_after_a_brokers_restart_it_reconnects_and_messages_flow(broker, peer):
    agent = peer(broker.url, "a")
    agent.transport.subscribe(["t"])
    agent.sync()
    broker.kill()
    lost = agent.expect(Disconnected)
    assert not lost.fatal
    assert agent.transport.publish("t", b"dropped") == 0
    agent.transport.subscribe(["t"])  # dropped as well
    broker.start()
    agent.expect(Connected)
    agent.transport.subscribe(["t"])
    agent.transport.publish("t", b"after")
    assert agent.expect_message("t").payload == b"after"
    assert b"dropped" not in [message.payload for message in agent.messages()]


def test_a_broker_that_is_not_there_is_reported_once_and_connected_to_once_it_is(broker, peer):
    broker.stop()
    agent = peer(broker.url, "a", wait=False)
    lost = agent.expect(Disconnected)
    assert lost == Disconnected(f"{broker.url}: nothing listens there: is the broker running?", fatal=False)
    agent.watch(1.0)
    assert agent.seen == [lost]
    broker.start()
    agent.expect(Connected)


@pytest.mark.parametrize("when", ["never started", "not connected"])
def test_it_stops_at_once_where_there_is_no_connection(broker, peer, when):
    broker.stop()
    agent = peer(broker.url, "a", wait=False)
    if when == "not connected":
        agent.expect(Disconnected)
    started = time.monotonic()
    agent.stop(timeout_s=5)
    assert time.monotonic() - started < 2
    assert not agent.transport.healthy
    assert agent.transport.publish("t", b"") == 0


class RaisingQueue(EventQueue):
    """Raises where it should take a chosen event, as often as it is told."""

    def __init__(self, fails, times=1):
        super().__init__()
        self.fails = fails
        self.times = times

    def put(self, event, size_bytes=0):
        if self.times and self.fails(event):
            self.times -= 1
            raise RuntimeError("sink")
        super().put(event, size_bytes)


@pytest.mark.fault(25)
def test_an_exception_for_a_message_loses_that_message_and_nothing_else(broker, peer, caplog):
    events = RaisingQueue(lambda event: isinstance(event, MessageReceived) and event.payload == b"bad", times=99)
    agent = peer(broker.url, "a", events=events)
    agent.transport.subscribe(["t"])
    for payload in (b"1", b"bad", b"2"):
        agent.transport.publish("t", payload)
    assert [agent.expect_message("t").payload for _ in range(2)] == [b"1", b"2"]
    assert agent.transport.healthy
    assert not any(isinstance(event, Disconnected) for event in agent.seen)
    assert "event lost" in caplog.text


@pytest.mark.fault(25)
def test_an_exception_for_connected_makes_the_connection_again(broker, peer):
    events = RaisingQueue(lambda event: isinstance(event, Connected), times=2)
    agent = peer(broker.url, "a", events=events)
    assert [type(event) for event in agent.seen if isinstance(event, Connected)] == [Connected]
    assert events.times == 0
    agent.sync()


@pytest.mark.fault(25)
def test_an_exception_of_the_queue_itself_does_not_kill_the_thread(broker, peer):
    agent = peer(broker.url, "a")
    is_full, agent.events.is_full = agent.events.is_full, lambda: 1 // 0
    agent.transport.publish("t", b"wakes the thread")
    agent.expect(Disconnected)
    agent.events.is_full = is_full
    agent.expect(Connected)
    agent.sync()


def test_a_request_that_mqtt_does_not_allow_is_dropped_and_the_connection_stays(broker, peer, caplog):
    agent = peer(broker.url, "a")
    agent.transport.publish("no/+/wildcard", b"")
    agent.transport.subscribe(["a#b"])
    agent.sync()
    assert not any(isinstance(event, Disconnected) for event in agent.seen)
    assert caplog.text.count("request dropped") == 2


def test_asking_for_no_topics_asks_for_nothing(broker, peer):
    agent = peer(broker.url, "a")
    agent.transport.subscribe([])
    agent.transport.unsubscribe([])
    agent.sync()


@pytest.mark.fault(15)
def test_while_nobody_takes_the_queue_stays_bounded_and_then_everything_comes(broker, peer):
    limit_bytes, size_bytes, count = 1_000_000, 100_000, 60
    sender = peer(broker.url, "a")
    receiver = peer(broker.url, "b", events=EventQueue(limit_bytes=limit_bytes))
    receiver.transport.subscribe(["t"])
    receiver.sync()
    tokens = [sender.transport.publish("t", number.to_bytes(size_bytes, "big")) for number in range(count)]
    sender.expect_published(tokens[-1])
    deadline = time.monotonic() + 10
    while not receiver.events.is_full():
        assert time.monotonic() < deadline, f"only {receiver.events.size_bytes} bytes came"
        time.sleep(0.01)
    for _ in range(20):
        assert receiver.events.size_bytes <= limit_bytes + 2 * size_bytes
        time.sleep(0.01)
    numbers = [int.from_bytes(receiver.expect_message("t").payload, "big") for _ in range(count)]
    assert sorted(numbers) == list(range(count))


def test_many_small_messages_fill_the_queue_too(broker, peer):
    sender = peer(broker.url, "a")
    receiver = peer(broker.url, "b", events=EventQueue(limit_bytes=50_000))
    receiver.transport.subscribe(["t"])
    receiver.sync()
    token = [sender.transport.publish("t", b"") for _ in range(500)][-1]
    sender.expect_published(token)
    deadline = time.monotonic() + 10
    while not receiver.events.is_full():
        assert time.monotonic() < deadline, f"only {len(receiver.events)} events came"
        time.sleep(0.01)
    assert len(receiver.events) < 500
    for _ in range(500):
        receiver.expect_message("t")
