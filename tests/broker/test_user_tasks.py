"""Tasks as users bring them, over a real broker: a client of Flower's shape, a file on each machine, models that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from midge import __version__
from tests.broker.federation import call, call_json, wait_until

pytestmark = pytest.mark.usefixtures("unmeasured")

FILE = """
import numpy as np
from tests.broker.tasks import LinearTask

class Mine(LinearTask):
    def initial_state(self, seed):
        return {{"weight": np.zeros((1, {width}), np.float32), "bias": np.zeros(1, np.float32)}}
"""


def test_a_client_is_told_of_the_round_and_what_it_measures_can_be_seen(mosquitto, make_federation, tmp_path):
    federation = make_federation(mosquitto.url, task="tests.broker.tasks:echo")
    for agent_id in ("one", "two"):
        federation.start_agent(agent_id)
    config = tmp_path / "run.json"
    training = {"local_epochs": 3, "learning_rate": 0.25, "task_options": {"width": 9}}
    config.write_text(json.dumps({"rounds": 2, "min_agents": 2, **training}))
    program = federation.start_coordinator("serve", "--run", str(config))
    federation.wait_for_round(2)
    assert program.is_running

    model = federation.model(2)
    assert model["parameters.0"].tolist() == [[2.0, 2.0], [2.0, 2.0]]  # 8, halved twice
    assert (model["parameters.1"], model["parameters.1"].dtype) == (2, np.int64)
    run_id = federation.run_id()
    status, body = federation.get(f"/api/v1/runs/{run_id}/updates")
    assert status == 200
    assert [(view["round_num"], view["agent_id"], view["num_examples"]) for view in json.loads(body)] == [
        (1, "one", 5), (1, "two", 5), (2, "one", 5), (2, "two", 5)
    ]  # fmt: skip
    for view in json.loads(body):
        told = {"server_round": view["round_num"], "local_epochs": 3, "learning_rate": 0.25, "width": 9}
        assert view["metrics"] == told
        assert view["evaluation"]["metrics"] == {"told_of_round": view["round_num"], "accuracy": 0.5}
    shown = call_json("coordinator", "models", "--state-dir", str(federation.state_dir()))
    assert shown[0]["training"] is None
    assert shown[1]["training"] == {"server_round": 1, "local_epochs": 3, "learning_rate": 0.25, "width": 9}
    # The version that round 2 was trained from, as the agents found it before.
    assert shown[1]["federated"] == {"num_examples": 14, "loss": 4.0, "metrics": {"told_of_round": 2, "accuracy": 0.5}}


def task_file(directory: Path, width: int) -> str:
    directory.mkdir()
    (directory / "kept_task.py").write_text(FILE.format(width=width))
    return str(directory / "kept_task.py")


def test_a_file_may_lie_elsewhere_on_each_machine_and_a_model_that_does_not_fit_is_named_with_its_tensor(
    mosquitto, make_federation, tmp_path
):
    config = tmp_path / "run.toml"
    config.write_text("rounds = 1\nmin_agents = 2\nquorum = 1\n")
    federation = make_federation(mosquitto.url, task=task_file(tmp_path / "server", 4))
    same, other = task_file(tmp_path / "same", 4), task_file(tmp_path / "other", 5)
    federation.start_agent("same", "--task", same)
    wrong = federation.start_agent("wrong", "--task", other)
    coordinator = federation.start_coordinator("serve", "--run", str(config))
    federation.wait_for_round(1)
    assert list(federation.updates(1)) == ["same"]
    assert federation.runs()[0]["task"] == "kept_task.py"

    versions = f"(Midge {__version__} on the agent, {__version__} on the coordinator)"
    detail = (
        "round 1: this agent's model has weight (1, 5) float32, expected (1, 4) float32: it is not the run's; give agent and "
        f"coordinator the same version of task kept_task.py {versions}"
    )
    view = wait_until(lambda: federation.agent_views().get("wrong"), "the refusal is shown")
    assert (view["activity"], view["detail"]) == ("refused", detail)
    status = call("coordinator", "status", "--state-dir", str(federation.state_dir()), COLUMNS="400").stdout
    assert detail in status
    for program in (coordinator, wrong):
        assert "reason=layout" in program.log()
        assert detail in program.log()
