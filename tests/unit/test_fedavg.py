"""FedAvg's weights and step, by hand; strategies by name."""

import numpy as np
import pytest

from coordinator.strategies import FedAvg, Step, StrategyError, make_strategy

STEP = Step(1, 2, 10)


def f32(*values: float):
    return np.array(values, np.float32)


def f64(*values: float):
    return np.array(values, np.float64)


def test_the_mean_itself_is_the_next_model_at_server_learning_rate_1():
    # 1 + 2^-30 is no float32: it rounds to 1.
    after = FedAvg().apply(f32(5, 5), f64(0.25, 1 + 2**-30), (), STEP)
    assert after.dtype == np.float32
    assert after.tolist() == [0.25, 1.0]


def test_a_server_learning_rate_scales_the_step_from_global_to_mean():
    # 1 + 0.5 * (3 - 1) = 2;  -4 + 0.5 * (4 - -4) = 0
    assert FedAvg(server_learning_rate=0.5).apply(f32(1, -4), f64(3, 4), (), STEP).tolist() == [2.0, 0.0]


def test_a_server_learning_rate_above_1_goes_beyond_the_mean():
    # 1 + 2 * (3 - 1) = 5
    assert FedAvg(server_learning_rate=2).apply(f32(1), f64(3), (), STEP).tolist() == [5.0]


def test_the_global_block_is_left_alone():
    before = f32(1, -4)
    before.flags.writeable = False
    FedAvg(server_learning_rate=0.5).apply(before, f64(3, 4), (), STEP)
    assert before.tolist() == [1, -4]


def test_an_update_weighs_as_many_examples_as_it_has():
    assert FedAvg().weight(600) == 600.0


def test_uniform_weighting_gives_every_update_the_same_weight():
    uniform = FedAvg(weighting="uniform")
    assert uniform.weight(1) == uniform.weight(600) == 1.0


@pytest.mark.parametrize("rate", [0, -1, float("inf"), float("nan"), True, "fast"])
def test_a_server_learning_rate_that_is_no_positive_number_is_refused(rate):
    with pytest.raises(StrategyError, match=r"server_learning_rate is .*: expected a finite number above 0"):
        FedAvg(server_learning_rate=rate)


def test_an_unknown_weighting_is_refused():
    with pytest.raises(StrategyError, match="weighting is 'votes': expected 'examples', 'uniform' or 'sum'"):
        make_strategy("fedavg", weighting="votes")


def test_a_strategy_is_made_by_name_with_its_options():
    strategy = make_strategy("fedavg", server_learning_rate=0.5, weighting="uniform")
    assert strategy == FedAvg(server_learning_rate=0.5, weighting="uniform")
    assert strategy.name == "fedavg"


def test_an_unknown_strategy_is_refused_with_those_that_exist():
    with pytest.raises(
        StrategyError, match=r"strategy is 'magic': not known\. Known are cyclic, fedadagrad, fedadam, fedavg"
    ):
        make_strategy("magic")


def test_an_unknown_option_is_refused_with_those_that_exist():
    with pytest.raises(StrategyError, match=r"has 'momentum': fedavg has no such option\. It has none"):
        make_strategy("fedavg", {"momentum": 0.9})
