"""The MQTT transport where only a broker of version 5 shows it: limits, sessions, wills with delay, takeover, pauses."""

from __future__ import annotations

import time

import pytest

from midge.transport.base import (
    Connected,
    Disconnected,
    MessageReceived,
    PacketTooLargeError,
    Published,
    Will,
)
from midge.transport.link import packet_size_bytes
from midge.transport.mqtt import MAX_IN_FLIGHT


@pytest.mark.fault(9)
def test_a_packet_above_the_brokers_limit_is_refused_here_and_one_at_it_goes_through(start_mosquitto, peer):
    agent = peer(start_mosquitto("max_packet_size 100000").url, "a")
    assert agent.seen == [Connected("5", packet_limit_bytes=100_000)]
    agent.transport.subscribe(["t"])
    # PUBLISH: 1 type, 3 length, 2 + 1 topic, 2 packet id, 1 properties
    largest = 100_000 - (1 + 3 + 2 + 1 + 2 + 1)
    assert packet_size_bytes("t", bytes(largest), qos=1, expires=False) == 100_000
    with pytest.raises(PacketTooLargeError, match="t: packet of 100001 bytes, the broker takes 100000: send smaller"):
        agent.transport.publish("t", bytes(largest + 1))
    with pytest.raises(PacketTooLargeError, match="packet of 100005 bytes"):
        agent.transport.publish("t", bytes(largest), expiry_s=10)  # the property takes 5 bytes
    agent.transport.publish("t", bytes(largest))
    assert len(agent.expect_message("t").payload) == largest
    assert not any(isinstance(event, Disconnected) for event in agent.seen)


def test_every_message_is_acknowledged_though_the_broker_takes_few_at_once(start_mosquitto, peer):
    agent = peer(start_mosquitto("max_inflight_messages 3").url, "a")
    assert agent.link._window == 3
    tokens = [agent.transport.publish("t", bytes(1000)) for _ in range(5 * MAX_IN_FLIGHT)]
    for token in tokens:
        agent.expect_published(token)
    assert [event.token for event in agent.seen if isinstance(event, Published)] == tokens


def test_an_expired_message_is_not_kept_for_later(mosquitto, peer):
    sender, receiver = peer(mosquitto.url, "a"), peer(mosquitto.url, "b")
    sender.transport.publish("t/short", b"x", retain=True, expiry_s=0.2)  # at least a second, since MQTT counts seconds
    sender.transport.publish("t/long", b"x", retain=True, expiry_s=600)
    deadline = time.monotonic() + 10
    while True:
        receiver.transport.subscribe(["t/short"])
        receiver.transport.subscribe(["t/long"])
        seen = []
        while not seen or seen[-1] != "t/long":
            seen.append(receiver.expect(MessageReceived).topic)
        if seen == ["t/long"]:
            break
        assert time.monotonic() < deadline, "the message never expired"


def test_a_will_with_delay_does_not_fire_where_we_are_back_in_time(mosquitto, peer):
    watcher = peer(mosquitto.url, "watcher")
    watcher.transport.subscribe(["agent/a/presence"])
    watcher.sync()
    agent = peer(mosquitto.url, "a", will=Will("agent/a/presence", b"offline", delay_s=2))
    agent.cut()
    agent.expect(Disconnected)
    agent.expect(Connected)
    watcher.watch(3.0)
    watcher.sync()
    assert [message.topic for message in watcher.messages() if message.topic.startswith("agent")] == []


def test_messages_for_us_wait_at_the_broker_while_the_connection_is_broken(mosquitto, peer):
    sender, agent = peer(mosquitto.url, "a"), peer(mosquitto.url, "b", clean_start=True)
    agent.transport.subscribe(["inbox"])
    agent.sync()
    agent.transport._backoff.next_wait_s = lambda _: 1.0
    agent.cut()
    agent.expect(Disconnected)
    sender.expect_published(sender.transport.publish("inbox", b"hello"))
    agent.expect(Connected)
    assert agent.expect_message("inbox").payload == b"hello"


def test_a_clean_start_forgets_what_an_earlier_process_subscribed_to(mosquitto, peer):
    first = peer(mosquitto.url, "a")
    first.transport.subscribe(["inbox"])
    first.sync()
    first.stop()
    sender = peer(mosquitto.url, "sender")
    sender.expect_published(sender.transport.publish("inbox", b"1"))
    resumed = peer(mosquitto.url, "a", clean_start=False)
    assert resumed.expect_message("inbox").payload == b"1"
    resumed.stop()
    sender.expect_published(sender.transport.publish("inbox", b"2"))
    fresh = peer(mosquitto.url, "a", clean_start=True)
    fresh.sync()
    assert [message.topic for message in fresh.messages() if message.topic == "inbox"] == []


@pytest.mark.fault(17)
def test_two_connections_with_one_client_id_end_each_other_until_somebody_reads_why(mosquitto, peer):
    first = peer(mosquitto.url, "twin")
    first.transport._backoff.next_wait_s = lambda _: 0.05
    second = peer(mosquitto.url, "twin")
    second.transport._backoff.next_wait_s = lambda _: 0.05
    first.expect(Disconnected)
    first.expect(Disconnected, lambda event: "client id" in event.reason)


def test_an_idle_connection_stays_up_by_pings(mosquitto, peer):
    agent = peer(mosquitto.url, "a", keepalive_s=1)
    agent.watch(3.5)
    assert agent.seen == [Connected("5", 2_000_000)]
    agent.sync()
