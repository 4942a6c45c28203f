"""From the settings to what the run's machine and the agents are told, by strategy."""

from coordinator import run_settings
from coordinator.config import Settings, strategy_of
from midge.wire.messages import TrainingConfig


def run_config(**settings):
    given = Settings(**settings)
    return run_settings.run_config("r1", given, strategy_of(given))


def test_a_cohort_waits_for_its_least_agents_in_every_round():
    config = run_config(min_agents=3, cohort=5, quorum=4)
    assert (config.round.target, config.round.minimum, config.round.quorum, config.round.over_select) == (5, 4, 4, 1.3)
    assert config.num_to_start == 4
    assert not config.round.in_turn


def test_a_strategy_that_takes_turns_wants_one_agent_a_round_and_waits_for_all_at_the_start():
    config = run_config(strategy="cyclic", min_agents=3, visit_order=("c", "a", "b"), over_select=2.0)
    assert (config.round.target, config.round.minimum, config.round.quorum, config.round.over_select) == (1, 1, 1, 1.0)
    assert (config.round.in_turn, config.round.visit_order) == (True, ("c", "a", "b"))
    assert config.num_to_start == 3


def test_fedprox_tells_the_agents_its_mu_and_the_others_tell_them_none():
    told = run_config(strategy="fedprox", strategy_options={"mu": 0.5}, learning_rate=0.2).training
    assert told == TrainingConfig(batch_size=10, learning_rate=0.2, proximal_mu=0.5)
    assert run_config(strategy="fedadam").training.proximal_mu == 0.0
