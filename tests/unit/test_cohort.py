"""The fleet: what presence messages change, whom a run may invite, and what bounds its memory."""

from __future__ import annotations

import random

import pytest

from coordinator import cohort
from coordinator.cohort import AgentState, Change, Fleet
from midge import PROTOCOL
from tests.machines import TASK, presence

BIRTH = presence("1")
WILL = presence("1", online=False)


def fleet(**births: str) -> Fleet:
    """A fleet of agents that were heard live, by id and incarnation."""
    made = Fleet()
    for agent_id, incarnation in births.items():
        assert made.hear(agent_id, presence(incarnation), retained=False) is Change.CAME
    return made


def state_of(made: Fleet, agent_id: str) -> AgentState:
    return made.agents[agent_id].state


def test_an_agent_that_is_heard_live_comes_and_its_repeated_birth_changes_nothing():
    made = fleet(a="1")
    assert state_of(made, "a") is AgentState.ONLINE
    assert made.hear("a", BIRTH, retained=False) is None


def test_a_retained_birth_may_be_a_ghost_until_the_agent_is_heard():
    made = Fleet()
    assert made.hear("a", BIRTH, retained=True) is None
    assert state_of(made, "a") is AgentState.SILENT
    assert made.available(TASK, {}) == frozenset()
    assert made.hear("a", BIRTH, retained=False) is Change.CAME
    assert made.available(TASK, {}) == {"a"}


def test_a_will_makes_an_agent_leave_once():
    made = fleet(a="1")
    assert made.hear("a", WILL, retained=False) is Change.LEFT
    assert state_of(made, "a") is AgentState.OFFLINE
    assert made.hear("a", WILL, retained=False) is None


def test_the_will_of_an_earlier_start_does_not_take_the_new_one_away():
    made = fleet(a="1")
    assert made.hear("a", presence("2"), retained=False) is Change.RESTARTED
    assert made.hear("a", WILL, retained=False) is None
    assert state_of(made, "a") is AgentState.ONLINE


def test_an_agent_that_was_gone_comes_back():
    made = fleet(a="1")
    made.hear("a", WILL, retained=False)
    assert made.hear("a", BIRTH, retained=False) is Change.CAME


def test_a_retained_birth_of_an_agent_that_is_known_changes_nothing():
    made = fleet(a="1")
    assert made.hear("a", BIRTH, retained=True) is None
    assert state_of(made, "a") is AgentState.ONLINE
    made.hear("a", WILL, retained=False)
    assert made.hear("a", BIRTH, retained=True) is None
    assert state_of(made, "a") is AgentState.OFFLINE


def test_a_retained_birth_of_another_start_means_that_the_one_we_knew_is_gone():
    made = fleet(a="1")
    assert made.hear("a", presence("2"), retained=True) is Change.LEFT
    assert state_of(made, "a") is AgentState.SILENT
    assert made.hear("a", presence("2"), retained=False) is Change.CAME


def test_a_will_of_an_agent_that_was_never_heard_of_is_nothing():
    made = Fleet()
    assert made.hear("a", WILL, retained=True) is None
    assert made.agents == {}


def test_after_our_own_connection_broke_everybody_is_silent_until_heard_again():
    made = fleet(a="1", b="1")
    made.hear("b", WILL, retained=False)
    made.lose_all()
    assert made.available(TASK, {}) == frozenset()
    assert made.count() == {AgentState.ONLINE: 0, AgentState.SILENT: 1, AgentState.OFFLINE: 1}
    assert made.hear("a", BIRTH, retained=True) is None
    assert made.hear("a", BIRTH, retained=False) is Change.CAME


def test_only_agents_of_the_task_the_protocol_and_all_labels_are_available():
    made = Fleet()
    made.hear("right", presence(labels={"site": "north", "arm": "yes"}), retained=False)
    made.hear("other-task", presence(task="mnist", labels={"site": "north"}), retained=False)
    made.hear("old", presence(protocol=PROTOCOL - 1, labels={"site": "north"}), retained=False)
    made.hear("south", presence(labels={"site": "south"}), retained=False)
    made.hear("nowhere", presence(), retained=False)
    assert made.available(TASK, {"site": "north"}) == {"right"}
    assert made.available(TASK, {}) == {"right", "south", "nowhere"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, ""),
        ({"protocol": 9}, f"speaks protocol 9, this coordinator {PROTOCOL}: install the same Midge on both"),
        ({"task": "mnist"}, "was started with --task mnist, the run's task is digits"),
        ({"labels": {"site": "south"}}, "lacks the label site=north"),
    ],
)
def test_what_keeps_an_agent_from_taking_part_is_said(changes: dict[str, object], problem: str):
    made = Fleet()
    made.hear("a", presence(**({"labels": {"site": "north"}} | changes)), retained=False)
    assert made.agents["a"].problem(TASK, {"site": "north"}) == problem


def test_misfits_are_agents_that_are_here_and_were_started_for_another_run():
    made = Fleet()
    made.hear("zed", presence(task="mnist"), retained=False)
    made.hear("old", presence(protocol=PROTOCOL - 1), retained=False)
    made.hear("south", presence(labels={"site": "south"}), retained=False)  # left out by a choice of the operator
    made.hear("away", presence(task="mnist"), retained=True)
    assert list(made.misfits(TASK)) == ["old", "zed"]
    assert made.misfits(TASK)["zed"] == "was started with --task mnist, the run's task is digits"


def test_an_agent_that_is_away_says_so_first():
    made = fleet(a="1")
    made.hear("a", WILL, retained=False)
    assert made.agents["a"].problem("another", {}) == "is offline"


def test_the_smallest_packet_limit_that_anyone_named_counts():
    made = Fleet()
    assert made.packet_limit_bytes() is None
    made.hear("a", presence(packet_limit_bytes=0), retained=False)
    assert made.packet_limit_bytes() is None
    made.hear("b", presence(packet_limit_bytes=2_000_000), retained=False)
    made.hear("c", presence(packet_limit_bytes=131_072), retained=False)
    assert made.packet_limit_bytes() == 131_072
    made.hear("c", presence(online=False), retained=False)
    assert made.packet_limit_bytes() == 2_000_000


def test_agents_that_come_once_and_go_are_forgotten_the_longest_gone_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cohort, "MAX_GONE", 2)
    made = Fleet()
    for agent_id in "abcd":
        made.hear(agent_id, BIRTH, retained=False)
        made.hear(agent_id, WILL, retained=False)
    assert list(made.agents) == ["c", "d"]
    assert made.count() == {AgentState.ONLINE: 0, AgentState.SILENT: 0, AgentState.OFFLINE: 2}
    assert made.hear("a", BIRTH, retained=False) is Change.CAME  # as any other
    assert made.hear("c", BIRTH, retained=False) is Change.CAME
    made.hear("b", BIRTH, retained=False)
    made.hear("b", WILL, retained=False)
    assert list(made.agents) == ["c", "d", "a", "b"]


def test_where_there_is_no_room_a_new_agent_takes_the_place_of_one_that_is_gone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cohort, "MAX_AGENTS", 3)
    made = fleet(a="1", b="1", c="1")
    made.hear("b", WILL, retained=False)
    assert made.hear("d", BIRTH, retained=False) is Change.CAME
    assert made.available(TASK, {}) == {"a", "c", "d"}


def test_counts_and_availability_follow_every_change():
    made = Fleet()
    rng = random.Random(4)
    for _ in range(2000):
        birth = presence(rng.choice("12"), online=rng.random() < 0.6, task=rng.choice((TASK, "other")))
        made.hear(rng.choice("abcdef"), birth, retained=rng.random() < 0.3)
        if rng.random() < 0.02:
            made.lose_all()
        asked = rng.choice((TASK, "other")), rng.choice(({}, {"site": "lab"}, {"site": "moon"}))
        assert made.available(*asked) == {each.agent_id for each in made.agents.values() if not each.problem(*asked)}
        assert made.count() == {
            state: sum(each.state is state for each in made.agents.values()) for state in AgentState
        }


def test_a_flood_of_invented_agents_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cohort, "MAX_AGENTS", 3)
    made = fleet(a="1", b="1", c="1")
    assert made.hear("d", BIRTH, retained=False) is None
    assert len(made.agents) == 3
    assert made.hear("a", presence("2"), retained=False) is Change.RESTARTED
