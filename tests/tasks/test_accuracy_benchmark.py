"""`benchmarks/accuracy.py`: what counts as the reference's number, and that a federated round is the mean of its agents."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from midge.tasks.base import TrainSpec, seed_of
from midge.tasks.digits import DigitsTask

FILE = Path(__file__).parents[2] / "benchmarks" / "accuracy.py"


@pytest.fixture(scope="module")
def accuracy():
    spec = importlib.util.spec_from_file_location("benchmarks_accuracy", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    path = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    del sys.modules[spec.name]


def test_a_number_passes_within_the_95_percent_interval_of_two_means(accuracy):
    row = accuracy.Row("row", "iid", 1, ((1, accuracy.Figure(90.0, 1.0)),))
    # Ours are 91, 92 and 93, deviation 1: t = 2.776 for 4 degrees of freedom, so 2.776 * sqrt(2 / 3) + 100 / 360 = 2.544.
    (check,) = accuracy.checks_of(row, [[0.91], [0.92], [0.93]])
    assert check.passes
    assert "+2.0, may be 2.5" in check.ours
    (check,) = accuracy.checks_of(row, [[0.917], [0.927], [0.937]])
    assert not check.passes


def test_rounds_to_the_goal_are_those_of_the_first_round_that_reaches_it(accuracy):
    row = accuracy.Row("row", "iid", 1, to_goal=(3, 4))
    runs = [[0.1, 0.9, 0.8], [0.1, 0.2, 0.95]]
    (check,) = accuracy.checks_of(row, runs)
    assert check.ours == "2-3, mean 2.5"
    assert check.passes  # 3 - 2 <= 2.5
    (check,) = accuracy.checks_of(row, [[0.1], [0.9]])
    assert math.isinf(float(check.ours.rpartition(" ")[2]))
    assert not check.passes


def test_a_round_of_the_benchmark_is_the_mean_of_what_its_agents_learned(accuracy, tmp_path):
    row = accuracy.Row("row", "shards:2", 1, cohort=3, rounds=1)
    (found,) = accuracy.federate(row, 5, tmp_path)
    task = DigitsTask(split_seed=5)
    start = task.initial_state(5)
    hands = accuracy.deal(task, "shards:2", 5)
    assert all(len(np.unique(labels)) >= 2 for _, labels in hands)
    agents = [f"agent-{number}" for number in range(1, 11)]
    drawn = accuracy.draw_order(agents, 5, 1)[:3]
    total, mean = 0, dict.fromkeys(start, 0.0)
    for agent_id in drawn:
        data = hands[agents.index(agent_id)]
        spec = TrainSpec(local_epochs=1, batch_size=10, learning_rate=0.1, seed=seed_of(5, 1, agent_id))
        trained = task.train(start, data, spec, lambda fraction: None)
        total += trained.num_examples
        mean = {name: mean[name] + trained.num_examples * np.float64(trained.state[name]) for name in start}
    state = {name: (value / total).astype(np.float32) for name, value in mean.items()}
    assert found == task.evaluate(state, task.test_data()).metrics["accuracy"]
