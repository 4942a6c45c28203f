"""Hundreds of federations, each with faults drawn from its seed: invariants hold at every step, and each recovers (I6).

A failure prints its seed, what happened last, and how to see it again: `pytest tests/sim --seed N`.
"""

from __future__ import annotations

from collections import deque

import pytest

from tests.sim.federation import told
from tests.sim.scenario import FAULTS_S, RECOVERY_S, draw
from tests.sim.seeds import each


@pytest.mark.fault(1, 3, 4, 5, 6, 7, 8, 16)
def test_a_federation_keeps_every_invariant_and_recovers_from_any_faults(seeds, recovery):
    each(seeds, lambda seed: recovers(seed, recovery))


def recovers(seed: int, recovery) -> None:
    scenario = draw(seed)
    federation = scenario.federation
    with told(federation, f"pytest tests/sim --seed {seed}  ({scenario.description})"):
        recovery.tried(1)
        federation.start()
        federation.run(lambda: False, FAULTS_S)
        if federation.is_done:
            return
        before = federation.num_committed
        recovered = federation.run(
            lambda: federation.num_committed > before or federation.is_done, FAULTS_S + RECOVERY_S
        )
        assert recovered, f"I6: {before} versions when faults stopped at {FAULTS_S} s, and none since"
        recovery.took_virtual(federation.now - FAULTS_S)


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
