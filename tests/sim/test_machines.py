"""The bare machines on hundreds of bad networks, each drawn from its seed: invariants hold at every step, and each recovers.

The second half breaks a machine, or tampers with the world, and has the invariants find it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from coordinator import run_events as ev
from coordinator.attempt import Attempt, Tallies
from coordinator.round import MemberState, Round
from coordinator.uplink import Uplink
from midge.transport.memory import Faults
from tests.sim.harm import plan
from tests.sim.ledger import Ledger
from tests.sim.scenario import LINKS
from tests.sim.seeds import each
from tests.sim.world import World

ROUNDS = 5
BOUND_S = 900.0
"""For five rounds, the faults of the first 200 s included (I6)."""
BAD = Faults(loss=0.1, duplication=0.3, reorder=0.3, delay_s=0.2, reorder_s=5.0)


def draw(seed: int) -> World:
    rng = random.Random(f"{seed}/machines")
    agents = ("a", "b", "c", "d")[: rng.choice((1, 2, 2, 3, 4))]
    world = World(seed, agents, rounds=ROUNDS, frame_elements=rng.choice((1, 4, 10)), faults=rng.choice(LINKS))
    plan(world)
    return world


@pytest.mark.fault(1, 3, 4, 5, 6, 16)
def test_rounds_are_committed_whatever_the_network_and_crashes_do(seeds, recovery):
    each(seeds, commits_all_rounds)
    recovery.tried(len(seeds))


def commits_all_rounds(seed: int) -> None:
    world = draw(seed)
    try:
        world.start()
        world.play(BOUND_S)
    except AssertionError as error:
        raise AssertionError(f"pytest tests/sim --seed {seed}, at {world.network.now:.1f} s: {error}") from error
    assert [version.round_num for version in world.ledger.versions] == list(range(ROUNDS + 1))
    tallies = world.run.tallies
    assert tallies.num_received == tallies.num_settled, "I9"


def test_a_seed_gives_one_history():
    histories = []
    for _ in range(2):
        world = draw(7)
        world.start()
        world.play(BOUND_S)
        histories.append((world.network.now, world.network.num_messages, world.story, world.ledger.versions))
    assert histories[0] == histories[1]
    assert len(histories[0][2]) > ROUNDS


# What is broken is found.


def play_badly(seed: int) -> None:
    world = World(seed, rounds=30, faults=BAD)
    world.start()
    world.play(3000.0)


def count_duplicates_twice(patch: pytest.MonkeyPatch) -> None:
    add = Tallies.add

    def add_twice(self: Tallies, outcome: str, reason: str = "", count: int = 1) -> None:
        add(self, outcome, reason, 2 if outcome == "duplicate" else count)

    patch.setattr(Tallies, "add", add_twice)


def tell_nobody_of_duplicates(patch: pytest.MonkeyPatch) -> None:
    notes = Ledger.notes

    def notes_but_duplicates(self: Ledger, note: ev.Note) -> None:
        if not (isinstance(note, ev.UpdateSettled) and note.outcome == "duplicate"):
            notes(self, note)

    patch.setattr(Ledger, "notes", notes_but_duplicates)


def forget_who_reported(patch: pytest.MonkeyPatch) -> None:
    state_of = Round.state_of

    def forgetful(self: Round, agent_id: str) -> MemberState | None:
        state = state_of(self, agent_id)
        return MemberState.ACCEPTED if state is MemberState.REPORTED else state

    patch.setattr(Round, "state_of", forgetful)


def train_on_another_version(patch: pytest.MonkeyPatch) -> None:
    trained = Ledger.trained
    patch.setattr(Ledger, "trained", lambda self, update, _: trained(self, update, self.versions[0].digest))


def close_below_the_quorum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Round, "_settle_end", lambda self: self._close() if self.reported else [])


def lose_a_version(patch: pytest.MonkeyPatch) -> None:
    save = Ledger.save

    def save_but_one(self: Ledger, saved: ev.Save) -> None:
        if not (isinstance(saved, ev.SaveVersion) and saved.round_num == 3):
            save(self, saved)

    patch.setattr(Ledger, "save", save_but_one)


def save_a_version_twice(patch: pytest.MonkeyPatch) -> None:
    save = Ledger.save

    def save_twice(self: Ledger, saved: ev.Save) -> None:
        save(self, saved)
        if isinstance(saved, ev.SaveVersion):
            save(self, saved)

    patch.setattr(Ledger, "save", save_twice)


def forget_the_epoch(patch: pytest.MonkeyPatch) -> None:
    start = World._start_run

    def start_again(self: World) -> None:
        start(self)
        self.ledger.started(self.run)

    patch.setattr(World, "_start_run", start_again)


def tell_before_it_is_stored(patch: pytest.MonkeyPatch) -> None:
    save = Ledger.save

    def save_no_update(self: Ledger, saved: ev.Save) -> None:
        if not isinstance(saved, ev.SaveUpdate):
            save(self, saved)

    patch.setattr(Ledger, "save", save_no_update)


def lose_credit(patch: pytest.MonkeyPatch) -> None:
    end = Uplink.end

    def end_and_keep(self: Uplink, agent_id: str, now: float) -> None:
        free = self._free
        end(self, agent_id, now)
        self._free = free

    patch.setattr(Uplink, "end", end_and_keep)


def wake_for_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Attempt, "deadline", lambda _: 0.0)


def sleep_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Round, "deadline", lambda _: math.inf)


@pytest.mark.parametrize(
    ("sabotage", "found"),
    [
        (count_duplicates_twice, "I9"),
        (tell_nobody_of_duplicates, "I9"),
        (forget_who_reported, "I2"),
        (train_on_another_version, "I3"),
        (close_below_the_quorum, "I5"),
        (lose_a_version, "I7"),
        (save_a_version_twice, "I1"),
        (forget_the_epoch, "I7"),
        (tell_before_it_is_stored, "not stored"),
        (lose_credit, "credit was lost"),
        (wake_for_nothing, "woken again and again"),
        (sleep_for_ever, "is not committed"),
    ],
)
def test_a_broken_machine_or_world_is_found(monkeypatch, sabotage: Callable[[pytest.MonkeyPatch], None], found: str):
    play_badly(1)
    sabotage(monkeypatch)
    with pytest.raises(AssertionError, match=found):
        play_badly(1)
