"""Exact answers over a real broker: order, duplicates and repetition change no bit. docs/correctness.md lists them all.

That one full-batch step of every agent is one step in one place, and that a federation of one agent is its local training,
is asserted in test_federation.py and test_models.py.
"""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from midge.transport.base import MessageReceived
from midge.wire.topics import Topics
from tests.broker import tasks
from tests.broker.federation import assert_same_model, federated

pytestmark = pytest.mark.usefixtures("unmeasured")

WIDE = "tests.broker.tasks:wide"


def test_e_any_order_of_arrival_gives_the_same_bits(mosquitto, make_federation):
    agents = ["agent-0", "agent-1", "agent-2"]
    digests = set()
    for number, order in enumerate(itertools.islice(itertools.permutations(agents), 1, 6, 3)):
        federation = make_federation(mosquitto.url, f"order-{number}")
        for agent_id in agents:
            federation.hold(agent_id, training=1)
        federation.start_agents(3)
        coordinator = federation.start_coordinator(rounds=1, min_agents=3)
        for agent_id in order:
            federation.wait_for_training(agent_id, 1)
            federation.release(agent_id)
            if agent_id != order[-1]:
                federation.wait_for_update(agent_id, 1)
        assert coordinator.wait() == 0
        federation.end()  # an agent's id is its client id: the next federation's would take over its connections
        digests.add(federation.versions()[1]["digest"])
        expected = federated(tasks.linear, {agent_id: part for part, agent_id in enumerate(agents)}, 1, batch_size=10)
        assert_same_model(federation.model(1), expected[1])
    assert len(digests) == 1


def test_f_messages_that_come_twice_give_the_same_bits(broker, make_federation, peer):
    federation = make_federation(broker.url, task=WIDE)
    topics = Topics(federation.name)
    meddler = peer(broker.url, "meddler")
    agents = ["agent-0", "agent-1"]
    meddler.transport.subscribe([topics.inbox(agent_id) for agent_id in agents])
    meddler.transport.subscribe([topics.outbox(agent_id) for agent_id in agents])
    meddler.transport.subscribe([f"midge/1/{federation.name}/agent/{agent_id}/update/+/+" for agent_id in agents])
    meddler.sync()
    federation.start_agents(2)
    coordinator = federation.start_coordinator(rounds=3, min_agents=2)

    seen: Counter[tuple[str, bytes]] = Counter()
    while coordinator.is_running:
        for event in meddler.events.take(0.2):
            if isinstance(event, MessageReceived):
                message = (event.topic, bytes(event.payload))
                seen[message] += 1
                if seen[message] == 1:
                    meddler.transport.publish(*message)
    assert coordinator.wait() == 0

    frames = [topic for topic, _ in seen if "/update/" in topic]
    assert len(frames) > 2 * 3 * 10, "the frames of two agents in three rounds were to be sent again"
    for round_num, expected in enumerate(federated(tasks.wide, {"agent-0": 0, "agent-1": 1}, 3)):
        assert_same_model(federation.model(round_num), expected)
    tallies = federation.tallies()
    assert tallies["accepted", ""] == 6
    assert tallies["received", ""] == sum(count for key, count in tallies.items() if key[0] != "received")


def test_the_same_seed_gives_the_same_digests(mosquitto, make_federation):
    digests = []
    for name in ("first", "second"):
        federation = make_federation(mosquitto.url, name, task="digits")
        for part in range(2):
            federation.start_agent(f"agent-{part}", "--partition", "shards:2", "--index", str(part), "--of", "2")
        training = {"local_epochs": 2, "batch_size": 10, "learning_rate": 0.1, "momentum": 0.5}
        assert federation.start_coordinator(rounds=2, min_agents=2, seed=3, **training).wait() == 0
        federation.end()
        digests.append([version["digest"] for version in federation.versions()])
    first, second = digests
    assert first == second
    assert len(set(first)) == 3


def test_a_one_full_batch_step_of_digits_by_three_agents_is_one_step_on_all_data(mosquitto, make_federation):
    import torch

    from midge.tasks.base import DataSpec, TrainSpec
    from midge.tasks.digits import DigitsTask

    federation = make_federation(mosquitto.url, task="digits")
    for part in range(3):
        federation.start_agent(f"agent-{part}", "--partition", "shards:2", "--index", str(part), "--of", "3")
    settings = {"local_epochs": 1, "batch_size": 0, "learning_rate": 0.5, "seed": 2}
    assert federation.start_coordinator(rounds=1, min_agents=3, **settings).wait() == 0

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    task = DigitsTask()
    spec = TrainSpec(local_epochs=1, batch_size=0, learning_rate=0.5)
    expected = task.train(task.initial_state(2), task.load_data(DataSpec()), spec, lambda fraction: None).state
    torch.set_num_threads(threads)
    for name, array in federation.model(1).items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-6, err_msg=name)
        assert np.abs(array - federation.model(0)[name]).max() > 1e-4, "the step was to move every tensor"
