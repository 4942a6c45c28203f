"""Sending an update: by itself, and against the coordinator's side over a channel that loses, doubles and reorders."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from typing import Any

import pytest

from coordinator.attempt import Address
from coordinator.uplink import TOTAL_CREDIT, Uplink, Verdict
from edge_agent.push import MAX_CREDIT, Push
from midge.wire.frames import Framing, content_tag
from tests import measured
from tests.machines import digest_of_update, facts, header


def push(num_frames: int, credit: int, now: float = 0.0) -> Push:
    return Push(num_frames, credit, random.Random(1), now)


# By itself.


def test_frames_go_out_in_order_within_credit():
    made = push(5, 2)
    assert made.next_frames() == (0, 1)
    assert made.next_frames() == ()
    assert not made.all_sent


def test_whatever_credit_comes_no_more_frames_are_sent_at_once_than_a_coordinator_gives_in_all():
    """They would all wait in memory: an update may be larger than that."""
    made = push(10_000, 2**31 - 1)
    assert len(made.next_frames()) == MAX_CREDIT == TOTAL_CREDIT
    made.acknowledge(((256, 10_000),), 2**31 - 1, 1.0)
    assert len(made.next_frames()) == MAX_CREDIT


def test_without_credit_nothing_goes_out():
    made = push(5, 0)
    assert made.next_frames() == ()
    made.acknowledge(((0, 5),), 3, 1.0)
    assert made.next_frames() == (0, 1, 2)


def test_what_is_sent_and_not_lacked_has_arrived_and_makes_room():
    made = push(5, 2)
    made.next_frames()
    made.acknowledge(((1, 5),), 2, 1.0)  # 0 arrived, 1 is on its way
    assert made.next_frames() == (2,)
    made.acknowledge(((3, 5),), 2, 2.0)
    assert made.next_frames() == (3, 4)
    assert made.all_sent


def test_a_frame_on_its_way_is_not_sent_twice_before_the_agent_has_asked():
    made = push(3, 3)
    made.next_frames()
    made.acknowledge(((0, 3),), 3, 1.0)
    assert made.next_frames() == ()
    made.asked(2.0)
    assert not made.all_sent
    made.acknowledge(((1, 2),), 3, 3.0)
    assert made.next_frames() == (1,)
    assert made.all_sent


def test_silence_makes_it_ask_with_growing_patience():
    made = push(3, 3)
    made.next_frames()
    asked_at, now = [], 0.0
    while now < 150:
        now = made.deadline()
        assert not made.ask(now - 0.001)
        assert made.ask(now)
        asked_at.append(now)
    waits = [later - earlier for earlier, later in itertools.pairwise([0.0, *asked_at])]
    # 2, 4, 8, 16, 30, 30 seconds, each a quarter more or less
    for wait, patience in zip(waits, (2, 4, 8, 16, 30, 30), strict=False):
        assert 0.75 * patience <= wait <= 1.25 * patience


def test_an_answer_with_credit_resets_the_patience_and_one_without_does_not():
    made = push(3, 0)
    for _ in range(5):
        made.ask(made.deadline())
    now = made.deadline()
    made.ask(now)
    made.acknowledge(((0, 3),), 0, now)
    assert made.deadline() - now > 20  # it waits in line with hundreds of others
    made.acknowledge(((0, 3),), 1, now)
    assert made.deadline() - now <= 2.5


def test_less_credit_than_before_stops_it_until_enough_has_arrived():
    made = push(6, 4)
    assert made.next_frames() == (0, 1, 2, 3)
    made.acknowledge(((1, 6),), 2, 1.0)
    assert made.next_frames() == ()
    made.acknowledge(((3, 6),), 2, 2.0)
    assert made.next_frames() == (4,)


def test_ranges_beyond_the_update_are_cut_off():
    made = push(3, 10)
    made.acknowledge(((2, 2**31 - 1), (7, 9), (2, 1)), 10, 1.0)
    assert made.next_frames() == (2,)


def test_the_fraction_sent_goes_from_nothing_to_all():
    made = push(4, 1)
    assert made.fraction == 0.0
    made.next_frames()
    assert made.fraction == 0.25


# Against the coordinator's side.


class Channel:
    """Virtual time and messages that may be lost, doubled and late.

    Args:
        seed: of everything that is random.
        loss: probability that a message is lost.
        doubling: probability that it comes twice.
        spread_s: messages take up to so long, each its own time, so they overtake one another.
    """

    def __init__(self, seed: int, loss: float = 0.0, doubling: float = 0.0, spread_s: float = 0.0) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.loss, self.doubling, self.spread_s = loss, doubling, spread_s
        self.num_sent: Counter[str] = Counter()
        self.lose_once: set[tuple[Any, ...]] = set()
        self._waiting: list[tuple[float, int, Any]] = []
        self._order = itertools.count()

    def send(self, message: tuple[Any, ...]) -> None:
        self.num_sent[message[0]] += 1
        if message in self.lose_once or self.rng.random() < self.loss:
            self.lose_once.discard(message)
            return
        for _ in range(2 if self.rng.random() < self.doubling else 1):
            arrives_at = self.now + 0.01 + self.rng.uniform(0, self.spread_s)
            heapq.heappush(self._waiting, (arrives_at, next(self._order), message))

    def next(self, timer: float) -> tuple[Any, ...] | None:
        """The next message, or None where the timer comes first; time moves there."""
        arrives_at = self._waiting[0][0] if self._waiting else math.inf
        assert min(arrives_at, timer) < math.inf, "nothing will ever happen again"
        if timer < arrives_at:
            self.now = max(self.now, timer)
            return None
        self.now = arrives_at
        return heapq.heappop(self._waiting)[2]


def transmit(channel: Channel, framing: Framing, num_agents: int = 1, limit: int = 200_000) -> dict[str, int]:
    """Send an update from each agent until all are complete; returns how often each agent's frames came too often."""
    num_frames = framing.num_frames
    agents = [f"a{number}" for number in range(num_agents)]
    up = Uplink(framing)
    up.invite(agents)
    headers = {
        agent_id: header(
            agent_id,
            Address("r1", 3, 1, 1),
            num_frames=num_frames,
            update_digest=digest_of_update(agent_id, "", num_frames),
        )
        for agent_id in agents
    }
    pushes = {agent_id: Push(num_frames, up.credit(agent_id), channel.rng, 0.0) for agent_id in agents}
    duplicates: dict[str, int] = dict.fromkeys(agents, 0)

    def send_frames(agent_id: str) -> None:
        for index in pushes[agent_id].next_frames():
            channel.send(("frame", agent_id, index))

    def take(message: tuple[Any, ...]) -> None:
        kind, agent_id, *rest = message
        if kind == "credit":
            if agent_id in pushes:
                pushes[agent_id].acknowledge(*rest, channel.now)
                send_frames(agent_id)
        elif agent_id not in up.transfers:
            pushes.pop(agent_id, None)  # complete: its receipt comes, and is not what is tested here
        elif kind == "header":
            up.offer(headers[agent_id], agent_id, {}, channel.now)
        else:
            take_frame(agent_id, *rest)

    def take_frame(agent_id: str, index: int) -> None:
        start, stop = framing.span(index)
        tag = content_tag(headers[agent_id].update_digest)
        verdict = up.verdict(agent_id, tag, index, stop - start)
        if verdict is Verdict.WANTED:
            up.store(agent_id, index, facts(agent_id, index), channel.now)
            if up.is_complete(agent_id):
                assert up.digest(agent_id) == headers[agent_id].update_digest
                up.end(agent_id, channel.now)
        else:
            duplicates[agent_id] += 1
            up.remind(agent_id, channel.now)

    for agent_id in agents:
        channel.send(("header", agent_id))
        send_frames(agent_id)
    for _ in range(limit):
        if not up.transfers:
            return duplicates
        message = channel.next(min(up.deadline(), *(made.deadline() for made in pushes.values())))
        if message is not None:
            take(message)
        for told in up.acknowledgements(channel.now):
            channel.send(("credit", told.agent_id, told.missing, told.credit))
        for agent_id, made in pushes.items():
            if made.deadline() <= channel.now and made.ask(channel.now):
                channel.send(("header", agent_id))
        up.check()
        assert sum(transfer.credit for transfer in up.transfers.values()) <= TOTAL_CREDIT
    pytest.fail(f"{len(up.transfers)} of {num_agents} updates are incomplete after {limit} steps, {channel.now:.0f} s")


@pytest.mark.parametrize("num_frames", [1, 3, 256, 700])
def test_over_a_good_channel_each_frame_is_sent_once_and_the_header_once(num_frames: int):
    channel = Channel(1)
    assert transmit(channel, Framing(num_frames * 10, 10)) == {"a0": 0}
    assert channel.num_sent["frame"] == num_frames
    assert channel.num_sent["header"] == 1
    assert channel.now < 1.0


@pytest.mark.fault(5, 6)
@pytest.mark.parametrize("seed", range(40))
def test_over_a_channel_that_loses_doubles_and_reorders_every_frame_arrives(seed: int):
    rng = random.Random(seed)
    channel = Channel(
        seed, loss=rng.choice((0.0, 0.1, 0.3)), doubling=rng.choice((0.0, 0.2)), spread_s=rng.choice((0, 3))
    )
    transmit(channel, Framing(rng.choice((1, 2, 7, 60)) * 10, 10))
    assert channel.now < 600


def test_more_gaps_than_a_message_holds_are_filled_all_the_same():
    # Of 250 frames every other one is lost: 125 gaps, of which an acknowledgement names the first 63 and then "the rest".
    channel = Channel(3)
    channel.lose_once = {("frame", "a0", index) for index in range(0, 250, 2)}
    duplicates = transmit(channel, Framing(2500, 10))
    # All are sent, and after the agent has asked once: 63 alone, and the 125 from 125 on, of which 63 are there already.
    assert channel.num_sent["frame"] == 250 + 63 + 125
    assert duplicates["a0"] == 62  # the last of them comes after the last gap is filled
    assert channel.now < 3


def test_a_lossy_channel_costs_little_more_than_what_it_loses():
    channel = Channel(5, loss=0.2)
    duplicates = transmit(channel, Framing(5000, 10))
    # 500 frames, each sent 1 / (1 - 0.2) = 1.25 times on average if nothing is sent in vain
    assert channel.num_sent["frame"] < 500 * 1.25 * 1.5
    assert duplicates["a0"] < 250


@pytest.mark.parametrize("num_agents", measured.first(2, [2, 40, 300]))
def test_agents_that_share_the_credit_all_come_through(num_agents: int):
    channel = Channel(7, loss=0.05, spread_s=0.1)
    transmit(channel, Framing(40, 10), num_agents)
    assert channel.now < 300


@pytest.mark.no_cover
def test_agents_that_wait_in_line_do_not_flood_the_coordinator_with_headers():
    channel = Channel(9)
    transmit(channel, Framing(40, 10), 300)
    assert channel.num_sent["header"] < 3 * 300
