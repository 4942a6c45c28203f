"""What an operator does beside a run: registering what it begins from, and taking home what it came to."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

from midge.tasks.base import DataSpec, State, TrainSpec, seed_of
from tests.broker import tasks
from tests.broker.federation import assert_same_model, call, call_json

TASK = "tests.broker.tasks:linear"


def trained(state: State, rounds: int) -> State:
    """What agent-0 alone makes of a model."""
    data = tasks.linear.load_data(DataSpec(part=0))
    for round_num in range(1, rounds + 1):
        spec = TrainSpec(seed=seed_of(0, round_num, "agent-0"), batch_size=10, learning_rate=0.1)
        state = tasks.linear.train(state, data, spec, lambda fraction: None).state
    return state


def test_a_run_begins_from_a_base_model_that_was_pushed_beside_another_run_and_is_never_pruned(
    mosquitto, make_federation, tmp_path
):
    federation = make_federation(mosquitto.url)
    here = ["--state-dir", str(federation.state_dir())]
    first = federation.start_coordinator(min_agents=1)
    federation.http_url()
    file = tmp_path / "weights.safetensors"
    save_file({"weight": torch.full((1, 4), 0.25), "bias": torch.full((1,), -1.0)}, file)
    pushed = call("coordinator", "models", "push", "mine", "--task", TASK, "--from", str(file), *here)
    assert pushed.returncode == 0, pushed.stderr
    assert "registered mine, " in pushed.stdout
    assert first.is_running
    assert first.stop() == 0

    federation.start_agents(1)
    second = federation.start_coordinator(rounds=5, min_agents=1, keep_models=1, base_model="mine")
    assert second.wait() == 0
    base = {"weight": torch.full((1, 4), 0.25).numpy(), "bias": torch.full((1,), -1.0).numpy()}
    assert_same_model(federation.model(0), base)
    assert_same_model(federation.model(5), trained(base, rounds=5))
    kept = {version["round_num"] for version in call_json("coordinator", "models", *here) if version["is_kept"]}
    assert kept >= {0, 5}
    assert kept & {1} == set()  # pruned, as it is neither recent nor best nor a base
    (base_row,) = json.loads(call("coordinator", "models", "bases", *here, "--json").stdout)
    assert base_row["digest"] == federation.versions()[0]["digest"]

    again = federation.start_coordinator(rounds=5, min_agents=1, base_model="nobody")
    assert again.wait() == 2
    assert "base_model is 'nobody', and no model of that name is registered" in again.log()
    assert "there are mine" in again.log()
    removed = call("coordinator", "models", "remove", "mine", *here)
    assert (removed.returncode, removed.stdout) == (
        0,
        "removed mine; its file stays, as a run's version or another name has it\n",
    )
