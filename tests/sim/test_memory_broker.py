"""The broker in memory does what MQTT does, and its faults are those that it was asked for."""

from __future__ import annotations

import math
import random

import pytest

from midge.transport.base import (
    Connected,
    Disconnected,
    MessageReceived,
    PacketTooLargeError,
    Published,
    Transport,
    Will,
)
from midge.transport.memory import MAX_WAITING, Faults, MemoryBroker

WILL = Will("a/presence", b"gone", delay_s=10)


class Client:
    """A connection that remembers what it was told."""

    def __init__(self, broker, name="a", *, will=None, keeps_session=False):
        self.events = []
        self.transport = broker.transport(name, self.events.append, will, keeps_session=keeps_session)
        self.transport.start()

    def received(self):
        return [(event.topic, event.payload) for event in self.events if isinstance(event, MessageReceived)]

    def payloads(self):
        return [payload for _, payload in self.received()]


def broker_of(seed=0, **faults):
    return MemoryBroker(random.Random(seed), Faults(**faults))


def drain(broker, until=math.inf):
    while broker.next_at() <= until and broker.deliver_next():
        pass


def test_a_message_reaches_every_subscriber_and_its_sender_learns_that_the_broker_took_it():
    broker = broker_of()
    one, two = Client(broker, "one"), Client(broker, "two")
    one.transport.subscribe(["t"])
    two.transport.subscribe(["t", "u"])
    assert one.transport.publish("t", b"x") == 1
    drain(broker)
    assert one.events == [Connected("memory"), MessageReceived("t", b"x"), Published(1)]
    assert two.events == [Connected("memory"), MessageReceived("t", b"x")]


def test_it_is_a_transport():
    transport: Transport = Client(broker_of()).transport
    assert transport.publish("t", b"x", qos=0) == 1


def test_a_retained_message_comes_again_with_each_subscription_until_it_is_cleared():
    broker = broker_of()
    client = Client(broker)
    client.transport.publish("t", b"x", retain=True)
    client.transport.subscribe(["t"])
    client.transport.subscribe(["t"])
    drain(broker)
    assert [event for event in client.events if isinstance(event, MessageReceived)] == [
        MessageReceived("t", b"x", retained=True)
    ] * 2
    client.transport.publish("t", b"", retain=True)
    client.transport.subscribe(["t"])
    drain(broker)
    assert client.payloads() == [b"x", b"x", b""]
    assert broker.retained == {}


def test_a_plus_matches_one_level_and_no_more():
    broker = broker_of()
    client = Client(broker)
    client.transport.publish("agent/1/presence", b"retained", retain=True)
    client.transport.subscribe(["agent/+/presence"])
    for topic in ("agent/2/presence", "agent/presence", "agent/2/presence/x", "agent/2/outbox"):
        client.transport.publish(topic, b"live")
    drain(broker)
    assert client.received() == [("agent/1/presence", b"retained"), ("agent/2/presence", b"live")]


def test_what_is_not_read_any_more_does_not_come():
    broker = broker_of()
    client = Client(broker)
    client.transport.subscribe(["t", "u"])
    client.transport.unsubscribe(["t", "never"])
    client.transport.publish("t", b"x")
    client.transport.publish("u", b"y")
    drain(broker)
    assert client.payloads() == [b"y"]


def test_messages_of_one_connection_come_in_order_and_time_passes_with_them():
    broker = broker_of(delay_s=1.0, uplink_s=1.0)
    client = Client(broker)
    client.transport.subscribe(["t"])
    for number in range(50):
        client.transport.publish("t", b"%d" % number)
    assert broker.now == 0.0
    drain(broker)
    assert client.payloads() == [b"%d" % number for number in range(50)]
    assert 0.9 < broker.now <= 2.0


@pytest.mark.parametrize(("faults", "low", "high"), [({"loss": 0.3}, 630, 770), ({"duplication": 0.3}, 1230, 1370)])
def test_so_many_messages_are_lost_or_doubled_as_was_asked(faults, low, high):
    broker = broker_of(**faults)
    client = Client(broker)
    client.transport.subscribe(["t"])
    for _ in range(1000):
        client.transport.publish("t", b"x")
    drain(broker)
    assert low <= len(client.received()) <= high  # 5 standard deviations of sqrt(1000 * 0.3 * 0.7) = 14.5


def test_what_is_held_back_is_passed_by_later_messages_and_comes_in_time():
    broker = broker_of(reorder=0.2, reorder_s=5.0)
    client = Client(broker)
    client.transport.subscribe(["t"])
    for number in range(100):
        client.transport.publish("t", b"%03d" % number)
    drain(broker)
    assert client.payloads() != sorted(client.payloads())
    assert sorted(client.payloads()) == [b"%03d" % number for number in range(100)]
    assert broker.now <= 5.1


def test_a_seed_gives_one_history():
    histories = []
    for _ in range(2):
        broker = broker_of(seed=5, loss=0.2, duplication=0.2, reorder=0.2, uplink_s=0.1)
        client = Client(broker)
        client.transport.subscribe(["t"])
        for number in range(100):
            client.transport.publish("t", b"%d" % number)
        drain(broker)
        histories.append(client.events)
    assert histories[0] == histories[1]


def test_a_connection_that_is_cut_comes_back_and_must_subscribe_again():
    broker = broker_of(reconnect_s=2.0)
    client = Client(broker)
    client.transport.subscribe(["t"])
    client.transport.publish("t", b"on its way")
    client.transport.cut(for_s=3.0)
    assert client.transport.publish("t", b"nobody is there") == 0
    drain(broker)
    assert client.events == [Disconnected("the connection was cut"), Connected("memory")]
    assert 3.0 <= broker.now <= 5.1
    client.transport.publish("t", b"not read")
    drain(broker)
    assert client.payloads() == []


def test_what_had_not_reached_the_broker_is_lost_with_the_connection():
    broker = broker_of(uplink_s=1.0)
    client = Client(broker)
    for _ in range(20):
        client.transport.publish("t", b"x", retain=True)
    client.transport.cut()
    drain(broker)
    assert broker.retained == {}
    assert not any(isinstance(event, Published) for event in client.events)


def test_a_clean_stop_sends_what_was_handed_over_and_leaves_no_will():
    broker = broker_of(uplink_s=1.0)
    client = Client(broker, will=WILL)
    client.transport.publish("t", b"farewell", retain=True)
    client.transport.stop()
    drain(broker)
    assert broker.retained == {"t": b"farewell"}
    assert client.transport.publish("t", b"too late") == 0


def test_a_will_is_published_its_delay_after_the_broker_noticed():
    broker = broker_of()
    watcher, client = Client(broker, "watcher"), Client(broker, will=WILL)
    watcher.transport.subscribe(["+/presence"])
    client.transport.kill(noticed_after_s=45.0)
    drain(broker, until=54.9)
    assert watcher.payloads() == []
    drain(broker, until=55.1)
    assert watcher.payloads() == [b"gone"]
    assert broker.retained == {"a/presence": b"gone"}


def test_a_client_that_is_back_in_time_leaves_no_will():
    broker = broker_of()
    client = Client(broker, will=WILL)
    client.transport.cut(noticed_after_s=5.0)
    drain(broker)
    assert broker.retained == {}
    assert broker.now >= 15.0  # the will's time came and went


def test_a_will_of_one_cut_is_not_published_for_the_next():
    broker = broker_of(reconnect_s=0.1)
    client = Client(broker, will=WILL)
    client.transport.cut()
    drain(broker, until=5.0)
    broker.wait_until(5.0)
    client.transport.kill()
    drain(broker, until=14.9)  # the first will would have been due at 10
    assert broker.retained == {}
    drain(broker)
    assert broker.retained == {"a/presence": b"gone"}


def test_without_delays_a_takeover_of_the_connection_publishes_the_will():
    broker = MemoryBroker(random.Random(0), delays_wills=False)
    Client(broker, will=WILL).transport.kill(noticed_after_s=45.0)
    again = Client(broker)
    again.transport.subscribe(["a/presence"])
    drain(broker)
    assert again.payloads() == [b"gone"]


def test_of_two_connections_with_one_name_the_newer_is_kept():
    broker = broker_of(reconnect_s=1.0)
    older, newer = Client(broker, "same"), Client(broker, "same")
    drain(broker, until=0.0)
    assert isinstance(older.events[-1], Disconnected)
    newer.transport.stop()
    drain(broker)
    assert isinstance(older.events[-1], Connected)


def test_a_session_that_is_kept_gets_what_came_while_its_client_was_away():
    broker = broker_of()
    client, sender = Client(broker, keeps_session=True), Client(broker, "sender")
    client.transport.subscribe(["t"])
    client.transport.kill()
    sender.transport.publish("t", b"kept")
    sender.transport.publish("t", b"of no interest any more", expiry_s=1.0)
    drain(broker)
    broker.wait_until(2.0)
    assert broker.num_waiting == 2
    back = Client(broker, keeps_session=True)
    sender.transport.publish("t", b"live")
    drain(broker)
    assert back.payloads() == [b"kept", b"live"]
    assert broker.num_waiting == 0


def test_no_more_than_so_many_messages_wait_for_a_client_that_is_away():
    broker = broker_of()
    client, sender = Client(broker, keeps_session=True), Client(broker, "sender")
    client.transport.subscribe(["t"])
    client.transport.kill()
    for number in range(MAX_WAITING + 5):
        sender.transport.publish("t", b"%d" % number)
    back = Client(broker, keeps_session=True)
    drain(broker)
    assert len(back.received()) == MAX_WAITING
    assert back.payloads()[-1] == b"%d" % (MAX_WAITING - 1)


def test_a_connection_that_has_gone_dark_loses_everything_both_ways_and_nobody_knows():
    broker = broker_of()
    client, other = Client(broker, will=WILL), Client(broker, "other")
    client.transport.subscribe(["t"])
    drain(broker)
    client.transport.go_dark()
    assert client.transport.publish("t", b"vanishes", retain=True) == 1
    other.transport.publish("t", b"vanishes too")
    drain(broker)
    assert client.events == [Connected("memory")]
    assert broker.retained == {}
    client.transport.cut()
    drain(broker)
    assert isinstance(client.events[-1], Connected)
    client.transport.subscribe(["t"])
    client.transport.publish("t", b"arrives")
    drain(broker)
    assert client.payloads() == [b"arrives"]


@pytest.mark.parametrize(
    ("how", "left"),
    [
        ({}, {"t": b"new"}),
        ({"forget": True}, {}),
        ({"restored": {"t": b"old"}}, {"t": b"old"}),
    ],
)
def test_a_broker_that_died_comes_back_with_what_it_kept(how, left):
    broker = broker_of(reconnect_s=1.0)
    client = Client(broker, will=WILL)
    client.transport.publish("t", b"new", retain=True)
    broker.stop(**how)
    drain(broker)
    assert isinstance(client.events[-1], Disconnected)
    assert client.transport.publish("t", b"nowhere") == 0
    broker.wait_until(20.0)
    broker.start()
    drain(broker)
    assert isinstance(client.events[-1], Connected)
    assert broker.retained == left  # and no will


def test_a_client_that_starts_while_the_broker_is_down_waits_for_it():
    broker = broker_of()
    broker.stop()
    client = Client(broker)
    drain(broker)
    assert client.events == []
    broker.start()
    drain(broker)
    assert client.events == [Connected("memory")]


def test_a_message_above_the_packet_limit_is_refused_at_its_sender():
    broker = MemoryBroker(random.Random(0), packet_limit_bytes=10)
    client = Client(broker)
    client.transport.publish("t", b"x" * 9)
    with pytest.raises(PacketTooLargeError, match="11 bytes, the broker takes 10"):
        client.transport.publish("t", b"x" * 11)


def test_actions_are_called_in_order_with_deliveries():
    broker = broker_of(delay_s=0.0)
    client = Client(broker)
    client.transport.subscribe(["t"])
    broker.call_at(1.0, lambda: client.transport.publish("t", b"at one"))
    broker.call_at(0.5, lambda: client.transport.publish("t", b"at a half"))
    drain(broker)
    assert client.payloads() == [b"at a half", b"at one"]
    assert (broker.now, broker.queue_length, broker.next_at()) == (1.0, 0, math.inf)
    assert not broker.deliver_next()
