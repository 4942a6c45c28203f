"""Exact answers through the real spool and aggregation; docs/correctness.md lists them all, with the tests of each.

The model is least squares of two weights, in numbers that float32 holds exactly (small multiples of powers of two), so that
what an agent sends is what it computed and nothing hides in a rounding.
"""

import dataclasses

import numpy as np
import pytest

import coordinator.aggregate
from coordinator.strategies import FedAvg
from tests.unit.test_aggregate import Round, bits

LEARNING_RATE = 0.25
START = np.array([0.5, -1.0])
INPUTS = np.array([[1, 2], [-1, 0.5], [0.5, 0.5], [2, -1], [0.25, 1], [-2, -0.5], [1, 1], [0.5, -2]])
TARGETS = np.array([1.0, -0.5, 2.0, 0.25, -1.5, 1.0, 0.0, 0.5])


def full_batch_step(start, inputs, targets):
    """One step of gradient descent on the mean of squared errors, in float64."""
    residuals = inputs @ start - targets
    return start - LEARNING_RATE * 2 * inputs.T @ residuals / len(targets)


class Recording(FedAvg):
    """FedAvg that keeps the float64 means that it is given."""

    means = []  # noqa: RUF012  one for all: a strategy is frozen

    def apply(self, global_block, mean_block, *rest):
        self.means.append(mean_block.copy())
        return super().apply(global_block, mean_block, *rest)


@pytest.fixture
def start(tmp_path):
    """Begins a round from `START`, or from the vector given."""
    rounds = []

    def begin(values=START):
        directory = tmp_path / str(len(rounds))
        directory.mkdir()
        rounds.append(Round(directory, {"w": np.asarray(values, np.float32)}))
        return rounds[-1]

    yield begin
    for each in rounds:
        each.spool.close()


def train_split(ready, split):
    """Each agent makes one step on its rows of the data; `split` has their numbers, by agent."""
    first = 0
    for agent_id, num_rows in split.items():
        rows = slice(first, first + num_rows)
        step = full_batch_step(START, INPUTS[rows], TARGETS[rows])
        assert (step == step.astype(np.float32)).all(), "these numbers were to be exact in float32"
        ready.receive(agent_id, step, num_rows)
        first += num_rows
    assert first == len(TARGETS)
    return ready


@pytest.mark.parametrize("split", [{"a": 8}, {"a": 4, "b": 4}, {"a": 1, "b": 1, "c": 2, "d": 4}])
def test_a_one_step_on_each_part_is_one_step_on_all_data(start, monkeypatch, split):
    monkeypatch.setattr(Recording, "means", [])
    ready = train_split(start(), split)
    expected = full_batch_step(START, INPUTS, TARGETS)
    with_float32 = ready.result(Recording())
    np.testing.assert_allclose(np.concatenate(Recording.means), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(with_float32, expected, rtol=1e-6, atol=1e-6)


def test_c_splitting_the_data_of_an_agent_in_two_changes_nothing(start):
    whole = train_split(start(), {"a": 2, "b": 4, "c": 2})
    split = train_split(start(), {"a": 2, "b-1": 2, "b-2": 2, "c": 2})
    np.testing.assert_allclose(split.result(), whole.result(), rtol=1e-12, atol=0)


def test_d_weights_scaled_by_a_constant_change_no_bit(start):
    one, other = start(), start()
    for agent_id, number in (("a", 3), ("b", 5), ("c", 7)):
        step = full_batch_step(START, INPUTS[:number], TARGETS[:number])
        one.receive(agent_id, step, number)
        other.receive(agent_id, step, 1000 * number)
    assert bits(one.result()) == bits(other.result())


def test_e_f_any_order_of_arrival_with_duplicates_gives_the_same_bits(start):
    vectors = {agent_id: np.random.default_rng(index).standard_normal(50) for index, agent_id in enumerate("abcde")}
    once = start(np.zeros(50))
    for agent_id, vector in vectors.items():
        once.receive(agent_id, vector, 10)
    again = start(np.zeros(50))
    for agent_id in "ebdacb":
        again.receive(agent_id, vectors[agent_id], 10)
    again.updates = list({update.agent_id: update for update in again.updates}.values())
    assert again.aggregate().digest == once.aggregate().digest


def test_f_a_frame_that_came_twice_is_stored_once(start):
    ready = start(np.zeros(50)).receive("a", np.ones(50))
    size = ready.spool.path.stat().st_size
    ready.receive("a", np.ones(50))
    assert ready.spool.path.stat().st_size == size


def test_g_agents_that_return_what_they_were_given_leave_the_model_as_it_is(start):
    ready = start().receive("a", START, 3).receive("b", START, 4)
    done = ready.aggregate()
    assert (done.digest, done.delta_norm) == (ready.base_digest, 0.0)


def test_the_oracles_would_see_a_wrong_weight(start, monkeypatch):
    # What the tests above rely on: a mean that ignored the numbers of examples would be another.
    split = {"a": 1, "b": 7}
    first, rest = slice(0, 1), slice(1, 8)
    ready = start()
    ready.receive("a", full_batch_step(START, INPUTS[first], TARGETS[first]), split["a"])
    ready.receive("b", full_batch_step(START, INPUTS[rest], TARGETS[rest]), split["b"])
    expected = full_batch_step(START, INPUTS, TARGETS)
    np.testing.assert_allclose(ready.result(), expected, rtol=1e-6, atol=1e-6)
    uniform = dataclasses.replace(FedAvg(), weighting="uniform")
    assert np.abs(ready.result(uniform) - expected).max() > 0.1


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks even of small models."""
    monkeypatch.setattr(coordinator.aggregate, "_BLOCK_ELEMENTS", 3)
