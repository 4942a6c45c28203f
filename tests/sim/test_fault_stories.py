"""Faults of the table that want a story of their own: what is held back, repeated or damaged, and fleets that are not there."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from coordinator.round import RoundConfig
from midge.transport.base import MessageReceived
from midge.transport.memory import Faults
from midge.wire.messages import UpdateHeader, decode, encode
from tests.sim.agent_process import Behaviour
from tests.sim.federation import Federation, told
from tests.sim.telling import hearing, losing, repeat, run, until_committed, until_training

HONEST = Behaviour()
SLOW = Behaviour(training_s=(2.0, 2.0))
BOUNDS = {"selection_deadline_s": 10.0, "acceptance_deadline_s": 6.0, "report_deadline_s": 30.0}
TWO = RoundConfig(minimum=2, quorum=2, **BOUNDS)


def all_are_settled(federation: Federation) -> bool:
    """I9, at rest: every header that was received is accepted, rejected, late or a duplicate."""
    tallies = federation.store.tally_rows
    return sum(count for (outcome, _), count in tallies.items() if outcome != "received") == tallies["received", ""]


# Frames (6, 8).


@pytest.mark.fault(6)
def test_frames_in_any_order_twice_and_between_each_other_make_the_same_model():
    faults = Faults(reorder=0.8, reorder_s=3.0, duplication=0.5, delay_s=0.2)
    federation = Federation(30, [HONEST, HONEST], num_frames=20, faults=faults, is_strict=True)
    run(federation, limit_s=300.0)
    assert set(federation.auditor.trainings.values()) == {1}


@pytest.mark.fault(8)
@pytest.mark.parametrize("way", ["/model/", "/update/"], ids=["down", "up"])
@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_frame_is_dropped_and_comes_again(damage, way, recovery):
    federation = Federation(31, [HONEST, HONEST], num_frames=5, is_strict=True)
    send, harmed = federation.broker.send, []

    def send_harmed(client, event, *, faultless=False):
        is_frame = isinstance(event, MessageReceived) and way in event.topic and event.payload.startswith(b"MF")
        if is_frame and len(harmed) < 12:
            harmed.append(event.topic)
            body = event.payload[:-1] if damage == "cut" else event.payload[:-1] + bytes([event.payload[-1] ^ 0x10])
            event = MessageReceived(event.topic, body, retained=event.retained)
        send(client, event, faultless=faultless)

    federation.broker.send = send_harmed
    run(federation)
    assert len(harmed) == 12
    assert federation.num_refused == (12 if way == "/update/" else 0)
    assert set(federation.auditor.trainings.values()) == {1}
    recovery.tried(12)


# What comes from another time (7, 18).


@pytest.mark.fault(7, 18)
def test_everything_that_was_ever_said_may_be_said_again(recovery):
    """In the next round, in every round after it, and to the next epoch of the coordinator."""
    federation = Federation(32, [SLOW, SLOW], rounds=4, round_config=TWO, is_strict=True)
    heard = hearing(federation)
    for round_num in (2, 3, 4):
        until_training(federation, round_num)
        recovery.tried(len(heard))
        repeat(federation, heard)
        if round_num == 3:
            federation.crash(federation.coordinator)
            federation.run(lambda: federation.coordinator.is_up, federation.now + 1.0)
            repeat(federation, heard)
        recovery.took_virtual(until_committed(federation, 60.0))
    run(federation, limit_s=federation.now + 60.0)
    assert set(federation.auditor.trainings.values()) == {1}
    tallies = federation.store.tally_rows
    assert tallies["accepted", ""] == 8
    assert tallies["late", "stale"] > 0
    assert all_are_settled(federation)


@pytest.mark.fault(7)
@pytest.mark.parametrize(
    "changes",
    [{"round_num": 7}, {"epoch": 9}, {"attempt": 5}, {"round_num": 1, "attempt": 2}],
    ids=["a round to come", "another epoch", "an attempt to come", "an old round"],
)
def test_an_update_of_another_time_is_late_and_nothing_else(changes):
    federation = Federation(33, [SLOW, SLOW], rounds=3, round_config=TWO, is_strict=True)
    heard = hearing(federation)
    until_training(federation, 2)
    coordinator = federation.coordinator
    event = next(event for who, event in heard if who is coordinator and b'"type":"update"' in event.payload)
    header = msgspec.structs.replace(decode(event.payload, UpdateHeader), **changes)
    federation.broker.send(coordinator.transport, MessageReceived(event.topic, encode(header)))
    run(federation)
    tallies = federation.store.tally_rows
    assert tallies["late", "stale"] == 1
    assert tallies["accepted", ""] == 6
    assert all_are_settled(federation)


@pytest.mark.fault(7)
def test_an_update_that_was_held_back_for_two_rounds_does_not_count():
    bounds = RoundConfig(minimum=2, quorum=1, **BOUNDS)
    federation = Federation(34, [SLOW, SLOW], rounds=4, round_config=bounds)
    held = losing(federation, lambda _, event: "/agent-1/update/" in event.topic, times=1000)
    federation.start()
    for _ in range(2):
        until_committed(federation, 60.0)  # without agent-1, once the report deadline has passed
    assert held
    for event in held[:]:
        federation.broker.send(federation.coordinator.transport, event)
    run(federation, limit_s=300.0)
    assert not any(agent_id == "agent-1" for round_num, agent_id in federation.auditor.counted if round_num < 3)


# Connections (16).


@pytest.mark.fault(16)
@pytest.mark.parametrize("who", ["coordinator", "agent-0"])
@pytest.mark.parametrize("dead_s", [5.0, 45.0])
def test_a_connection_that_is_dead_unnoticed_costs_time_and_no_training(who, dead_s, recovery):
    federation = Federation(35, [SLOW, SLOW], is_strict=True)
    until_training(federation, 1)
    victim = next(process for process in federation.processes if process.name == who)
    transport = victim.transport
    transport.go_dark()
    federation.at(federation.now + dead_s, transport.cut)
    recovery.took_virtual(until_committed(federation, dead_s + 60.0))
    run(federation, limit_s=federation.now + 60.0)
    assert set(federation.auditor.trainings.values()) == {1}


# Agents that are not there (27).


@pytest.mark.fault(27)
def test_a_quorum_that_is_never_reached_ends_the_run_after_so_many_attempts_and_says_why():
    bounds = RoundConfig(minimum=3, quorum=3, **BOUNDS)
    federation = Federation(36, [HONEST, HONEST, Behaviour(refuses=1.0)], rounds=1, round_config=bounds)
    federation.config = dataclasses.replace(federation.config, max_attempts=5)
    with told(federation, "this test"):
        federation.start()
        assert federation.run(lambda: federation.store.row["state"] == "failed", 5 * 60.0)
    assert [attempt for _, attempt in federation.store.attempt_rows] == [1, 2, 3, 4, 5]
    assert "abandoned 5 times" in federation.store.row["reason"]
    assert federation.now > 1 + 2 + 4 + 8, "it did not pause between attempts"
    assert federation.broker.num_delivered < 500
    assert all_are_settled(federation)


@pytest.mark.fault(27)
def test_while_all_agents_are_gone_for_an_hour_it_says_so_and_next_to_nothing_happens(recovery):
    federation = Federation(37, [SLOW, SLOW], round_config=TWO, is_strict=True)
    until_training(federation, 2)
    for agent in federation.agents:
        agent.die(noticed_after_s=0.0)
    federation.run(lambda: False, federation.now + 60.0)
    before = federation.coordinator.num_operations, len(federation.store.attempt_rows)
    federation.run(lambda: False, federation.now + 3600.0)
    operations = federation.coordinator.num_operations - before[0]
    assert operations < 3600 / 10 * 20, f"{operations} operations in an hour of waiting"
    assert len(federation.store.attempt_rows) - before[1] <= 3600 / 60, "it does not pause between attempts"
    assert "failed; trying again in" in federation.coordinator.driver.run.status()
    for agent in federation.agents:
        federation.restart(agent)
    recovery.took_virtual(until_committed(federation, 60.0))
    run(federation, limit_s=federation.now + 60.0)


@pytest.mark.fault(27)
@pytest.mark.parametrize("quorum", [1, 2])
def test_an_agent_that_comes_and_goes_every_second_does_not_hold_up_those_that_stay(quorum, recovery):
    bounds = RoundConfig(minimum=quorum, quorum=quorum, **BOUNDS)
    federation = Federation(38, [SLOW, SLOW], rounds=30, round_config=bounds)
    federation.restart_after = lambda _: 0.3
    until_training(federation, 1)
    flapping, began = federation.agents[1], federation.now
    for second in range(1, 121):
        federation.at(began + second, lambda: federation.crash(flapping))
    federation.run(lambda: False, began + 120.5)
    if quorum == 1:
        assert federation.num_committed >= 3, "rounds stood still"
    assert len(federation.store.attempt_rows) < 30, "it spins"
    recovery.took_virtual(until_committed(federation, 100.0))
    assert all(attempt < 20 for _, attempt in federation.store.attempt_rows)
