"""One attempt at a round: the table of legal events in full, conversations, what lateness does, and random stories."""

from __future__ import annotations

import copy
import itertools
import math
import random
import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import coordinator.round
from coordinator.round import (
    LEGAL,
    IllegalEventError,
    MemberState,
    Round,
    RoundConfig,
    RoundState,
    draw_order,
    visiting_order,
)
from coordinator.round_events import (
    Abandon,
    AgentAccepted,
    AgentLost,
    AgentRefused,
    AgentReturned,
    Aggregate,
    Aggregated,
    AggregationFailed,
    CandidatePassed,
    CandidateRefused,
    CloseRequested,
    Commit,
    Dismiss,
    Event,
    FleetChanged,
    Invite,
    Release,
    TimePassed,
    UpdateAccepted,
    UpdateRejected,
)

EVENTS: tuple[Event, ...] = (
    FleetChanged(frozenset({"a", "b", "c"})),
    AgentAccepted("a"),
    AgentRefused("a", "battery"),
    AgentLost("a"),
    AgentReturned("a"),
    UpdateAccepted("a"),
    UpdateRejected("a", "norm"),
    Aggregated("d1"),
    AggregationFailed("disk full"),
    CandidatePassed(),
    CandidateRefused("worse", ("a",)),
    CloseRequested(),
    TimePassed(),
)


class Talk:
    """A conversation with a round: after each step the invariants hold, and no deadline is left in the past."""

    def __init__(self, machine: Round | None = None, **bounds: Any) -> None:
        self.round = machine or make(**bounds)
        self.now = self.round.now

    def hear(self, event: Event, after_s: float = 0.0) -> list[Any]:
        self.now += after_s
        commands = self.round.step(event, self.now)
        self.round.check()
        assert self.round.deadline() > self.now, f"woken again and again: {self.round.status(self.now)}"
        return commands

    def wait(self, seconds: float) -> list[tuple[float, Any]]:
        """Let time pass with a timer at each deadline; returns (when, command)."""
        until, commands = self.now + seconds, []
        while self.round.deadline() <= until:
            self.now = self.round.deadline()
            commands += [(self.now, command) for command in self.hear(TimePassed())]
        self.now = until
        return commands + [(self.now, command) for command in self.hear(TimePassed())]

    def fleet(self, *agent_ids: str) -> list[Any]:
        return self.hear(FleetChanged(frozenset(agent_ids)))

    def accept(self, *agent_ids: str) -> None:
        for agent_id in agent_ids:
            assert self.hear(AgentAccepted(agent_id)) == []

    def report(self, *agent_ids: str) -> list[Any]:
        return [command for agent_id in agent_ids for command in self.hear(UpdateAccepted(agent_id))]


def make(*, seed: int = 7, now: float = 100.0, **bounds: Any) -> Round:
    return Round(RoundConfig(**bounds), round_num=1, attempt=1, seed=seed, now=now)


def in_state(state: RoundState) -> Talk:
    """A round of a and b, both needed, brought to `state`."""
    talk = Talk(minimum=2, quorum=2, is_checked=state is RoundState.CHECKING)
    if state is RoundState.SELECTING:
        return talk
    talk.fleet("a", "b")
    if state is RoundState.COLLECTING:
        return talk
    talk.report("a", "b")
    if state in (RoundState.COMMITTED, RoundState.CHECKING):
        talk.hear(Aggregated("d1"))
    if state is RoundState.ABANDONED:
        talk.hear(AggregationFailed("disk full"))
    assert talk.round.state is state
    return talk


def remembered(machine: Round) -> dict[str, Any]:
    """All that a round holds, but for its story."""
    return copy.deepcopy({key: value for key, value in vars(machine).items() if key != "_story"})


# The table.


def table_in_the_docstring() -> dict[tuple[str, str], str]:
    """(event, state) -> legal, ignored or illegal, as the file's opening says."""
    opening = coordinator.round.__doc__ or ""
    (head,) = re.findall(r"^Events +(.*)$", opening, re.MULTILINE)
    rows = re.findall(r"^ +(\w+(?: +(?:legal|ignored|illegal)){6})$", opening, re.MULTILINE)
    states = head.lower().split()
    table = {}
    for row in rows:
        event, *verdicts = row.split()
        table.update({(event, state): verdict for state, verdict in zip(states, verdicts, strict=True)})
    return table


def test_the_file_opens_with_a_verdict_for_each_event_in_each_state():
    expected = set(itertools.product((type(event).__name__ for event in EVENTS), RoundState))
    assert set(table_in_the_docstring()) == expected
    assert len(expected) == 13 * 6


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("state", RoundState)
def test_each_event_in_each_state_is_legal_ignored_or_illegal_as_the_table_says(state: RoundState, event: Event):
    talk = in_state(state)
    verdict = table_in_the_docstring()[type(event).__name__, state]
    before = remembered(talk.round)
    assert (verdict == "legal") == (type(event) in LEGAL[state])
    match verdict:
        case "legal":
            talk.hear(event)
        case "ignored":
            assert talk.hear(event) == []
            assert remembered(talk.round) == before
        case "illegal":
            with pytest.raises(IllegalEventError) as caught:
                talk.round.step(event, talk.now)
            assert remembered(talk.round) == before
            for legal in LEGAL[state]:
                assert legal.__name__ in str(caught.value)
        case _:
            pytest.fail(f"the table says {verdict}")


def test_an_illegal_event_prints_the_story_so_far():
    talk = in_state(RoundState.AGGREGATING)
    with pytest.raises(IllegalEventError, match=r"round 1, attempt 1: got UpdateAccepted.*state aggregating") as caught:
        talk.round.step(UpdateAccepted("a"), talk.now)
    assert "collecting UpdateAccepted(agent_id='b')" in str(caught.value)


def test_the_story_keeps_what_happened_not_how_time_passed_nor_a_fleet_of_thousands():
    talk = in_state(RoundState.COLLECTING)
    talk.fleet(*(f"agent-{number}" for number in range(5000)))
    for _ in range(100):
        talk.hear(TimePassed())
    with pytest.raises(IllegalEventError) as caught:
        talk.round.step(Aggregated("d1"), talk.now)
    assert "5000 agents" in str(caught.value)
    assert "TimePassed" not in str(caught.value).split("The story:")[1]
    assert len(str(caught.value)) < 1000


def test_an_event_of_an_agent_outside_the_cohort_changes_nothing():
    for kind in (AgentAccepted, AgentLost, AgentReturned, UpdateAccepted):
        talk = in_state(RoundState.COLLECTING)
        before = remembered(talk.round)
        assert talk.hear(kind("stranger")) == []
        assert remembered(talk.round) == before


# Selecting.


def test_a_round_waits_for_its_minimum_and_invites_everyone_who_is_there():
    talk = Talk(minimum=3)
    assert talk.fleet("a", "b") == []
    assert "2 of 3" in talk.round.status(talk.now)
    (invite,) = talk.fleet("a", "b", "c")
    assert sorted(invite.agent_ids) == ["a", "b", "c"]
    assert talk.round.state is RoundState.COLLECTING


def test_a_round_that_finds_too_few_agents_is_abandoned_and_says_so():
    talk = Talk(minimum=3, selection_deadline_s=60)
    talk.fleet("a", "b")
    assert talk.round.deadline() == 160.0
    assert talk.wait(60) == [
        (160.0, Abandon("2 of 3 agents were there after 60 s; start more agents or lower min_agents"))
    ]


def test_over_selection_invites_13_for_a_target_of_10():
    talk = Talk(target=10, minimum=10, quorum=8, over_select=1.3)
    (invite,) = talk.fleet(*(f"a{number}" for number in range(30)))
    assert len(invite.agent_ids) == 13  # 10 * 1.3; 3 * 1.3 = 3.9 rounds up to 4
    talk = Talk(target=3, minimum=3, over_select=1.3)
    (invite,) = talk.fleet(*(f"a{number}" for number in range(30)))
    assert len(invite.agent_ids) == 4
    talk = Talk(target=100, minimum=100, over_select=1.1)
    (invite,) = talk.fleet(*(f"a{number}" for number in range(150)))
    assert len(invite.agent_ids) == 110  # though 100 * 1.1 is 110.00000000000001 in floating point


def test_over_selection_takes_what_the_fleet_has():
    talk = Talk(target=10, minimum=5, quorum=5, over_select=1.3)
    (invite,) = talk.fleet(*(f"a{number}" for number in range(7)))
    assert len(invite.agent_ids) == 7


def test_the_first_of_the_draw_are_invited():
    agents = [f"a{number}" for number in range(30)]
    talk = Talk(target=10, minimum=10, seed=5)
    (invite,) = talk.fleet(*agents)
    assert list(invite.agent_ids) == draw_order(agents, 5, 1)[:13]


def test_agents_that_failed_earlier_attempts_are_drawn_last():
    agents = [f"a{number}" for number in range(6)]
    order = draw_order(agents, 7, 1)
    talk = Talk(target=3, minimum=3, quorum=3, over_select=1.0)
    talk.round.failures = {order[0]: 2, order[1]: 1}
    (invite,) = talk.fleet(*agents)
    assert list(invite.agent_ids) == order[2:5]
    for agent_id, replacement in zip(order[2:5], (order[5], order[1], order[0]), strict=True):
        assert talk.hear(AgentRefused(agent_id, "battery")) == [Invite((replacement,))]


# The draw.


def test_a_draw_is_the_same_whoever_else_is_there_and_in_whatever_order():
    agents = [f"a{number}" for number in range(20)]
    order = draw_order(agents, 5, 3)
    assert draw_order(reversed(agents), 5, 3) == order
    assert draw_order(agents[:10], 5, 3) == [agent for agent in order if agent in agents[:10]]


def test_draws_of_other_rounds_and_seeds_differ():
    agents = [f"a{number}" for number in range(20)]
    draws = {tuple(draw_order(agents, seed, round_num)) for seed in range(5) for round_num in range(5)}
    assert len(draws) == 25


def test_every_agent_comes_first_about_equally_often():
    firsts = Counter(draw_order(["a", "b", "c", "d"], 1, round_num)[0] for round_num in range(600))
    # 600 draws of probability 1/4: mean 150, standard deviation sqrt(600 * 1/4 * 3/4) = 10.6; four of them are 42.
    assert all(108 <= firsts[agent_id] <= 192 for agent_id in "abcd")


# In turn.


def in_turn(round_num: int = 1, order: tuple[str, ...] = ()) -> Talk:
    bounds = RoundConfig(target=1, minimum=1, quorum=1, over_select=1.0, in_turn=True, visit_order=order)
    return Talk(Round(bounds, round_num=round_num, attempt=1, seed=7, now=100.0))


def test_rounds_visit_one_agent_each_in_the_order_of_their_names():
    for round_num, agent_id in enumerate(["a", "b", "c", "a", "b"], start=1):
        talk = in_turn(round_num)
        assert talk.fleet("c", "a", "b") == [Invite((agent_id,))]
        assert talk.report(agent_id) == [Aggregate((agent_id,))]


def test_a_given_order_decides_whose_turn_it_is():
    for round_num, agent_id in enumerate(["bob", "alice", "bob", "alice"], start=1):
        assert in_turn(round_num, ("bob", "alice")).fleet("alice", "bob") == [Invite((agent_id,))]


def test_who_is_not_there_is_passed_over_and_has_the_next_turn_of_its_place():
    order = ("a", "b", "c")
    assert in_turn(2, order).fleet("a", "c") == [Invite(("c",))]
    assert in_turn(3, order).fleet("a", "b") == [Invite(("a",))]
    assert in_turn(5, order).fleet("a", "b", "c") == [Invite(("b",))]


def test_when_the_visited_agent_is_lost_or_refuses_the_one_after_it_takes_its_turn():
    talk = in_turn(2, ("a", "b", "c", "d"))
    talk.fleet("a", "b", "c", "d")
    assert talk.hear(AgentLost("b")) == [Release(("b",)), Invite(("c",))]
    assert talk.hear(AgentRefused("c", "battery")) == [Invite(("d",))]
    by_name = in_turn(2)
    by_name.fleet("a", "b", "c")
    assert by_name.hear(AgentRefused("b", "battery")) == [Invite(("c",))]


def test_an_agent_that_failed_an_earlier_attempt_is_visited_after_the_others():
    talk = in_turn(1)
    talk.round.failures = {"a": 1}
    assert talk.fleet("a", "b", "c") == [Invite(("b",))]


def test_a_visiting_order_turns_by_one_place_a_round():
    assert visiting_order(["b", "a", "c"], (), 1) == ["a", "b", "c"]
    assert visiting_order(["b", "a", "c"], (), 3) == ["c", "a", "b"]
    assert visiting_order(["b", "a", "c"], ("c", "b", "x"), 2) == ["b", "c"]
    assert visiting_order(["b", "a"], ("c", "x"), 5) == []
    assert visiting_order([], (), 5) == []


# Collecting.


def test_a_round_ends_when_all_that_were_invited_have_reported():
    talk = Talk(minimum=3, quorum=2)
    talk.fleet("a", "b", "c")
    talk.accept("a", "b", "c")
    assert talk.report("c", "a") == []
    assert talk.report("b") == [Aggregate(("a", "b", "c"))]
    assert talk.hear(Aggregated("d1")) == [Commit("d1")]
    assert "3 updates" in talk.round.status(talk.now)


def test_a_round_with_a_target_ends_at_the_target_and_dismisses_the_rest():
    talk = Talk(target=2, minimum=2, quorum=2, over_select=2.0)
    (invite,) = talk.fleet("a", "b", "c", "d")
    first, second, *rest = invite.agent_ids
    talk.report(first)
    assert talk.report(second) == [Dismiss(tuple(sorted(rest))), Aggregate(tuple(sorted((first, second))))]


def test_a_target_below_the_quorum_never_closes_a_round_without_its_quorum():
    talk = Talk(target=1, minimum=2, quorum=2, over_select=2.0)
    talk.fleet("a", "b")
    assert talk.report("a") == []
    assert talk.report("b") == [Aggregate(("a", "b"))]


def test_the_next_of_the_draw_replaces_an_agent_that_refuses():
    talk = Talk(target=2, minimum=2, quorum=2, over_select=1.0)
    (invite,) = talk.fleet("a", "b", "c", "d")
    order = draw_order("abcd", 7, 1)
    assert list(invite.agent_ids) == order[:2]
    assert talk.hear(AgentRefused(order[0], "battery")) == [Invite((order[2],))]
    assert talk.hear(UpdateRejected(order[1], "norm")) == [Invite((order[3],))]
    assert talk.hear(AgentRefused(order[2], "hours")) == []  # nobody is left


def test_an_agent_that_comes_later_replaces_one_for_which_nobody_was_there():
    talk = Talk(target=2, minimum=2, quorum=2, over_select=1.0)
    talk.fleet("a", "b")
    assert talk.hear(AgentRefused("a", "battery")) == []
    assert talk.fleet("a", "b", "c") == [Invite(("c",))]
    assert talk.fleet("a", "b", "c", "d") == []


def test_a_round_of_everyone_replaces_nobody():
    talk = Talk(target=0, minimum=2)
    talk.fleet("a", "b")
    assert talk.fleet("a", "b", "c") == []
    assert talk.hear(AgentRefused("a", "battery")) == []


def test_silent_agents_are_invited_again_at_2_6_and_14_seconds_and_lost_at_20():
    talk = Talk(minimum=2, acceptance_deadline_s=20)
    talk.fleet("a", "b")
    talk.accept("b")
    assert talk.wait(30) == [
        (102.0, Invite(("a",))),
        (106.0, Invite(("a",))),
        (114.0, Invite(("a",))),
        (120.0, Release(("a",))),
    ]
    assert talk.round.members == {"a": MemberState.LOST, "b": MemberState.ACCEPTED}


def test_an_agent_that_is_lost_is_replaced_and_what_was_kept_for_it_is_released():
    talk = Talk(target=1, minimum=1, over_select=1.0)
    (invite,) = talk.fleet("a", "b")
    (first,) = invite.agent_ids
    (other,) = {"a", "b"} - {first}
    assert talk.hear(AgentLost(first)) == [Release((first,)), Invite((other,))]


def test_an_acceptance_stops_the_repetition_of_an_invitation():
    talk = Talk(minimum=1, report_deadline_s=600)
    talk.fleet("a")
    talk.accept("a")
    assert talk.round.deadline() == 700.0


def test_a_lost_agent_that_returns_is_invited_again_and_has_its_full_time():
    talk = Talk(minimum=2, acceptance_deadline_s=20)
    talk.fleet("a", "b")
    talk.accept("a", "b")
    talk.hear(AgentLost("a"), after_s=50)
    assert talk.round.members["a"] is MemberState.LOST
    assert talk.hear(AgentReturned("a"), after_s=10) == [Invite(("a",))]
    assert talk.wait(19.9)[-1][1] == Invite(("a",))
    assert talk.round.members["a"] is MemberState.INVITED
    talk.wait(0.2)
    assert talk.round.members["a"] is MemberState.LOST


def test_a_lost_agent_that_answers_after_all_is_waited_for():
    talk = Talk(minimum=2, quorum=2)
    talk.fleet("a", "b")
    talk.hear(AgentLost("a"))
    talk.accept("a")
    assert talk.round.awaited == ("a", "b")
    *_, abandon = talk.hear(CloseRequested())
    assert abandon.reason.endswith("a took the invitation, b invited")


def test_an_update_of_a_lost_agent_counts():
    talk = Talk(minimum=2, quorum=2)
    talk.fleet("a", "b")
    talk.hear(AgentLost("a"))
    assert talk.round.is_open_to("a")
    talk.report("a")
    assert talk.report("b") == [Aggregate(("a", "b"))]


def test_an_agent_that_restarts_while_it_works_is_invited_again():
    talk = Talk(minimum=2)
    talk.fleet("a", "b")
    talk.accept("a")
    assert talk.hear(AgentReturned("a")) == [Invite(("a",))]
    assert talk.round.members["a"] is MemberState.INVITED


def test_who_refused_was_rejected_or_reported_is_not_invited_again():
    talk = Talk(minimum=4)
    talk.fleet("a", "b", "c", "d")
    talk.hear(AgentRefused("a", "battery"))
    talk.hear(UpdateRejected("b", "norm"))
    talk.report("c")
    for agent_id in "abc":
        assert not talk.round.is_open_to(agent_id)
        for event in (AgentReturned(agent_id), AgentAccepted(agent_id), AgentLost(agent_id)):
            before = talk.round.members
            assert talk.hear(event) == []
            assert talk.round.members == before


def test_an_agent_counts_once_however_often_it_reports():
    talk = Talk(minimum=2, quorum=2)
    talk.fleet("a", "b")
    talk.report("a", "a", "a")
    assert talk.round.reported == ("a",)
    assert talk.round.state is RoundState.COLLECTING


# Ends.


def test_the_deadline_closes_a_round_with_a_quorum_and_dismisses_who_is_late():
    talk = Talk(minimum=3, quorum=2, report_deadline_s=600)
    talk.fleet("a", "b", "c")
    talk.accept("a", "b", "c")
    talk.report("a", "b")
    assert talk.wait(600) == [(700.0, Dismiss(("c",))), (700.0, Aggregate(("a", "b")))]


def test_the_deadline_abandons_a_round_without_a_quorum_and_names_who_is_missing():
    talk = Talk(minimum=4, quorum=3, report_deadline_s=600)
    talk.fleet("a", "b", "c", "d")
    talk.accept("a", "b", "c", "d")
    talk.hear(AgentRefused("b", "battery"))
    talk.hear(AgentLost("c"))
    talk.report("a")
    *_, (when, abandon) = talk.wait(600)
    assert when == 700.0
    why = "b refused (battery), c lost (offline), d took the invitation"
    assert abandon == Abandon(f"1 update, quorum is 3, after 600 s: {why}")
    assert talk.round.reason == abandon.reason
    assert talk.round.status(talk.now) == f"abandoned: {abandon.reason}"


def test_a_round_with_a_quorum_does_not_wait_for_lost_agents():
    talk = Talk(minimum=2, quorum=1)
    talk.fleet("a", "b")
    talk.report("a")
    assert talk.hear(AgentLost("b")) == [Release(("b",)), Dismiss(("b",)), Aggregate(("a",))]


def test_a_round_without_a_quorum_gives_lost_agents_30_seconds_to_come_back():
    talk = Talk(minimum=2, quorum=2)
    talk.fleet("a", "b")
    talk.report("a")
    talk.hear(AgentLost("b"))
    assert talk.round.deadline() == 130.0
    talk.wait(29)
    assert talk.hear(AgentReturned("b")) == [Invite(("b",))]
    talk.accept("b")
    talk.wait(100)
    assert talk.report("b") == [Aggregate(("a", "b"))]


def test_a_round_whose_lost_agents_stay_away_is_abandoned_after_30_seconds():
    talk = Talk(minimum=2, quorum=2)
    talk.fleet("a", "b")
    talk.report("a")
    talk.hear(AgentLost("b"))
    (_, dismiss), (when, abandon) = talk.wait(30)
    assert (when, dismiss) == (130.0, Dismiss(("b",)))
    assert abandon == Abandon("1 update, quorum is 2, with nobody left to wait for: b lost (offline)")


def test_a_round_whose_agents_are_all_lost_says_that_it_waits_for_one_to_return():
    talk = Talk(minimum=2, quorum=2)
    talk.fleet("a", "b")
    talk.hear(AgentLost("a"))
    assert talk.round.status(talk.now) == "0 of 2 updates, waiting for b (at most 10 min)"
    talk.hear(AgentLost("b"), after_s=2)
    assert talk.round.status(talk.now) == "0 of 2 updates, a, b are lost; waiting for one to return (at most 30 s)"


def test_a_round_that_one_update_is_missing_from_says_whose():
    talk = Talk(minimum=2, quorum=2)
    talk.fleet("a", "b")
    talk.report("a")
    talk.hear(AgentLost("b"))
    talk.wait(10)
    assert talk.round.status(talk.now) == "1 of 2 updates, b is lost; waiting for one to return (at most 20 s)"


def test_each_time_that_everybody_is_lost_gives_its_own_30_seconds():
    talk = Talk(minimum=1, quorum=1)
    talk.fleet("a")
    talk.hear(AgentLost("a"))
    talk.hear(AgentReturned("a"), after_s=20)
    talk.hear(AgentLost("a"), after_s=5)
    assert talk.round.deadline() == 155.0  # 100 + 20 + 5 + 30


def test_a_round_that_everybody_refuses_is_abandoned_at_once():
    talk = Talk(minimum=2, quorum=1)
    talk.fleet("a", "b")
    talk.hear(AgentRefused("a", "battery"))
    assert talk.hear(AgentRefused("b", "hours")) == [
        Abandon("0 updates, quorum is 1, with nobody left to wait for: a refused (battery), b refused (hours)")
    ]


def test_the_operator_closes_a_round_with_what_has_come_or_abandons_it():
    talk = Talk(minimum=2, quorum=1)
    talk.fleet("a", "b")
    talk.report("a")
    assert talk.hear(CloseRequested()) == [Dismiss(("b",)), Aggregate(("a",))]

    talk = Talk(minimum=2, quorum=2)
    talk.fleet("a", "b")
    talk.report("a")
    *_, abandon = talk.hear(CloseRequested())
    assert abandon == Abandon("1 update, quorum is 2, when the operator closed it: b invited")

    talk = Talk(minimum=2)
    assert talk.hear(CloseRequested()) == [Abandon("0 updates, quorum is 1, when the operator closed it: none invited")]


def test_a_failed_aggregation_abandons_the_round():
    talk = in_state(RoundState.AGGREGATING)
    assert talk.hear(AggregationFailed("disk full")) == [Abandon("disk full")]


# Time.


def test_a_deadline_that_passed_is_settled_before_the_event_that_comes_after_it():
    talk = Talk(minimum=2, quorum=1, report_deadline_s=600)
    talk.fleet("a", "b")
    talk.accept("a", "b")
    talk.report("a")
    assert talk.hear(AgentRefused("b", "battery"), after_s=601) == [Dismiss(("b",)), Aggregate(("a",))]
    assert talk.round.members["b"] is MemberState.ACCEPTED


def test_time_never_runs_backwards():
    talk = Talk(minimum=1, report_deadline_s=600)
    talk.fleet("a")
    talk.wait(10)
    talk.round.step(TimePassed(), 50.0)
    assert talk.round.now == 110.0


def scenario(seed: int) -> list[tuple[float, Event]]:
    """Random events of three agents over some minutes."""
    rng = random.Random(seed)
    kinds = (AgentAccepted, UpdateAccepted, AgentLost, AgentReturned, lambda a: AgentRefused(a, "battery"))
    times = sorted(rng.uniform(0, rng.choice((40.0, 150.0))) for _ in range(rng.randrange(1, 12)))
    return [(at, rng.choices(kinds, (4, 2, 2, 2, 1))[0](rng.choice("abc"))) for at in times]


def outcome(events: list[tuple[float, Event]], wakes: list[float], *, on_time: bool) -> tuple[Any, ...]:
    """How a round of these events ends, with timers at each deadline or at none of them, and at `wakes` besides.

    Nobody replaces a lost agent here: a replacement that is invited late really was, whatever the reason.
    """
    machine = make(now=0.0, minimum=3, quorum=2, acceptance_deadline_s=20, report_deadline_s=100)
    machine.step(FleetChanged(frozenset("abc")), 0.0)
    for at, event in sorted(events + [(wake, TimePassed()) for wake in wakes], key=lambda pair: pair[0]):
        while on_time and machine.deadline() <= at:
            machine.step(TimePassed(), machine.deadline())
        machine.step(TimePassed(), at)
        if not isinstance(event, UpdateAccepted) or machine.is_open_to(event.agent_id):
            machine.step(event, at)
        machine.check()
    while machine.deadline() < math.inf:
        machine.step(TimePassed(), machine.deadline())
    return machine.state, machine.reported, machine.reason


def test_a_round_ends_in_the_same_way_whether_timers_fire_on_time_early_or_late():
    ends = Counter()
    for seed in range(1000):
        events = scenario(seed)
        rng = random.Random(-seed)
        wakes = [rng.uniform(0, 100) for _ in range(5)]
        punctual = outcome(events, [], on_time=True)
        assert outcome(events, [], on_time=False) == punctual, f"seed {seed}: a late timer changed the outcome"
        assert outcome(events, wakes, on_time=True) == punctual, f"seed {seed}: an early wake changed the outcome"
        ends[punctual[0]] += 1
    assert min(ends[RoundState.AGGREGATING], ends[RoundState.ABANDONED]) > 100, f"the scenarios are one-sided: {ends}"


# Restarts.


def restored(state: RoundState, members: dict[str, MemberState], *, now: float = 1000.0, **bounds: Any) -> Talk:
    machine = Round.restore(
        RoundConfig(**bounds), round_num=4, attempt=2, seed=7, now=now, state=state, members=members
    )
    return Talk(machine)


def test_a_round_restored_while_selecting_begins_its_wait_anew():
    talk = restored(RoundState.SELECTING, {}, minimum=2, selection_deadline_s=60)
    assert talk.round.resume() == []
    assert talk.round.deadline() == 1060.0
    (invite,) = talk.fleet("a", "b")
    assert sorted(invite.agent_ids) == ["a", "b"]


def test_a_round_restored_while_collecting_invites_who_was_awaited_and_keeps_what_came():
    members = {
        "a": MemberState.REPORTED,
        "b": MemberState.ACCEPTED,
        "c": MemberState.INVITED,
        "d": MemberState.LOST,
        "e": MemberState.REFUSED,
    }
    talk = restored(RoundState.COLLECTING, members, quorum=3, report_deadline_s=600)
    assert talk.round.resume() == [Invite(("b", "c"))]
    talk.round.check()
    assert talk.round.ends_at == 1600.0
    assert talk.hear(AgentReturned("d")) == [Invite(("d",))]
    assert talk.hear(AgentReturned("e")) == []
    talk.report("b", "d")
    assert talk.report("c") == [Aggregate(("a", "b", "c", "d"))]


def test_an_agent_that_had_accepted_before_a_restart_and_is_silent_after_it_is_lost_at_20_seconds():
    talk = restored(
        RoundState.COLLECTING,
        {"a": MemberState.ACCEPTED, "b": MemberState.REPORTED},
        quorum=2,
        acceptance_deadline_s=20,
    )
    talk.round.resume()
    assert [(when, command) for when, command in talk.wait(20) if not isinstance(command, Invite)] == [
        (1020.0, Release(("a",)))
    ]


def test_a_round_restored_with_enough_updates_closes_at_once():
    members = {"a": MemberState.REPORTED, "b": MemberState.REPORTED, "c": MemberState.REFUSED}
    talk = restored(RoundState.COLLECTING, members, quorum=2)
    assert talk.round.resume() == [Aggregate(("a", "b"))]


def test_a_round_restored_with_everybody_lost_gives_them_time_to_come_back():
    talk = restored(RoundState.COLLECTING, {"a": MemberState.LOST})
    assert talk.round.resume() == []
    talk.round.check()
    assert talk.round.deadline() == 1030.0


def test_a_restart_does_not_invite_more_agents_than_the_first_time():
    order = draw_order("abcdef", 7, 4)
    members = dict.fromkeys(order[:2], MemberState.REFUSED) | dict.fromkeys(order[2:4], MemberState.ACCEPTED)
    talk = restored(RoundState.COLLECTING, members, target=2, minimum=2, quorum=2, over_select=1.0)
    assert talk.round.resume() == [Invite(tuple(order[2:4]))]
    assert talk.fleet(*"abcdef") == []


def test_a_round_restored_while_aggregating_asks_for_the_same_average_again():
    members = {"a": MemberState.REPORTED, "b": MemberState.REPORTED, "c": MemberState.ACCEPTED}
    talk = restored(RoundState.AGGREGATING, members, quorum=2)
    assert talk.round.resume() == [Aggregate(("a", "b"))]
    assert talk.round.deadline() == math.inf
    assert talk.hear(Aggregated("d2")) == [Commit("d2")]


# Random stories.

AGENTS = [f"a{number}" for number in range(6)]
agents = st.sampled_from(AGENTS)


@settings(max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
class RandomStories(RuleBasedStateMachine):
    """Whatever agents, timers, operators and restarts do, the invariants hold and a round ends at most once."""

    @initialize(cohort=st.integers(0, 4), minimum=st.integers(1, 3), quorum=st.integers(1, 3), over=st.floats(1.0, 2.0))
    def begin(self, cohort: int, minimum: int, quorum: int, over: float) -> None:
        self.config = RoundConfig(
            target=cohort, minimum=minimum, quorum=quorum, over_select=over, report_deadline_s=100.0
        )
        self.round = Round(self.config, 1, 1, 7, 0.0)
        self.now = 0.0
        self.num_ends = 0
        self.num_averages = 0

    def hear(self, event: Event) -> None:
        before = set(self.round.reported)
        commands = self.round.step(event, self.now)
        self.look_at(commands)
        assert before <= set(self.round.reported), "an update that counted does not any more"

    def look_at(self, commands: list[Any]) -> None:
        for command in commands:
            if isinstance(command, Aggregate):
                self.num_averages += 1
                assert len(command.agent_ids) >= self.config.quorum
            if isinstance(command, Commit | Abandon):
                self.num_ends += 1
            if isinstance(command, Invite | Dismiss | Release):
                assert len(set(command.agent_ids)) == len(command.agent_ids) > 0
        assert self.num_ends <= 1

    @rule(available=st.frozensets(agents))
    def fleet_changes(self, available: frozenset[str]) -> None:
        self.hear(FleetChanged(available))

    @rule(agent_id=agents, kind=st.sampled_from([AgentAccepted, AgentLost, AgentReturned]))
    def agent_moves(self, agent_id: str, kind: type[AgentAccepted | AgentLost | AgentReturned]) -> None:
        self.hear(kind(agent_id))

    @rule(agent_id=agents)
    def agent_refuses(self, agent_id: str) -> None:
        self.hear(AgentRefused(agent_id, "battery"))

    @rule(agent_id=agents, good=st.booleans())
    def update_comes(self, agent_id: str, good: bool) -> None:
        self.hear(TimePassed())
        if self.round.is_open_to(agent_id):
            self.hear(UpdateAccepted(agent_id) if good else UpdateRejected(agent_id, "norm"))

    @precondition(lambda self: self.round.state is RoundState.AGGREGATING)
    @rule(good=st.booleans())
    def average_comes(self, good: bool) -> None:
        self.hear(Aggregated("d1") if good else AggregationFailed("disk full"))

    @rule(seconds=st.floats(0.0, 50.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.hear(TimePassed())

    @rule()
    def timer_fires(self) -> None:
        if self.round.deadline() < math.inf:
            self.now = self.round.deadline()
            self.hear(TimePassed())

    @rule()
    def operator_closes(self) -> None:
        self.hear(CloseRequested())

    @precondition(lambda self: self.num_ends == 0)
    @rule()
    def coordinator_restarts(self) -> None:
        kept = self.round
        self.round = Round.restore(
            self.config,
            round_num=1,
            attempt=1,
            seed=7,
            now=self.now,
            state=kept.state,
            members=kept.members,
        )
        self.look_at(self.round.resume())
        assert self.round.reported == kept.reported

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "round"):
            self.round.check()
            assert self.round.deadline() > self.now
            assert set(self.round.awaited).isdisjoint(self.round.reported)


TestRandomStories = pytest.mark.no_cover(RandomStories.TestCase)
