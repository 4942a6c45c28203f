"""Scenario 4: a user's file, started by hand as its page says: three rounds, two agents, in whatever order.

What is run is examples/flower_tutorial, with digits in the place of CIFAR-10, over a real Mosquitto.
"""

from __future__ import annotations

import pytest
import torch

from midge.tasks.base import DataSpec
from midge.tasks.registry import find_task
from tests.broker.federation import ROOT, Federation, assert_same_model, call_json, federated

pytestmark = pytest.mark.usefixtures("unmeasured")

EXAMPLE = ROOT / "examples" / "flower_tutorial"
SLOW_S = 240.0
"""Three processes import torch, perhaps on one core."""


def start_coordinator(federation: Federation):
    return federation.start_coordinator("--rounds", "3", "--min-agents", "2")


def start_agent(federation: Federation, number: int):
    agent = federation.start_agent(
        ("one", "two")[number], "--partition", "iid", "--index", str(number), "--of", "2", data_dir=""
    )
    agent.wait_for_log("broker connected")


def test_an_agent_may_be_started_before_the_coordinator_and_another_after_it(mosquitto, make_federation):
    federation = make_federation(mosquitto.url, task=str(EXAMPLE / "loop_task.py"))
    start_agent(federation, 1)
    coordinator = start_coordinator(federation)
    coordinator.wait_for_log("broker connected")
    start_agent(federation, 0)
    assert coordinator.wait(SLOW_S) == 0, coordinator.log()
    versions = federation.versions()
    assert [version["num_updates"] for version in versions] == [0, 2, 2, 2]
    assert [version["num_examples"] for version in versions[1:]] == [1437] * 3
    losses = [version["central"].loss for version in versions]
    assert losses == sorted(losses, reverse=True), losses  # SGD with 0.001 learns slowly, and steadily
    assert federation.runs()[0]["task"] == "loop_task.py"
    assert federation.run_id().startswith("loop-task-")


def test_the_class_runs_unchanged_and_its_metrics_arrive(mosquitto, make_federation):
    federation = make_federation(mosquitto.url, task=str(EXAMPLE / "client_task.py"))
    for agent_id in ("one", "two"):
        federation.start_agent(agent_id, data_dir="")
    coordinator = start_coordinator(federation)
    assert coordinator.wait(SLOW_S) == 0, coordinator.log()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as an agent's worker has it
    try:
        task = find_task(str(EXAMPLE / "client_task.py"))
        expected = federated(task, {"one": 0, "two": 0}, 3)
    finally:
        torch.set_num_threads(threads)
    assert_same_model(federation.model(3), expected[3])

    shown = call_json("coordinator", "models", "--state-dir", str(federation.state_dir()))
    assert [model["federated"]["num_examples"] for model in shown[:3]] == [2 * 360] * 3
    score = task.evaluate(expected[2], task.load_data(DataSpec()))
    assert shown[2]["federated"]["loss"] == pytest.approx(score.loss, rel=1e-6)
    assert shown[2]["federated"]["metrics"] == pytest.approx(score.metrics)
