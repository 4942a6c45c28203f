"""Hundreds of federations, each with faults drawn from its seed: invariants hold at every step, and each recovers (I6).

A failure prints its seed, what happened last, and how to see it again: `pytest tests/sim --seed N`.
"""

from __future__ import annotations

from collections import deque

import pytest

from tests.sim.federation import told
from tests.sim.scenario import FAULTS_S, RECOVERY_S, draw


@pytest.mark.fault(1, 3, 4, 5, 6, 7, 8, 16)
def test_a_federation_keeps_every_invariant_and_recovers_from_any_faults(seed):
    scenario = draw(seed)
    federation = scenario.federation
    with told(federation, f"pytest tests/sim --seed {seed}  ({scenario.description})"):
        federation.start()
        federation.run(lambda: False, FAULTS_S)
        before = federation.num_committed
        recovered = federation.run(
            lambda: federation.num_committed > before or federation.is_done, FAULTS_S + RECOVERY_S
        )
        assert recovered, f"I6: {before} versions when faults stopped at {FAULTS_S} s, and none since"


def test_a_seed_gives_one_history():
    stories = []
    for _ in range(2):
        federation = draw(7).federation
        federation.history = deque()
        federation.start()
        federation.run(lambda: False, FAULTS_S)
        stories.append(federation.story())
    assert stories[0] == stories[1]
    assert stories[0].count("\n") > 100
