"""What an operator does beside a run: registering what it begins from, and taking home what it came to."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from midge.tasks.base import DataSpec, State, TrainSpec, seed_of
from tests.broker import tasks
from tests.broker.federation import assert_same_model, call, call_json, wait_until

pytestmark = pytest.mark.usefixtures("unmeasured")

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


def test_tensorboard_has_every_round_once_though_the_coordinator_was_killed(mosquitto, make_federation, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    federation = make_federation(mosquitto.url)
    federation.hold("agent-0", training=3)
    federation.start_agents(1)
    arguments = ("--tensorboard", str(tmp_path / "board"))
    settings = {"rounds": 5, "min_agents": 1}
    first = federation.start_coordinator(*arguments, **settings)
    federation.wait_for_training("agent-0", 3)
    first.kill()
    federation.release("agent-0")
    assert federation.start_coordinator(*arguments, **settings).wait() == 0
    seen = accumulator.EventAccumulator(str(tmp_path / "board" / federation.run_id()))
    seen.Reload()
    for tag, steps in (
        ("round/updates", [1, 2, 3, 4, 5]),
        ("agent/agent-0/update_norm", [1, 2, 3, 4, 5]),
        ("agent/agent-0/loss", [0, 1, 2, 3, 4]),
        ("federated/loss", [0, 1, 2, 3, 4]),
    ):
        assert [point.step for point in seen.Scalars(tag)] == steps, tag
    losses = [point.value for point in seen.Scalars("federated/loss")]
    expected = [version["federated"].loss for version in federation.versions()[:5]]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def download(federation, path: str, to: Path) -> int:
    """Fetch a model over HTTP with the coordinator's token; the answer's status."""
    said = json.loads((federation.state_dir() / "service.json").read_text())
    headers = {"Authorization": f"Bearer {said['token']}"}
    request = urllib.request.Request(said["url"] + path, headers=headers)  # noqa: S310  ours
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310  ours
            to.write_bytes(answer.read())
            return answer.status
    except urllib.error.HTTPError as error:
        to.write_bytes(error.read())
        return error.code


def test_agents_models_are_kept_where_that_is_wanted_and_all_models_are_taken_home(
    mosquitto, make_federation, tmp_path
):
    config = tmp_path / "experiment.toml"
    config.write_text("rounds = 3\nmin_agents = 2\nkeep_agent_models = true\n")
    federation = make_federation(mosquitto.url, task="tests.broker.tasks:wide")
    federation.start_agents(2)
    program = federation.start_coordinator("serve", "--run", str(config))
    federation.wait_for_round(3)
    path, run_id = tmp_path / "x.safetensors", federation.run_id()

    # "wide": an agent halves the vector and adds its part, and raises the counter by its part + 1.
    base = federation.model(2)
    for part in (0, 1):
        kept = federation.state_dir() / "agent-models" / run_id / f"agent-{part}.3.safetensors"
        wait_until(kept.exists, f"the model of agent-{part} is kept")
        where = ["--to", str(path), "--state-dir", str(federation.state_dir())]
        done = call("coordinator", "export", run_id, "--agent", f"agent-{part}", *where)
        assert f"wrote the model of agent-{part} in round 3 of {run_id} to {path}" in done.stderr
        expected = {
            "vector": base["vector"] * np.float32(0.5) + np.float32(part),
            "steps": base["steps"] + (part + 1),
        }
        exported = load_file(path)
        assert_same_model({name: exported[name] for name in expected}, expected)
        assert download(federation, f"/api/v1/runs/latest/agents/agent-{part}/model", path) == 200
        downloaded = load_file(path)
        assert_same_model({name: downloaded[name] for name in expected}, expected)
    assert len(list(kept.parent.iterdir())) == 2  # the last of each, and no other

    for which, round_num in (("latest", 3), ("1", 1), ("best", 3)):  # without an accuracy the latest counts as the best
        assert download(federation, f"/api/v1/runs/{run_id}/models/{which}", path) == 200
        loaded = load_file(path)
        assert_same_model({name: loaded[name] for name in base}, federation.model(round_num))
    assert federation.get(f"/api/v1/runs/{run_id}/models/best")[0] == 401
    assert download(federation, f"/api/v1/runs/{run_id}/models/9", path) == 404
    assert "expected best, latest, or a round from 0 to 3" in path.read_text()
    assert download(federation, f"/api/v1/runs/{run_id}/agents/agent-7/model", path) == 404
    assert "no model of agent agent-7 is kept" in path.read_text()
    assert "there are those of agent-0, agent-1" in path.read_text()
    assert program.stop() == 0

    # The operator takes the leave back: what was kept goes.
    config.write_text("rounds = 3\nmin_agents = 2\n")
    again = federation.start_coordinator("serve", "--run", str(config))
    federation.http_url()
    wait_until(lambda: not kept.exists(), "the agents' models are gone")
    assert again.stop() == 0
