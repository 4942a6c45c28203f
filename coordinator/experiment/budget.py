"""The budget of a comparison: how many gradient steps each way of learning may make, so that none learns more by doing more.

A gradient step is one batch. In a round, agent k makes E passes over its n_k examples in batches of B, so

    s_k = E * ceil(n_k / B)        or E, where one batch holds all (B = 0)

    federated        in each round the sum of s_k over the agents that were counted in it
    centralized      exactly as many, round by round, one after the other on all data
    alone            what that agent makes when it is in every round: s_k
    local-average    every agent alone: the sum of s_k
    fedsgd           as many in all as `federated` has, one an agent and round, each over all its data: hence so many rounds,
                     but for a bound

(A model with batch normalisation takes a last batch of one example together with the one before: its passes may be one
step shorter than is counted here.)
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from coordinator.experiment.baselines import steps_of
from coordinator.experiment.scores import Held


def steps_a_round(held: Mapping[str, Held], local_epochs: int, batch_size: int) -> dict[str, int]:
    """By agent, the gradient steps of one round."""
    return {agent_id: local_epochs * steps_of(one.num_examples, batch_size) for agent_id, one in held.items()}


def counted_steps(num_examples: Mapping[str, int], local_epochs: int, batch_size: int) -> int:
    """The gradient steps behind the updates of one round, given the examples that each was trained on."""
    return sum(local_epochs * steps_of(one, batch_size) for one in num_examples.values())


def expected_steps(steps: Mapping[str, int], rounds: int, agents_a_round: int) -> tuple[int, ...]:
    """The steps of each round where so many of the agents are drawn, on average over the draws.

    Fractions are carried over, so that they add up.
    """
    total, num_agents = sum(steps.values()), len(steps)
    ends = [total * agents_a_round * number // num_agents for number in range(rounds + 1)]
    return tuple(end - start for start, end in itertools.pairwise(ends))


def fedsgd_rounds(steps: Sequence[int], agents_a_round: int, most: int) -> int:
    """As many rounds of one step an agent as make the same number of steps, but at least one and at most `most`."""
    return max(1, min(sum(steps) // agents_a_round, most))
