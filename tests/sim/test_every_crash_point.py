"""A process killed at each of its operations in turn, between any two: nothing is lost, nothing is counted or trained twice."""

from __future__ import annotations

import dataclasses

import pytest

from coordinator.held_out import HeldOutGate
from coordinator.round import RoundConfig
from tests import measured
from tests.sim.agent_process import Behaviour
from tests.sim.federation import Federation, told

ROUNDS = 3
RESTART_S = 3.0
GATED_SEED = 23
"""Of which two candidates are refused, and what is left of each round passes."""
LIMIT_S = 60.0
"""Far below the report deadline of 600 s: what a crash leaves behind is found at once, not when a wait runs out."""


def federation_of(seed: int) -> Federation:
    federation = Federation(
        seed,
        [Behaviour(), Behaviour()],
        rounds=ROUNDS,
        round_config=RoundConfig(minimum=2, quorum=2, report_deadline_s=600.0),
        is_strict=True,
    )
    federation.restart_after = lambda _: federation.rng.uniform(0.1, RESTART_S)
    return federation


def survives(federation: Federation, what: str) -> bool:
    """Run it to its end; false where nothing was killed, since there are not that many operations."""
    with told(federation, what):
        federation.start()
        assert federation.run(lambda: federation.is_done, LIMIT_S), "I6: it did not come to its end"
        assert federation.num_committed == ROUNDS
        assert federation.auditor.num_repeated == 0, "an update that counts already was trained again"
    return federation.num_crashes > 0


@pytest.mark.fault(3)
@pytest.mark.parametrize("first", measured.first(0, [1, 2], num_short=1))
def test_a_coordinator_killed_at_any_operation_goes_on_and_no_agent_trains_twice(first):
    operation = first
    while True:
        federation = federation_of(operation)
        federation.coordinator.light_fuse(operation)
        if not survives(federation, f"the coordinator killed at operation {operation}"):
            break
        assert set(federation.auditor.trainings.values()) == {1}, f"killed at operation {operation}"
        operation += 2
    assert operation > 150


@pytest.mark.no_cover
@pytest.mark.fault(4)
def test_an_agent_killed_at_any_operation_comes_back():
    operation = 1
    while True:
        federation = federation_of(operation)
        federation.agents[0].light_fuse(operation)
        if not survives(federation, f"an agent killed at operation {operation}"):
            break
        operation += 1
    assert operation > 40


def judged(operation: int) -> Federation:
    """A federation whose held-out gate refuses some candidates: where versions grow by more than a fifth of their norm."""
    federation = Federation(
        GATED_SEED,
        [Behaviour(), Behaviour(), Behaviour()],
        rounds=ROUNDS,
        round_config=RoundConfig(minimum=3, quorum=2, report_deadline_s=600.0, is_checked=True),
    )
    federation.config = dataclasses.replace(federation.config, held_out=HeldOutGate(max_loss_ratio=1.2), start_agents=3)
    federation.restart_after = lambda _: federation.rng.uniform(0.1, RESTART_S)
    federation.coordinator.light_fuse(operation)
    return federation


@pytest.mark.long
@pytest.mark.fault(3, 32)
def test_a_coordinator_killed_at_any_operation_judges_candidates_as_if_it_had_not_been(recovery):
    undisturbed = judged(0)
    assert not survives(undisturbed, "nobody killed")
    digests = [row["digest"] for row in undisturbed.store.version_rows]
    left_out = {(strike.round_num, strike.agent_id) for strike in undisturbed.store.strikes("")}
    assert left_out
    operation = 1
    while True:
        federation = judged(operation)
        if not survives(federation, f"the coordinator killed at operation {operation}, with a held-out gate"):
            break
        assert [row["digest"] for row in federation.store.version_rows] == digests, f"I10: killed at {operation}"
        assert {(strike.round_num, strike.agent_id) for strike in federation.store.strikes("")} == left_out
        operation += 1
    recovery.tried(operation - 1)
    assert operation > 150


@pytest.mark.fault(3)
@pytest.mark.parametrize("later", measured.first(0, [2, 8, 1, 3, 5, 13, 21], num_short=2))
def test_a_coordinator_killed_again_while_it_comes_back_goes_on(later):
    for operation in range(3, 200, 7):
        federation = federation_of(operation)
        federation.coordinator.light_fuse(operation)

        def again(process, federation=federation):
            if federation.num_crashes == 1:
                federation.at(federation.now + 0.5, lambda: process.light_fuse(later))
            return 0.5

        federation.restart_after = again
        survives(federation, f"the coordinator killed at operation {operation}, and {later} operations later")


@pytest.mark.fault(3, 4)
@pytest.mark.parametrize("first", measured.first(0, [1, 2], num_short=1))
def test_coordinator_and_agents_killed_together_come_back(first):
    for operation in range(first, 100, 2):
        federation = federation_of(operation)
        federation.coordinator.light_fuse(operation)
        federation.agents[0].light_fuse(1 + operation % 61)
        federation.agents[1].light_fuse(1 + operation % 59)
        survives(federation, f"all killed, the coordinator at operation {operation}")
