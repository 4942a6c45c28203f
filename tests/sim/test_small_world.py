"""Every world of two agents, two rounds, one crash and one message that comes twice ends as the one that nothing befell."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from tests.sim.ledger import Ledger
from tests.sim.small_world import AGENTS, COORDINATOR, ROUNDS, Fate, SmallWorld, doubled, walk

VICTIMS = (COORDINATOR, *AGENTS)
SHORT_S, LONG_S = 0.5, 25.0
"""Back before anyone has missed it, and after its will was published and its peers have asked again."""
NEVER = 1_000_000
PARTS = 4
"""In which it is walked, so that several workers may."""
ALL_ONCE = {(round_num, agent_id): 1 for round_num in range(1, ROUNDS + 1) for agent_id in AGENTS}


def digests(world: SmallWorld) -> list[str]:
    return [version.digest for version in world.ledger.versions]


def undisturbed() -> list[str]:
    world = SmallWorld(Fate())
    world.live()
    return digests(world)


def all_end_alike(worlds: Iterable[SmallWorld], recovery=None) -> int:
    """Assert it of each, and return how many there are."""
    expected, num_worlds, slowest_s = undisturbed(), 0, 0.0
    for world in worlds:
        num_worlds += 1
        assert digests(world) == expected, f"I10: {world.fate}"
        assert world.counted == ALL_ONCE, f"I2, or an accepted update was lost: {world.fate}, {world.counted}"
        for node in world.nodes.values():
            assert node.trained == [1, 2], (
                f"{world.fate}: {node.agent_id} finished the trainings of rounds {node.trained}"
            )
        slowest_s = max(slowest_s, world.recovery_s)
        if recovery is not None and world.recovery_s and not world.fate.doubled:
            recovery.took_virtual(world.recovery_s)
    if recovery is not None:
        recovery.tried(num_worlds)
        if slowest_s:
            recovery.took_virtual(slowest_s)
    return num_worlds


@pytest.mark.long
@pytest.mark.fault(3, 4, 5)
@pytest.mark.parametrize("first", range(1, PARTS + 1))
@pytest.mark.parametrize("victim", VICTIMS)
def test_every_world_of_one_crash_and_one_copy_ends_as_the_undisturbed_one(victim, first, recovery):
    assert all_end_alike(walk(victim, SHORT_S, first=first, step=PARTS), recovery) > 5_000


# Thin slices of the same.


@pytest.mark.no_cover
@pytest.mark.fault(3, 4)
@pytest.mark.parametrize("down_s", [SHORT_S, LONG_S])
@pytest.mark.parametrize("victim", VICTIMS)
def test_every_world_of_one_crash_ends_as_the_undisturbed_one(victim, down_s, recovery):
    assert all_end_alike(walk(victim, down_s, doubles=False), recovery) > 50


@pytest.mark.no_cover
@pytest.mark.fault(5)
def test_every_world_of_one_copy_ends_as_the_undisturbed_one(recovery):
    assert all_end_alike(doubled(Fate(COORDINATOR, NEVER)), recovery) > 300


# What is broken is found.


def test_a_coordinator_that_does_not_sync_before_it_counts_is_found(monkeypatch):
    monkeypatch.setattr(Ledger, "sync", lambda _: None)
    with pytest.raises(AssertionError, match=r"a frame of .* was lost"):
        all_end_alike(walk(COORDINATOR, SHORT_S, doubles=False))
