"""Whole federations of processes over a real broker: what they learn is what plain NumPy computes.

Most tests run twice: over Mosquitto, where everything speaks MQTT 5, and over the embedded broker, which knows 3.1.1 only.
"""

from __future__ import annotations

import re
import urllib.request

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from coordinator.round import draw_order
from midge import PROTOCOL
from midge.eventqueue import EventQueue
from midge.tasks.base import DataSpec
from midge.transport.address import Address
from midge.transport.base import Connected
from midge.transport.mqtt import MqttTransport
from midge.wire.messages import Presence, encode
from midge.wire.topics import Topics
from tests.broker import tasks
from tests.broker.federation import Program, assert_same_model, federated, wait_until

pytestmark = pytest.mark.usefixtures("unmeasured")

WIDE = "tests.broker.tasks:wide"


def own_metrics(agent: Program) -> dict[str, float]:
    """What an agent serves of itself, by name, and by direction where there is one."""
    url = re.findall(r"metrics served .*url=(\S+)", agent.log())[-1]
    with urllib.request.urlopen(url, timeout=10.0) as answer:  # noqa: S310  the agent's own
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    return {f"{sample.name} {sample.labels.get('direction', '')}".strip(): sample.value for sample in samples}


def test_agents_started_before_and_after_the_coordinator_learn_what_numpy_computes(broker, federation):
    early = federation.start_agent("agent-0", part=0, metrics_port=0)
    early.wait_for_log("broker connected")
    coordinator = federation.start_coordinator(rounds=4, min_agents=3, local_epochs=2, batch_size=4, learning_rate=0.05)
    federation.start_agent("agent-1", part=1)
    federation.start_agent("agent-2", part=2)
    assert coordinator.wait() == 0

    version = {"mosquitto": "mqtt=5", "embedded": "mqtt=3.1.1"}[broker.kind]
    assert version in early.log()
    assert version in coordinator.log()
    parts = {"agent-0": 0, "agent-1": 1, "agent-2": 2}
    models = federated(tasks.linear, parts, 4, local_epochs=2, batch_size=4, learning_rate=0.05)
    for round_num, expected in enumerate(models):
        assert_same_model(federation.model(round_num), expected)
    assert [version["num_updates"] for version in federation.versions()] == [0, 3, 3, 3, 3]
    assert [version["num_examples"] for version in federation.versions()[1:]] == [4 + 7 + 10] * 4
    assert federation.tallies() == {("received", ""): 12, ("accepted", ""): 12}
    assert list(federation.state_dir().rglob("*.spool")) == []  # nothing of the last round is left
    samples = own_metrics(early)
    assert samples["midge_agent_training_duration_seconds_count"] == 4
    assert samples["midge_agent_messages_invalid_total"] == 0
    assert min(samples[f"midge_agent_traffic_bytes_total {direction}"] for direction in ("in", "out")) > 4 * 20


def test_a_model_of_many_frames_arrives_whole_both_ways(broker, make_federation):
    federation = make_federation(broker.url, task=WIDE)
    federation.start_agents(2)
    assert federation.start_coordinator(rounds=3, min_agents=2).wait() == 0

    run = federation.runs()[0]
    assert run["num_frames"] == -(-tasks.NUM_WIDE // run["frame_elements"])
    assert run["num_frames"] > 10
    for round_num, expected in enumerate(federated(tasks.wide, {"agent-0": 0, "agent-1": 1}, 3)):
        assert_same_model(federation.model(round_num), expected)
    assert federation.model(3)["steps"] == [6]  # the larger of + 1 and + 2, three times


@pytest.mark.fault(20, 24)
def test_an_agent_that_says_it_can_carry_one_byte_keeps_no_run_from_beginning(mosquitto, make_federation):
    federation = make_federation(mosquitto.url)
    narrow = Presence(online=True, incarnation="1", protocol=PROTOCOL, task="linear", packet_limit_bytes=1)
    queue: EventQueue = EventQueue()
    transport = MqttTransport(Address.parse(mosquitto.url), "narrow", queue)
    transport.start()
    wait_until(lambda: any(isinstance(event, Connected) for event in queue.take(0.1)), "connected")
    transport.publish(Topics(federation.name).presence("narrow"), encode(narrow), retain=True)
    transport.stop()
    federation.start_agents(1)
    assert federation.start_coordinator(rounds=1, min_agents=1).wait() == 0


def test_an_agent_that_joins_late_takes_part_from_the_next_round_on(mosquitto, make_federation):
    federation = make_federation(mosquitto.url)
    federation.hold("agent-0", training=1)
    federation.start_agents(2)
    coordinator = federation.start_coordinator(rounds=2, min_agents=2)
    federation.wait_for_training("agent-0", 1)
    federation.start_agent("late", part=2)
    wait_until(lambda: "late" in federation.agent_views(), "the coordinator has heard of the late agent")
    federation.release("agent-0")
    assert coordinator.wait() == 0
    assert sorted(federation.updates(1)) == ["agent-0", "agent-1"]
    assert sorted(federation.updates(2)) == ["agent-0", "agent-1", "late"]


def test_two_federations_on_one_broker_do_not_see_each_other(mosquitto, make_federation):
    both = [make_federation(mosquitto.url, name) for name in ("left", "right")]
    coordinators = []
    for seed, federation in enumerate(both):
        federation.start_agent(f"{federation.name}-agent", part=seed)
        coordinators.append(federation.start_coordinator(rounds=2, min_agents=1, seed=seed, batch_size=0))
    assert [coordinator.wait() for coordinator in coordinators] == [0, 0]
    for seed, federation in enumerate(both):
        expected = federated(tasks.linear, {f"{federation.name}-agent": seed}, 2, seed=seed)
        assert_same_model(federation.model(2), expected[2])
        with federation.store() as store:
            assert [agent["agent_id"] for agent in store.agents()] == [f"{federation.name}-agent"]


def test_only_agents_with_the_wanted_label_are_invited(mosquitto, make_federation):
    federation = make_federation(mosquitto.url)
    federation.start_agent("in-the-lab", "--label", "site=lab", "--label", "floor=2")
    elsewhere = [federation.start_agent("at-home", "--label", "site=home"), federation.start_agent("anywhere")]
    for agent in elsewhere:
        agent.wait_for_log("broker connected")
    assert federation.start_coordinator(rounds=2, min_agents=1, select="site=lab").wait() == 0
    for round_num in (1, 2):
        assert list(federation.updates(round_num)) == ["in-the-lab"]
    assert federation.trainings("at-home") == federation.trainings("anywhere") == []


def test_a_round_ends_when_as_many_as_wanted_have_reported_and_the_slowest_is_let_go(mosquitto, make_federation):
    federation = make_federation(mosquitto.url)
    agents = [f"agent-{part}" for part in range(4)]
    first, second, slow, spare = draw_order(agents, 7, 2)  # who is invited to round 2 follows from the seed
    early, late = agents[:2], agents[2:]
    for agent_id in early:
        federation.hold(agent_id, training=1)
    programs = {agent_id: federation.start_agent(agent_id) for agent_id in early}
    coordinator = federation.start_coordinator(rounds=2, min_agents=2, cohort=2, over_select=1.5, seed=7)
    for agent_id in early:
        federation.wait_for_training(agent_id, 1)
    programs |= {agent_id: federation.start_agent(agent_id) for agent_id in late}
    wait_until(lambda: len(federation.agent_views()) == 4, "the coordinator has heard of four agents")
    federation.hold(slow, training=2 if slow in early else 1)
    for agent_id in set(early) - {slow}:
        federation.release(agent_id)
    assert coordinator.wait() == 0
    assert sorted(federation.updates(2)) == sorted([first, second])
    assert sorted(federation.attempts(2)[1]) == sorted([first, second, slow])  # 2 wanted, times 1.5
    programs[slow].wait_for_log("update cancelled")
    assert "reason=closed" in programs[slow].log()
    assert spare not in federation.attempts(2)[1]


def test_one_epoch_in_one_batch_is_one_step_on_all_data_in_one_place(mosquitto, make_federation):
    federation = make_federation(mosquitto.url)
    federation.start_agents(3)
    assert federation.start_coordinator(rounds=3, min_agents=3, batch_size=0, learning_rate=0.1).wait() == 0

    data = [tasks.linear.load_data(DataSpec(part=part)) for part in range(3)]
    inputs = np.concatenate([one.inputs for one in data])
    targets = np.concatenate([one.targets for one in data])
    assert len(targets) == 4 + 7 + 10
    weight, bias = (array.astype(np.float64) for array in tasks.linear.initial_state(0).values())
    for round_num in (1, 2, 3):
        residuals = inputs @ weight[0] + bias - targets
        weight = weight - 0.1 * 2 * residuals @ inputs / len(targets)
        bias = bias - 0.1 * 2 * residuals.mean()
        # Each agent rounds its own step to float32, whose unit in the last place is 2**-24 of a value: at most one a round.
        np.testing.assert_allclose(federation.model(round_num)["weight"], weight, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(federation.model(round_num)["bias"], bias, rtol=1e-6, atol=1e-6)
