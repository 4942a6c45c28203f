"""`benchmarks/accuracy.py`: what counts as the reference's number, and that a federated round is the mean of its agents."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from midge.tasks.base import TrainSpec, seed_of  # noqa: E402

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


def test_a_number_is_inside_within_the_reference_s_spread_and_our_standard_error(accuracy):
    row = accuracy.Row("row", "iid", 1, ((1, accuracy.Figure(90.0, 1.0)),))
    # Ours are 90.5, 91.5 and 92.5, deviation 1: standard error 1 / sqrt(3) = 0.577, so 1.577 is allowed.
    (check,) = accuracy.checks_of(row, [[0.905], [0.915], [0.925]])
    assert check.inside
    assert (check.ours, check.difference) == ("91.5 ± 1.0", "+1.5, may be 1.6")
    (check,) = accuracy.checks_of(row, [[0.906], [0.916], [0.926]])
    assert check.inside is False
    (check,) = accuracy.checks_of(row, [[0.911]])  # one run tells nothing of its spread
    assert check.inside is False


def test_a_number_without_a_spread_is_shown_and_not_judged(accuracy):
    row = accuracy.Row("row", "iid", 1, ((1, accuracy.Figure(90.0)),))
    (check,) = accuracy.checks_of(row, [[0.5], [0.6]])
    assert check.inside is None
    assert (check.reference, check.difference) == ("90.0", "-35.0")


def test_rounds_to_the_goal_are_those_of_the_first_round_that_reaches_it(accuracy):
    row = accuracy.Row("row", "iid", 1, to_goal=(3, 4))
    runs = [[0.1, 0.9, 0.8], [0.1, 0.2, 0.95]]
    (check,) = accuracy.checks_of(row, runs)
    # 2 and 3: deviation 0.71, standard error 0.5; the mean, 2.5, is 0.5 below the range.
    assert (check.ours, check.difference) == ("2.5 (2-3)", "0.5 outside, may be 1.0")
    assert check.inside
    (check,) = accuracy.checks_of(row, [[0.1, 0.9], [0.1, 0.9]])  # 2 twice is a round below, and half a round may be
    assert check.inside is False
    (check,) = accuracy.checks_of(row, [[0.1], [0.9]])
    assert check.ours == "inf (1-inf)"
    assert check.inside is False


def test_shards_are_of_one_size_and_two_labels_but_for_where_a_shard_ends(accuracy):
    hands = accuracy.deal(accuracy.Digits(split_seed=0), "shards:2", 0)
    assert [len(labels) for _, labels in hands] == [142] * 10  # 2 * (1437 // 20)
    pieces = torch.cat([images for images, _ in hands])
    assert len(torch.unique(pieces, dim=0)) == len(
        pieces
    )  # no two digits of scikit-learn are equal, and none is dealt twice
    assert all((labels.bincount() >= 20).sum() == 2 and len(labels.unique()) <= 4 for _, labels in hands)
    again = accuracy.deal(accuracy.Digits(split_seed=0), "shards:2", 0)
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(hands, again, strict=True))


def test_the_start_is_he_s_for_the_backward_pass(accuracy):
    weights = [array for name, array in accuracy.Digits().initial_state(0).items() if name.endswith("weight")]
    assert [weight.shape for weight in weights] == [(32, 64), (10, 32)]
    # Standard deviations sqrt(2 / 32) and sqrt(2 / 10), each within four of its own standard errors, s / sqrt(2 n).
    assert weights[0].std() == pytest.approx(0.25, abs=4 * 0.25 / 64)
    assert weights[1].std() == pytest.approx(0.447, abs=4 * 0.447 / 25)


def test_a_round_of_the_benchmark_is_the_mean_of_what_its_agents_learned(accuracy, tmp_path):
    row = accuracy.Row("row", "shards:2", 1, cohort=3, rounds=1)
    (found,) = accuracy.federate(row, 5, 5, tmp_path)
    task = accuracy.Digits(split_seed=5)
    start = task.initial_state(5)
    hands = accuracy.deal(task, "shards:2", 5)
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
