"""The network thread with a link that a test plays: what it hands over, when, and what it tells the driver."""

from __future__ import annotations

import random
import socket
import threading
import time

import pytest

from midge.eventqueue import EventQueue
from midge.transport import network
from midge.transport.address import Address
from midge.transport.base import Connected, Disconnected, PacketTooLargeError
from midge.transport.failures import Failure, Kind, LinkError
from midge.transport.link import PublishRequest, SubscribeRequest, packet_size_bytes
from midge.transport.network import NetworkThread

PATIENCE_S = 5.0
ADDRESS = Address.parse("mqtt://broker")
UNMAKEABLE = object()


class PlayedLink:
    """A link whose other end is the test's."""

    def __init__(self, accept, room=99):
        self.accepted = Connected("5", accept) if accept is not False else None
        self.failure = None
        self.room = room
        self.pending_bytes = 0
        self.sent = []
        self.closed = threading.Event()
        self.said_goodbye = False
        self._near, self.far = socket.socketpair()

    def open(self):
        return self._near.fileno()

    def close(self):
        self._near.close()
        self.closed.set()

    def has_room(self):
        return self.room > 0

    def is_settled(self):
        return True

    def largest_pending_bytes(self):
        return self.pending_bytes

    def send(self, request):
        self.sent.append(request)
        self.room -= isinstance(request, PublishRequest)

    def wants_write(self):
        return False

    def write(self):
        raise AssertionError("nothing to write")

    def read(self):
        word = self._near.recv(100)
        if word == b"lost":
            self.failure = Failure(Kind.LOST, "lost")
        elif word == b"bug":
            raise ZeroDivisionError

    def has_unread(self):
        return False

    def keep_alive(self, now, *, busy):
        pass

    def disconnect(self):
        self.said_goodbye = True
        self.failure = Failure(Kind.LOST, "we left")


class PlayedThread(NetworkThread):
    """Takes its links, or what their `open` raises, from a list; after that, nothing listens."""

    def __init__(self, *links):
        self.events = EventQueue()
        super().__init__(ADDRESS, "played", self.events, 0.05, random.Random(0))
        self.links = list(links)
        self.waits = []
        self._backoff.next_wait_s = self._wait_briefly

    def _wait_briefly(self, kind):
        self.waits.append(kind)
        return 0.01

    def _make_link(self):
        link = self.links.pop(0) if self.links else ConnectionRefusedError()
        if link is UNMAKEABLE:
            raise ZeroDivisionError
        if isinstance(link, Exception):
            failing = PlayedLink(False)
            failing.open = lambda: raising(link)
            return failing
        return link

    def _judge(self, failure, *, accepted):
        return failure

    def next(self):
        events = self.events.take(PATIENCE_S, max_events=1)
        assert events, "nothing happened"
        return events[0]


def raising(error):
    raise error


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


@pytest.fixture
def play():
    threads = []

    def start(*links):
        threads.append(PlayedThread(*links))
        threads[-1].start()
        return threads[-1]

    yield start
    for thread in threads:
        thread.stop()
        assert not thread._thread.is_alive()


def test_it_connects_tells_and_says_goodbye(play):
    link = PlayedLink(accept=None)
    thread = play(link)
    assert thread.next() == Connected("5", None)
    thread.stop()
    assert link.said_goodbye
    assert link.closed.is_set()
    assert len(thread.events) == 0


def test_what_is_asked_without_a_connection_is_dropped(play):
    thread = play()
    assert isinstance(thread.next(), Disconnected)
    assert thread.publish("t", b"x") == 0
    thread.subscribe(["t"])
    assert (list(thread._messages), list(thread._controls)) == ([], [])


def test_subscriptions_overtake_messages_that_wait_for_room(play):
    link = PlayedLink(accept=None, room=0)
    thread = play(link)
    thread.next()
    tokens = [thread.publish("t", b"1"), thread.publish("t", b"2")]
    thread.subscribe(["frames"])
    wait_until(lambda: link.sent)
    assert link.sent == [SubscribeRequest(("frames",), 1)]
    link.room = 1
    wait_until(lambda: len(link.sent) == 2)
    assert link.sent[1] == PublishRequest(tokens[0], "t", b"1", 1, retain=False, expiry_s=None)
    link.room = 1
    wait_until(lambda: len(link.sent) == 3)
    assert link.sent[2].token == tokens[1]


def test_messages_that_wait_have_a_bound_and_what_is_beyond_is_dropped(play, monkeypatch, caplog):
    monkeypatch.setattr(network, "MAX_QUEUED_BYTES", 3000)
    link = PlayedLink(None, room=0)
    thread = play(link)
    thread.next()
    taken = [bool(thread.publish("a", bytes(400))) for _ in range(6)]  # each costs 512 bytes beside its payload
    assert taken == [True, True, True, False, False, False]
    assert caplog.text.count("message dropped: too many wait") == 1
    link.room = 99
    thread.subscribe(["x"])  # wakes it
    wait_until(lambda: sum(isinstance(request, PublishRequest) for request in link.sent) == 3)
    assert thread.publish("a", bytes(400))


def test_what_waited_is_void_after_the_connection_is_lost(play):
    first, second = PlayedLink(accept=None, room=0), PlayedLink(accept=None)
    thread = play(first, second)
    thread.next()
    token = thread.publish("t", b"stale")
    first.far.send(b"lost")
    assert thread.next() == Disconnected("lost")
    assert thread.next() == Connected("5", None)
    assert thread.publish("t", b"fresh") == token + 1
    wait_until(lambda: second.sent)
    assert [request.payload for request in second.sent] == [b"fresh"]


@pytest.mark.parametrize(("size", "fits"), [(1000, True), (1001, False)])
def test_the_packet_limit_is_that_of_the_connection(play, size, fits):
    thread = play(PlayedLink(accept=1000))
    thread.next()
    payload = bytes(size - packet_size_bytes("t", bytes(900), qos=1, expires=False) + 900)
    if fits:
        assert thread.publish("t", payload) == 1
    else:
        with pytest.raises(PacketTooLargeError, match="packet of 1001 bytes, the broker takes 1000"):
            thread.publish("t", payload)


def test_attempts_that_fail_alike_are_told_once(play):
    fatal = LinkError(Failure(Kind.FATAL, "wrong password"))
    thread = play(ConnectionRefusedError(), ConnectionRefusedError(), fatal, fatal, ConnectionRefusedError())
    refused = Disconnected("mqtt://broker:1883: nothing listens there: is the broker running?")
    assert [thread.next() for _ in range(3)] == [refused, Disconnected("wrong password", fatal=True), refused]
    wait_until(lambda: len(thread.waits) > 8)
    assert len(thread.events) == 0
    assert thread.waits[:5] == [Kind.LOST, Kind.LOST, Kind.FATAL, Kind.FATAL, Kind.LOST]


@pytest.mark.parametrize("kind", [Kind.WRONG_VERSION, Kind.PROBED])
def test_trying_versions_is_not_worth_telling(play, kind):
    thread = play(LinkError(Failure(kind, "try another")), PlayedLink(accept=None))
    assert thread.next() == Connected("5", None)


def test_a_bug_costs_the_connection_and_not_the_thread(play, caplog):
    first = PlayedLink(accept=None)
    thread = play(first, PlayedLink(accept=None))
    thread.next()
    first.far.send(b"bug")
    assert "ZeroDivisionError" in thread.next().reason
    assert thread.next() == Connected("5", None)
    assert first.closed.is_set()
    assert "connection given up: internal error" in caplog.text


def test_a_link_that_cannot_even_be_made_does_not_end_the_thread(play):
    thread = play(UNMAKEABLE, PlayedLink(accept=None))
    assert thread.next() == Disconnected("mqtt://broker:1883: internal error, see the log")
    assert thread.next() == Connected("5", None)


def test_a_broker_that_never_answers_is_given_up(play, monkeypatch):
    monkeypatch.setattr(network, "ANSWER_TIMEOUT_S", 0.1)
    silent = PlayedLink(accept=False)
    thread = play(silent)
    assert thread.next() == Disconnected("mqtt://broker:1883: no answer to CONNECT in 0.1 s")
    assert thread.waits[0] is Kind.NO_ANSWER


def test_the_third_connection_in_a_row_that_does_not_last_gets_a_hint(play):
    links = [PlayedLink(accept=None) for _ in range(3)]
    thread = play(*links)
    reasons = []
    for link in links:
        assert thread.next() == Connected("5", None)
        link.far.send(b"lost")
        reasons.append(thread.next().reason)
    hint = "lost, 3 times soon after connecting: is our client id, an agent's id, in use by another connection to this broker?"
    assert reasons == ["lost", "lost", hint]


def test_a_large_message_that_was_on_its_way_each_time_is_named_first(play):
    links = [PlayedLink(accept=None) for _ in range(3)]
    thread = play(*links)
    for link in links:
        link.pending_bytes = network.LARGE_BYTES
        assert thread.next() == Connected("5", None)
        link.far.send(b"lost")
        reason = thread.next().reason
    assert reason == (
        "lost, 3 times soon after connecting: has the broker a limit that it does not tell (in Mosquitto message_size_limit)? "
        "16384 bytes were on their way in one message; else is our client id, an agent's id, in use by another connection to "
        "this broker?"
    )


def test_a_connection_that_lasted_makes_the_next_wait_short_again(play, monkeypatch):
    monkeypatch.setattr(network, "LASTING_S", 0.0)
    link = PlayedLink(accept=None)
    thread = play(ConnectionRefusedError(), link)
    thread.next()
    thread.next()
    thread._backoff._num_failures = 7
    link.far.send(b"lost")
    thread.next()
    assert thread._backoff._num_failures == 0


def test_it_is_healthy_while_it_comes_round_and_while_it_waits(play, monkeypatch):
    thread = play(PlayedLink(accept=None))
    thread.next()
    assert thread.healthy
    monkeypatch.setattr(network, "STUCK_S", -1.0)
    assert not thread.healthy
    monkeypatch.setattr(network, "STUCK_S", 60.0)
    thread._backoff.next_wait_s = lambda _: 1000.0
    thread._turned_at = time.monotonic() + 1000.0
    assert thread.healthy
    thread.stop()
    assert not thread.healthy


def test_a_thread_that_never_started_stops():
    thread = PlayedThread()
    thread.stop()
    assert not thread.healthy
