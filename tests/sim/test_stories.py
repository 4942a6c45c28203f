"""Stories: one federation each, something that happens to it, and what must come of it."""

from __future__ import annotations

import random

import pytest

from coordinator.driver import SupersededError
from coordinator.round import RoundConfig, draw_order
from midge.transport.base import Connected
from midge.transport.memory import Faults
from midge.wire.messages import CoordinatorStatus, Presence, decode, encode
from tests.sim.agent_process import LIES, Behaviour
from tests.sim.federation import Federation
from tests.sim.learning import chain
from tests.sim.stranger import Stranger
from tests.sim.telling import losing, run, until_training

HONEST = Behaviour()


def test_without_faults_each_agent_trains_once_a_round_and_every_update_counts():
    federation = Federation(1, [HONEST] * 3, rounds=10, is_strict=True, has_faults=False)
    run(federation)
    assert [row["digest"] for row in federation.store.version_rows] == federation.expected_chain
    assert set(federation.auditor.trainings.values()) == {1}
    assert len(federation.auditor.trainings) == 30
    assert federation.store.tally_rows == {("received", ""): 30, ("accepted", ""): 30}


@pytest.mark.fault(5)
def test_every_message_twice_changes_nothing():
    federation = Federation(1, [HONEST] * 3, rounds=5, is_strict=True, faults=Faults(duplication=1.0, reorder_s=0.1))
    run(federation)
    tallies = federation.store.tally_rows
    assert tallies["accepted", ""] == 15
    assert tallies["received", ""] > 15
    assert set(federation.auditor.trainings.values()) == {1}


def test_a_third_of_all_messages_lost_slows_it_down_and_no_more():
    federation = Federation(1, [HONEST] * 3, rounds=5, is_strict=True, faults=Faults(loss=0.33))
    run(federation, limit_s=2000.0)
    assert set(federation.auditor.trainings.values()) == {1}


# What one lost message does.


def test_an_agent_that_missed_the_head_asks_for_it_again():
    federation = Federation(2, [HONEST, HONEST], is_strict=True)
    head = federation.topics.head(federation.config.run_id)
    lost = losing(federation, lambda client, event: event.topic == head and client == "agent-1", times=2)
    run(federation, limit_s=30.0)
    assert len(lost) == 2


@pytest.mark.parametrize("kind", [b"invitation", b"acceptance", b"update", b"credit", b"receipt", b"cancel"])
@pytest.mark.parametrize("times", [1, 3])
def test_any_kind_of_message_may_be_lost_a_few_times(kind, times):
    federation = Federation(3, [HONEST, HONEST], is_strict=True)
    lost = losing(federation, lambda _, event: b'"type":"' + kind in event.payload, times)
    run(federation)
    assert len(lost) == times or kind == b"cancel"
    assert set(federation.auditor.trainings.values()) == {1}


@pytest.mark.fault(6)
@pytest.mark.parametrize("times", [1, 5, 20])
def test_frames_may_be_lost_on_their_way_down_and_up(times):
    federation = Federation(4, [HONEST, HONEST], num_frames=20, is_strict=True)
    lost = losing(federation, lambda _, event: event.payload.startswith(b"MF"), times)
    run(federation)
    assert len(lost) == times


def test_an_agent_whose_birth_was_lost_is_found_when_an_attempt_fails_for_want_of_it():
    liar = Behaviour(lie="layout")
    federation = Federation(5, [HONEST, HONEST, liar], round_config=RoundConfig(minimum=2, quorum=2))
    birth = federation.topics.presence("agent-1")
    lost = losing(federation, lambda _, event: event.topic == birth, times=2)
    run(federation)
    assert len(lost) == 2


def test_an_agent_whose_birth_was_lost_is_found_though_nobody_misses_it():
    slow = Behaviour(training_s=(5.0, 5.0))
    federation = Federation(6, [slow, slow], rounds=100, round_config=RoundConfig(minimum=1, quorum=1))
    birth = federation.topics.presence("agent-1")
    losing(federation, lambda _, event: event.topic == birth, times=1)
    federation.start()
    assert federation.run(
        lambda: federation.auditor.trainings[len(federation.store.version_rows), "agent-1"] > 0, 330.0
    )


# Agents.


@pytest.mark.fault(8, 10, 11, 12)
@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ("nan", "not_finite"),
        ("update_digest", "digest"),
        ("model_digest", "model_digest"),
        ("layout", "layout"),
        ("num_frames", "num_frames"),
        ("no_examples", "num_examples"),
        ("many_examples", "num_examples"),
        ("counters", "counters"),
    ],
)
def test_an_update_that_fails_a_gate_is_rejected_with_its_reason_and_never_counts(lie, reason):
    federation = Federation(7, [HONEST, HONEST, Behaviour(lie=lie)], is_strict=True)
    run(federation)
    tallies = federation.store.tally_rows
    assert tallies["accepted", ""] == 6
    assert tallies["rejected", reason] == 3
    assert not any(agent_id == "agent-2" for _, agent_id in federation.auditor.counted)


@pytest.mark.fault(8)
@pytest.mark.parametrize("lie", ["too_many_examples", "other_update_digest"])
def test_an_update_that_never_becomes_one_costs_a_report_deadline_and_no_more(lie):
    bounds = RoundConfig(minimum=3, quorum=2, report_deadline_s=20.0)
    federation = Federation(8, [HONEST, HONEST, Behaviour(lie=lie)], rounds=2, round_config=bounds, is_strict=True)
    run(federation, limit_s=2 * 20.0 + 10.0)


def test_every_lie_is_in_a_test_above():
    assert set(LIES) == {
        *("nan", "update_digest", "model_digest", "layout", "num_frames", "no_examples", "many_examples", "counters"),
        *("too_many_examples", "other_update_digest"),
    }


def test_an_agent_that_accepts_and_never_reports_does_not_stall_one_attempt_after_another():
    seed = next(seed for seed in range(100) if draw_order(["agent-0", "agent-1", "agent-2"], seed, 1)[0] == "agent-2")
    bounds = RoundConfig(target=2, minimum=2, quorum=2, over_select=1.0, report_deadline_s=20.0)
    silent = Behaviour(training_s=(1e6, 1e6), lie="nan")
    federation = Federation(seed, [HONEST, HONEST, silent], rounds=1, round_config=bounds, is_strict=True)
    federation.start()
    federation.run(lambda: len(federation.coordinator.driver.fleet.agents) == 3, 1.0)
    run(federation, limit_s=30.0)
    assert federation.auditor.trainings[1, "agent-2"] == 1


def test_an_agent_that_refuses_half_of_its_invitations_takes_part_in_the_end():
    federation = Federation(9, [HONEST, Behaviour(refuses=0.5)], rounds=5, is_strict=True)
    run(federation, limit_s=600.0)


def test_an_agent_whose_disk_is_full_refuses_and_takes_part_once_there_is_room():
    federation = Federation(10, [HONEST, Behaviour(disk_fails=1.0)], is_strict=True)
    federation.start()
    federation.run(lambda: False, 5.0)
    assert federation.num_committed == 0
    refused = [what for _, who, what in federation.history if who == "coordinator" and "refused" in str(what)]
    assert "No space left on device" in str(refused[0])
    federation.agents[1].behaviour.disk_fails = 0.0
    run(federation)


@pytest.mark.fault(4)
def test_an_agent_that_lost_its_disk_in_mid_upload_trains_again_and_its_first_update_is_late():
    federation = Federation(21, [HONEST, Behaviour(varies=True)], rounds=1)
    frames = federation.topics.prefix + "/agent/agent-1/update/"
    lost = losing(federation, lambda _, event: event.topic.startswith(frames), times=3)
    federation.start()
    assert federation.run(lambda: federation.store.tally_rows.get(("received", "")) == 2 and len(lost) == 3, 10.0)
    agent = federation.agents[1]
    agent.die(noticed_after_s=45.0)
    agent.journal.wipe()
    federation.restart(agent)
    run(federation)
    assert federation.auditor.trainings[1, "agent-1"] == 2
    tallies = federation.store.tally_rows
    assert (tallies["late", "replaced"], tallies["accepted", ""]) == (1, 2)


def test_an_agent_that_died_while_the_broker_was_down_is_given_up_long_before_the_report_deadline():
    slow = Behaviour(training_s=(5.0, 5.0))
    bounds = RoundConfig(minimum=2, quorum=1, report_deadline_s=6000.0)
    federation = Federation(11, [slow, slow], rounds=1, round_config=bounds)
    until_training(federation, 1)
    federation.broker.stop(forget=True)
    federation.agents[1].die(noticed_after_s=0.0)
    federation.at(federation.now + 2.0, federation.broker.start)
    run(federation, limit_s=federation.now + 70.0)


@pytest.mark.fault(26)
def test_while_agents_train_for_an_hour_next_to_nothing_is_said():
    patient = Behaviour(training_s=(3600.0, 3600.0))
    bounds = RoundConfig(minimum=2, quorum=2, report_deadline_s=1e5)
    federation = Federation(22, [patient, patient], rounds=1, round_config=bounds, is_strict=True)
    until_training(federation, 1)
    federation.run(lambda: False, 100.0)
    before = federation.broker.num_delivered
    federation.run(lambda: False, 3100.0)
    # Ten roll calls: each reaches two agents, who answer; the broker acknowledges all three. And one word of progress each.
    assert federation.broker.num_delivered - before <= 10 * (2 + 2 + 3) + 2
    run(federation, limit_s=4000.0)


# The coordinator and the broker.


@pytest.mark.fault(1, 2)
@pytest.mark.parametrize("forget", [True, False])
def test_a_broker_that_dies_in_every_round_delays_it_and_nothing_is_trained_twice(forget):
    federation = Federation(12, [HONEST, HONEST], rounds=4, is_strict=True)
    for round_num in range(1, 5):
        if round_num == 1:
            until_training(federation, 1)
        else:
            assert federation.run(lambda: federation.num_committed == round_num - 1, 60.0)  # noqa: B023  asked at once
        federation.broker.stop(forget=forget)
        federation.at(federation.now + 0.5, federation.broker.start)
        federation.run(lambda: federation.broker.is_up, 60.0)
    run(federation)
    assert set(federation.auditor.trainings.values()) == {1}


def test_the_late_will_of_an_earlier_coordinator_does_not_hide_the_present_one():
    slow = Behaviour(training_s=(30.0, 30.0))
    federation = Federation(13, [slow, slow], rounds=5, is_strict=True)
    until_training(federation, 1)
    federation.coordinator.die(noticed_after_s=45.0)  # the machine lost its power: its connection is half open
    federation.restart(federation.coordinator)
    federation.run(lambda: False, federation.now + 46.0)
    status = decode(federation.broker.retained[federation.topics.coordinator], CoordinatorStatus)
    assert (status.online, status.epoch) == (True, 2)
    run(federation, limit_s=600.0)


def test_a_coordinator_that_lost_its_state_goes_above_the_epoch_that_the_fleet_has_seen():
    federation = Federation(14, [HONEST, HONEST], is_strict=True)
    for _ in range(3):
        federation.start() if federation.coordinator.generation == 0 else None
        federation.run(lambda: federation.coordinator.driver.run.version is not None, federation.now + 10.0)
        federation.coordinator.die(noticed_after_s=0.0)
        federation.restart(federation.coordinator)
    federation.run(lambda: federation.num_committed == 1, 60.0)
    assert federation.store.epoch == 4
    federation.coordinator.die(noticed_after_s=0.0)
    federation.broker.stop(forget=True)
    federation.broker.start()
    federation.lose_state("sim-2")
    federation.restart(federation.coordinator)
    run(federation)
    assert federation.store.epoch >= 5
    assert [row["digest"] for row in federation.store.version_rows] == federation.expected_chain


@pytest.mark.fault(29)
def test_a_coordinator_steps_down_for_a_newer_one():
    federation = Federation(15, [HONEST, HONEST])
    until_training(federation, 1)
    newer = federation.broker.transport("newer", lambda _: None)
    newer.start()
    status = CoordinatorStatus(online=True, epoch=9, instance="newer", protocol=1, version="")
    newer.publish(federation.topics.coordinator, encode(status), retain=True)
    with pytest.raises(SupersededError, match="epoch 9, this one has 1"):
        federation.run(lambda: False, federation.now + 1.0)


@pytest.mark.fault(2)
def test_a_fleet_of_ghosts_in_an_old_file_of_the_broker_is_not_waited_for():
    federation = Federation(16, [HONEST, HONEST], is_strict=True)
    for number in range(50):
        ghost = Presence(online=True, incarnation="abc", protocol=1, task="simulated")
        federation.broker.retained[federation.topics.presence(f"ghost-{number}")] = encode(ghost)
    federation.is_audited = False  # what the ghosts have retained is more than the auditor allows
    run(federation)
    assert not any(agent_id.startswith("ghost") for _, agent_id in federation.auditor.counted)


def test_an_operator_may_close_a_round_once_quorum_is_there():
    slow = Behaviour(training_s=(1000.0, 1000.0))
    bounds = RoundConfig(minimum=2, quorum=1)
    federation = Federation(17, [HONEST, slow], rounds=1, round_config=bounds)
    federation.start()
    federation.run(lambda: bool(federation.auditor.counted), 10.0)
    federation.coordinator.close_round()
    run(federation, limit_s=20.0)
    assert federation.run(lambda: federation.agents[1].driver.agent.invitation is None, 21.0)


@pytest.mark.fault(34)
def test_stopping_and_starting_the_coordinator_in_every_round_changes_nothing():
    federation = Federation(18, [HONEST, HONEST], rounds=5, is_strict=True)
    federation.start()
    for round_num in range(1, 6):
        federation.run(lambda: federation.auditor.trainings[round_num, "agent-0"] > 0, 60.0)  # noqa: B023
        federation.coordinator.stop()
        federation.run(lambda: False, federation.now + 5.0)
        federation.restart(federation.coordinator)
    run(federation)
    assert set(federation.auditor.trainings.values()) == {1}


@pytest.mark.fault(18, 20)
def test_a_flood_of_garbage_is_counted_and_nothing_else():
    federation = Federation(19, [Behaviour(training_s=(1.0, 2.0))] * 2, is_strict=True)
    federation.start()
    stranger = Stranger(federation, random.Random(19))
    for number in range(3000):
        federation.at(number * 0.002, stranger.speak)
    run(federation)
    assert federation.num_refused > 500
    assert set(federation.coordinator.driver.fleet.agents) <= {"agent-0", "agent-1", "mallory"}


@pytest.mark.fault(17)
def test_two_agents_of_one_name_do_not_bring_a_round_down():
    bounds = RoundConfig(minimum=2, quorum=2, report_deadline_s=60.0)
    federation = Federation(20, [HONEST, HONEST], round_config=bounds, is_strict=True)
    until_training(federation, 1)
    twin = federation.broker.transport("agent-1", lambda _: None)  # takes the connection over, and over
    twin.start()
    federation.run(lambda: False, federation.now + 20.0)
    twin.stop()
    run(federation, limit_s=federation.now + 120.0)


def test_the_chain_can_be_said_without_a_federation():
    one, two = chain(1, 7, ["a", "b"], 2), chain(1, 7, ["b", "a"], 2)
    assert one == two
    assert len(set(one)) == 3
    assert chain(2, 7, ["a", "b"], 2) != one
    assert Connected("5").packet_limit_bytes is None
