"""Optimisers on the server, by hand and against a few lines of NumPy; what agents are told; one agent at a time."""

import numpy as np
import pytest

from coordinator.strategies import (
    Cyclic,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedProx,
    FedYogi,
    Step,
    StrategyError,
    make_strategy,
)
from midge.wire.messages import TrainingConfig

STEP = Step(round_num=1, num_updates=4, num_examples=10)


def f32(*values: float):
    return np.array(values, np.float32)


def initial(strategy, size):
    return [np.full(size, value, np.float32) for value in strategy.initial_state()]


def walk(strategy, start, means):
    """Where rounds with these means lead from `start`, one after the other."""
    state = initial(strategy, len(start))
    models = [start]
    for round_num, mean in enumerate(means, start=1):
        models.append(strategy.apply(models[-1], np.array(mean, np.float64), state, Step(round_num, 4, 10)))
    return [model.tolist() for model in models[1:]], state


# By hand: all numbers are exact in binary.


def test_fedavgm_goes_on_with_half_of_its_last_step():
    # v = 2 - 0 = 2, w = 2;  v = 0.5 * 2 + (3 - 2) = 2, w = 4;  v = 0.5 * 2 + (4 - 4) = 1, w = 5
    models, state = walk(FedAvgM(momentum=0.5), f32(0), [[2], [3], [4]])
    assert models == [[2.0], [4.0], [5.0]]
    assert [vector.tolist() for vector in state] == [[1.0]]


def test_fedavgm_scales_the_step_and_not_what_it_remembers():
    # v = 2, w = 1;  v = 0.5 * 2 + (3 - 1) = 3, w = 1 + 1.5
    models, state = walk(FedAvgM(momentum=0.5, server_learning_rate=0.5), f32(0), [[2], [3]])
    assert models == [[1.0], [2.5]]
    assert state[0].tolist() == [3.0]


def test_without_momentum_fedavgm_is_fedavg():
    mean = np.array([0.25, 3.0])
    expected = FedAvg(server_learning_rate=0.5).apply(f32(1, -4), mean.copy(), (), STEP)
    seen = FedAvgM(momentum=0, server_learning_rate=0.5).apply(f32(1, -4), mean.copy(), [f32(0, 0)], STEP)
    assert seen.tobytes() == expected.tobytes()


def test_fedadagrad_divides_by_the_root_of_all_squares():
    # tau = 1: v = 1 + 0.  Delta 3 makes v = 1 + 9 = 10;  beta1 is 0, so m = 3 and w = 3 / (sqrt(10) + 1) = 0.7207592...
    models, state = walk(FedAdagrad(server_learning_rate=1, tau=1), f32(0, 0), [[3, 0]])
    assert models[0] == pytest.approx([3 / (10**0.5 + 1), 0], rel=1e-7)
    assert [vector.tolist() for vector in state] == [[3.0, 0.0], [10.0, 1.0]]


def test_fedadam_by_hand():
    # m = 0.5 * 0 + 0.5 * 2 = 1;  v = 0.5 * 1 + 0.5 * 4 = 2.5 (v starts at tau^2 = 1);  w = 0 + 0.5 * 1 / (sqrt(2.5) + 1)
    strategy = FedAdam(server_learning_rate=0.5, beta1=0.5, beta2=0.5, tau=1)
    models, state = walk(strategy, f32(0), [[2]])
    assert models[0] == pytest.approx([0.5 / (2.5**0.5 + 1)], rel=1e-7)
    assert [vector.tolist() for vector in state] == [[1.0], [2.5]]


def test_fedyogi_by_hand():
    # delta^2 = 4 is above v = 1: v = 1 + 0.5 * 4 = 3;  a delta of 0.5 is below: v = 1 - 0.5 * 0.25 = 0.875;  1 is equal: v = 1
    strategy = FedYogi(server_learning_rate=0.5, beta1=0.5, beta2=0.5, tau=1)
    models, state = walk(strategy, f32(0, 0, 0), [[2, 0.5, 1]])
    assert state[1].tolist() == [3.0, 0.875, 1.0]
    assert models[0] == pytest.approx([0.5 / (3**0.5 + 1), 0.125 / (0.875**0.5 + 1), 0.25 / 2], rel=1e-7)


def test_a_sum_goes_as_many_times_as_far_as_the_mean():
    # lambda * sum(L_i - G) = 0.1 * 4 * (3 - 1) = 0.8 with the four updates of STEP
    summed = FedAvg(weighting="sum", server_learning_rate=0.1).apply(f32(1), np.array([3.0]), (), STEP)
    assert summed.tolist() == [np.float32(1.8)]


def test_the_agents_own_model_is_the_next_one_when_they_are_visited_in_turn():
    assert Cyclic().apply(f32(1, 2), np.array([0.25, -0.0]), (), STEP).tobytes() == f32(0.25, -0.0).tobytes()
    assert Cyclic().weight(600) == 1.0
    assert Cyclic.in_turn
    assert not FedAvg.in_turn


# Against the paper's Algorithm 2 in plain NumPy, over rounds, with the defaults.


def algorithm_2(name, start, means, *, eta=0.1, beta1=0.9, beta2=0.99, tau=1e-3):
    x, m, v = start.astype(np.float64), np.zeros(len(start)), np.full(len(start), tau**2)
    for mean in means:
        delta = mean - x
        m = beta1 * m + (1 - beta1) * delta
        if name == "fedadagrad":
            v = v + delta**2
        elif name == "fedyogi":
            v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        else:
            v = beta2 * v + (1 - beta2) * delta**2
        x = x + eta * m / (np.sqrt(v) + tau)
    return x


@pytest.mark.parametrize(("name", "beta1"), [("fedadagrad", 0.0), ("fedadam", 0.9), ("fedyogi", 0.9)])
def test_the_defaults_are_the_papers_and_twenty_rounds_follow_its_algorithm(name, beta1):
    rng = np.random.default_rng(3)
    start = rng.standard_normal(50).astype(np.float32)
    targets = start + 0.1 * rng.standard_normal((20, 50))
    models, _ = walk(make_strategy(name), start, targets)
    # Each round rounds the model and what is remembered to float32: a few units of 2**-24 in twenty rounds.
    np.testing.assert_allclose(models[-1], algorithm_2(name, start, targets, beta1=beta1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["fedavgm", "fedadagrad", "fedadam", "fedyogi"])
def test_what_was_remembered_carries_on_when_agents_change_nothing(name):
    strategy = make_strategy(name)
    (first,), state = walk(strategy, f32(1.0), [[1.5]])
    still = strategy.apply(np.array(first, np.float32), np.array(first, np.float64), state, Step(2, 4, 10))
    if name == "fedadagrad":  # it has no momentum
        assert still.tolist() == first
    else:
        assert still[0] > first[0]


def test_fedprox_tells_the_agents_its_mu_and_averages_as_fedavg_does():
    strategy = FedProx(mu=0.5)
    told = strategy.training(TrainingConfig(learning_rate=0.2))
    assert told == TrainingConfig(learning_rate=0.2, proximal_mu=0.5)
    assert FedAvg().training(TrainingConfig()) == TrainingConfig()
    mean = np.array([0.25, 3.0])
    assert (
        strategy.apply(f32(1, 2), mean.copy(), (), STEP).tobytes()
        == FedAvg().apply(f32(1, 2), mean, (), STEP).tobytes()
    )


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("fedavgm", {"momentum": 1}, "fedavgm: momentum is 1: expected a finite number of at least 0 and below 1"),
        ("fedadam", {"beta1": -0.1}, "fedadam: beta1 is -0.1: expected a finite number of at least 0 and below 1"),
        ("fedyogi", {"beta2": "high"}, "fedyogi: beta2 is 'high': expected a finite number of at least 0 and below 1"),
        ("fedadagrad", {"tau": float("nan")}, "fedadagrad: tau is nan: expected a finite number above 0"),
        ("fedprox", {"mu": True}, "fedprox: mu is True: expected a finite number of at least 0 and below 1e+06"),
    ],
)
def test_options_out_of_range_are_refused(name, options, problem):
    with pytest.raises(StrategyError) as caught:
        make_strategy(name, options)
    assert str(caught.value) == problem
