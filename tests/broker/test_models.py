"""Real models: one agent's federation is its local training to the bit, and batch normalisation survives averaging."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from midge.tasks.base import DataSpec, TrainSpec, seed_of
from midge.tasks.digits import DigitsTask
from tests.broker import tasks
from tests.broker.federation import assert_same_model, call, federated

pytestmark = pytest.mark.usefixtures("unmeasured")


@pytest.fixture(autouse=True)
def one_thread():
    """As in a worker: a sum over several threads has other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_federation_of_one_agent_is_its_local_training_to_the_bit(mosquitto, make_federation):
    federation = make_federation(mosquitto.url, task="digits")
    training = {"local_epochs": 2, "batch_size": 10, "learning_rate": 0.05, "momentum": 0.9}
    federation.start_agent("solo", "--classes", "1,2,3", "--def-prob", "0.05")
    assert federation.start_coordinator(rounds=3, min_agents=1, seed=5, **training).wait() == 0

    task = DigitsTask()
    data = task.load_data(DataSpec(classes=(1, 2, 3), def_prob=0.05))
    state = task.initial_state(5)
    assert_same_model(federation.model(0), state)
    for round_num in (1, 2, 3):
        spec = TrainSpec(seed=seed_of(5, round_num, "solo"), **training)
        state = task.train(state, data, spec, lambda fraction: None).state
        assert_same_model(federation.model(round_num), state)
    central = federation.versions()[3]["central"]
    assert central.num_examples == 360
    assert central.metrics["accuracy"] == task.evaluate(state, task.test_data()).metrics["accuracy"]
    # Round 0 as the agent found it on its own data, before it trained.
    assert federation.versions()[0]["federated"].num_examples == len(data[1])


def test_batch_normalisation_is_averaged_its_counters_follow_the_largest_and_types_are_kept(
    mosquitto, make_federation, tmp_path
):
    federation = make_federation(mosquitto.url, task="tests.broker.tasks:batch_norm")
    federation.start_agents(2)
    assert federation.start_coordinator(rounds=2, min_agents=2, batch_size=6, learning_rate=0.1).wait() == 0

    task = tasks.batch_norm()
    models = federated(task, {"agent-0": 0, "agent-1": 1}, 2, batch_size=6)
    for round_num, expected in enumerate(models):
        assert_same_model(federation.model(round_num), expected)
    # 12 examples are 2 batches of 6, 24 are 4: the larger count, twice.
    assert [int(federation.model(number)["1.num_batches_tracked"]) for number in (0, 1, 2)] == [0, 4, 8]
    one, other = (
        task.train(
            models[0],
            task.load_data(DataSpec(part=part)),
            TrainSpec(seed=seed_of(0, 1, f"agent-{part}"), batch_size=6),
            lambda fraction: None,
        ).state["1.running_mean"]
        for part in (0, 1)
    )
    assert not np.allclose(one, other)
    np.testing.assert_allclose(federation.model(1)["1.running_mean"], (12 * one + 24 * other) / 36, rtol=1e-6)

    path, state_dir = tmp_path / "model.safetensors", str(federation.state_dir())
    exported = call("coordinator", "export", "latest", "--which", "latest", "--to", str(path), "--state-dir", state_dir)
    assert exported.returncode == 0, exported.stderr
    model, loaded = task.build_model(), load_file(path)
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in loaded.items()} == types
    assert types["1.num_batches_tracked"] == torch.int64
    assert types["scale"] == torch.float64
    model.load_state_dict(loaded, strict=True)
    assert model.state_dict()["1.num_batches_tracked"] == 8
