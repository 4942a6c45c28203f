"""Strategies over a real broker: two workers in turn, a server that remembers, and one whose steps explode."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from coordinator.strategies import FedAdam, Step
from midge.tasks.base import DataSpec, TrainSpec, seed_of
from tests.broker import tasks
from tests.broker.federation import ROOT, assert_same_model, wait_until

pytestmark = pytest.mark.usefixtures("unmeasured")

SCENARIO = ROOT / "examples" / "two_workers"
VISITS = 20


def visits_in_plain_pytorch(order):
    """The loss on the visited rows before each step, the loss on all rows after it, and the model then."""
    inputs = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    targets = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    rows = {"bob": slice(0, 2), "alice": slice(2, 4)}
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for visit in range(VISITS):
        mine = rows[order[visit % 2]]
        optimizer.zero_grad()
        loss = ((model(inputs[mine]) - targets[mine]) ** 2).sum()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            after = ((model(inputs) - targets) ** 2).sum()
        state = {name: tensor.clone().numpy() for name, tensor in model.state_dict().items()}
        seen.append((loss.item(), after.item(), state))
    return seen


@pytest.mark.parametrize("order", [("bob", "alice"), ("alice", "bob")])
def test_a_model_that_visits_two_workers_in_turn_learns_what_plain_pytorch_does(mosquitto, make_federation, order):
    federation = make_federation(mosquitto.url, task=f"{SCENARIO / 'two_workers.py'}:task")
    federation.start_agent("bob", part=0)
    federation.start_agent("alice", part=1)
    # Without an order, it is that of the alphabet.
    settings = {} if order == ("bob", "alice") else {"visit_order": ""}
    assert federation.start_coordinator("run", str(SCENARIO / "midge.toml"), **settings).wait() == 0

    versions = federation.versions()
    expected = visits_in_plain_pytorch(order)
    for round_num, (before, after, state) in enumerate(expected, start=1):
        updates = federation.updates(round_num)
        assert list(updates) == [order[(round_num - 1) % 2]]
        (update,) = updates.values()
        assert np.float32(update.metrics["loss"]) == np.float32(before)
        assert np.float32(versions[round_num]["central"].loss) == np.float32(after)
        assert versions[round_num]["num_updates"] == 1
        assert_same_model(federation.model(round_num), state)
    assert expected[-1][1] < 0.1 * expected[0][1]


def fedadam_in_numpy(num_agents, rounds):
    """The models of rounds 0 to `rounds`: the mean by examples in float64, then the strategy on the whole vector."""
    strategy = FedAdam()
    data = [tasks.linear.load_data(DataSpec(part=part)) for part in range(num_agents)]
    weights = [len(one.targets) / sum(len(each.targets) for each in data) for one in data]
    models = [tasks.linear.initial_state(0)]
    memory = [np.full(5, value, np.float32) for value in strategy.initial_state()]
    for round_num in range(1, rounds + 1):
        mean = np.zeros(5)
        for part, (one, weight) in enumerate(zip(data, weights, strict=True)):
            spec = TrainSpec(batch_size=10, learning_rate=0.05, seed=seed_of(0, round_num, f"agent-{part}"))
            mean = mean + weight * flat(tasks.linear.fit(models[-1], one, spec)).astype(np.float64)
        after = strategy.apply(flat(models[-1]), mean, memory, Step(round_num, num_agents, 0))
        models.append({"weight": after[:4].reshape(1, 4), "bias": after[4:]})
    return models


def flat(state):
    return np.concatenate([state["weight"].ravel(), state["bias"]])


@pytest.mark.long
@pytest.mark.fault(3)
def test_a_server_that_remembers_goes_on_where_it_was_killed(mosquitto, make_federation):
    federation = make_federation(mosquitto.url)
    settings = {"rounds": 6, "min_agents": 2, "strategy": "fedadam", "learning_rate": 0.05}
    federation.hold("agent-1", training=4)
    federation.start_agents(2)
    coordinator = federation.start_coordinator(**settings)
    federation.wait_for_round(3)
    federation.wait_for_update("agent-0", 4)
    coordinator.kill()
    federation.release("agent-1")
    assert federation.start_coordinator(**settings).wait() == 0

    assert len(federation.runs()) == 1
    for round_num, expected in enumerate(fedadam_in_numpy(2, 6)):
        assert flat(federation.model(round_num)).tobytes() == flat(expected).tobytes(), round_num
    states = [version["server_state"] for version in federation.versions()]
    assert states[0] is None
    assert len(set(states[1:])) == 6
    kept = {path.stem for path in (federation.state_dir() / "models").iterdir()}
    assert kept & set(states[1:]) == {states[6]}


def test_a_run_whose_steps_explode_keeps_its_last_good_model_and_says_why_it_fails(mosquitto, make_federation):
    federation = make_federation(mosquitto.url)
    federation.start_agents(2)
    coordinator = federation.start_coordinator(rounds=3, min_agents=2, server_learning_rate=1000, max_attempts=2)
    assert coordinator.wait() != 0
    (run,) = federation.runs()
    assert run["state"] == "failed"
    assert "round 1 was abandoned 2 times, the last time: the step has norm" in run["reason"]
    assert "lower the server's or the agents' learning rate, or raise max_step_ratio" in run["reason"]
    assert len(federation.versions()) == 1
    assert flat(federation.model(0)).tobytes() == flat(tasks.linear.initial_state(0)).tobytes()
    wait_until(lambda: "max_step_ratio" in coordinator.log(), "the log says why")


def test_the_example_in_plain_pytorch_prints_the_same_losses():
    done = subprocess.run([sys.executable, str(SCENARIO / "plain.py")], capture_output=True, text=True, check=True)
    printed = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert printed == [round(after, 6) for _, after, _ in visits_in_plain_pytorch(("bob", "alice"))]
