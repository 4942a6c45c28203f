"""No wait without a bound and a word on it: what is missing, since when, until when; and nothing spins meanwhile.

The first half plays the machines: with agents that never suffice, leave, or come and go, a run ends with its reason, after a
bounded number of attempts, in a bounded time, and is woken a bounded number of times. The second shows what is told of a wait.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from coordinator import run_events as ev
from coordinator.board import Board, Shared
from coordinator.commands import _wait_line
from coordinator.metrics import Metrics
from coordinator.observer import Watch
from coordinator.run import RunState
from coordinator.waits import Wait
from edge_agent.metrics import AgentMetrics
from midge.wire.messages import Invitation
from tests.machines import Talk, config, of_kind

ATTEMPTS = 3
BOUNDS: dict[str, Any] = {
    "selection_deadline_s": 60.0,
    "acceptance_deadline_s": 20.0,
    "report_deadline_s": 600.0,
    "max_attempts": ATTEMPTS,
}
LONGEST_S = ATTEMPTS * (60.0 + 600.0 + 60.0)
"""Each attempt selects and collects within its bounds, and a pause is a minute at most."""


class Clocked:
    """A run that is woken at its deadlines alone, and what it says of its waits meanwhile."""

    def __init__(self, **changes: Any) -> None:
        self.talk = Talk(config(**(BOUNDS | changes)))
        self.num_turns = 0
        self.commands: list[ev.Command] = []
        self.waits: list[Wait] = []

    def take(self, commands: list[ev.Command]) -> None:
        self.commands += commands
        wait = self.talk.run.wait()
        assert (wait is None) == (self.talk.run.state is RunState.FAILED), self.talk.run.status()
        if wait is not None:
            assert self.talk.now < wait.until < math.inf, f"a wait without an end: {wait}"
            self.waits.append(wait)

    def to_the_end(self, flap=lambda now: []) -> None:
        """Let time pass until the run is over; `flap` may do something at each deadline."""
        while self.talk.run.state is not RunState.FAILED:
            assert self.talk.now < LONGEST_S, f"still at it: {self.talk.run.status()}"
            self.talk.now = self.talk.run.deadline()
            self.num_turns += 1
            self.take(self.talk.hear(ev.TimePassed()))
            if self.talk.run.state is not RunState.FAILED:
                self.take(flap(self.talk.now))

    def ended(self) -> list[ev.RoundEnded]:
        return of_kind(self.commands, ev.RoundEnded)


@pytest.mark.fault(27)
def test_a_quorum_that_is_never_reached_ends_the_run_with_its_reason_after_bounded_attempts(recovery):
    clocked = Clocked()
    clocked.talk.to_collecting("a", "b")
    clocked.talk.update("a")
    clocked.to_the_end()  # b works on and on
    assert [one.outcome for one in clocked.ended()] == ["abandoned"] * ATTEMPTS
    assert "1 update, quorum is 2, after 600 s: b took the invitation" in clocked.ended()[0].reason
    assert clocked.talk.run.reason.startswith(f"round 1 was abandoned {ATTEMPTS} times, the last time: 1 update")
    assert {wait.reason for wait in clocked.waits} == {"updates", "pause"}
    assert clocked.num_turns < 100
    recovery.tried(1)


@pytest.mark.fault(27)
def test_when_all_agents_are_gone_the_run_ends_with_its_reason_after_bounded_attempts():
    clocked = Clocked()
    clocked.talk.to_collecting("a", "b")
    clocked.take(clocked.talk.leave("a", "b"))
    assert clocked.waits[-1] == Wait("updates", 2, clocked.talk.now + 30.0)  # one of them may come back
    clocked.to_the_end()
    first, *others = clocked.ended()
    assert "with nobody left to wait for: a lost (offline), b lost (offline)" in first.reason
    assert {one.reason for one in others} == {
        "0 of 2 agents were there after 60 s; start more agents or lower min_agents"
    }
    assert {wait.reason for wait in clocked.waits} == {"updates", "pause", "agents"}
    assert {wait.num_missing for wait in clocked.waits if wait.reason == "agents"} == {2}
    assert clocked.num_turns < 150  # the roll is called each ten seconds while agents are wanted


@pytest.mark.fault(27)
def test_an_agent_that_comes_and_goes_costs_an_invitation_each_time_and_no_attempt_more():
    clocked = Clocked()
    clocked.talk.to_collecting("a", "b")
    clocked.talk.update("a")
    rng, num_flaps = random.Random(27), 0

    def flap(now: float) -> list[ev.Command]:
        nonlocal num_flaps
        at = now + rng.uniform(0.0, 5.0)
        if at >= clocked.talk.run.deadline():
            return []
        clocked.talk.now = at
        num_flaps += 1
        return clocked.talk.leave("b") + clocked.talk.come("b", incarnation=str(num_flaps + 1))

    clocked.to_the_end(flap)
    assert [one.outcome for one in clocked.ended()] == ["abandoned"] * ATTEMPTS
    invitations = [send for send in of_kind(clocked.commands, ev.Send) if isinstance(send.message, Invitation)]
    assert num_flaps > 10
    assert len(invitations) <= num_flaps + clocked.num_turns
    assert clocked.num_turns < 1000


def test_each_state_of_a_run_has_its_wait_and_one_that_is_over_has_none():
    talk = Talk(config(rounds=1, start_deadline_s=100.0), connected=False)
    assert talk.run.wait() == Wait("model")
    talk.prepared()
    assert talk.run.wait() == Wait("broker", 2, 100.0)
    talk.hear(ev.BrokerConnected())
    assert talk.run.wait() == Wait("publishing")
    talk.published()
    assert talk.run.wait() == Wait("agents", 2, 100.0)
    talk.come("a", "b")
    assert talk.run.wait() == Wait("updates", 2, 600.0)
    talk.update("a")
    assert talk.run.wait() == Wait("updates", 1, 600.0)
    talk.update("b")
    assert talk.run.wait() == Wait("aggregation")
    talk.aggregated()
    talk.published()
    assert talk.run.wait() == Wait("evaluation")
    talk.evaluated(0)
    talk.evaluated(1)
    assert talk.run.state is RunState.DONE
    assert talk.run.wait() is None


# What is told.


@pytest.fixture
def shown(monkeypatch):
    """A watch over a run, with its board and its registry, at a wall clock of 1000 s at monotonic 0."""
    registry, shared = CollectorRegistry(), Shared(Board(federation="lab", broker="mqtt://b"))
    watch = Watch(Metrics("lab", registry), shared)
    watch.begin_run("r1", 2, 2)

    def look(wait: Wait | None, now: float) -> None:
        monkeypatch.setattr("coordinator.observer.time.time", lambda: 1000.0 + now)
        watch.look("what it does", 0, 0, wait, now)

    return look, shared.board, registry


def series(registry: CollectorRegistry, name: str) -> dict[str, float]:
    """By reason."""
    return {
        sample.labels["reason"]: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == f"midge_wait_{name}_timestamp_seconds"
    }


def test_a_wait_is_on_the_board_and_in_metrics_with_its_beginning_and_its_end(shown):
    look, board, registry = shown
    look(Wait("updates", 2, 600.0), 5.0)
    look(Wait("updates", 1, 600.0), 8.0)
    assert (board.waiting_for, board.num_missing) == ("updates", 1)
    assert board.waiting_since == "1970-01-01T00:16:45+00:00"
    assert board.waiting_until == "1970-01-01T00:26:40+00:00"
    assert series(registry, "since") == {"updates": 1005.0}
    assert series(registry, "until") == {"updates": 1600.0}
    look(Wait("broker"), 9.0)
    assert (board.waiting_for, board.waiting_until) == ("broker", "")
    assert series(registry, "since") == {"broker": 1009.0}
    assert series(registry, "until") == {}
    look(None, 10.0)
    assert (board.waiting_for, board.num_missing, board.waiting_since, board.waiting_until) == ("", 0, "", "")
    assert series(registry, "since") == {}


def test_a_wait_begins_anew_with_each_attempt(shown):
    look, board, registry = shown
    look(Wait("updates", 2, 600.0), 5.0)
    board.attempt = 2
    look(Wait("updates", 2, 700.0), 100.0)
    assert series(registry, "since") == {"updates": 1100.0}


def test_a_long_wait_is_in_the_log_ever_more_seldom(shown, caplog):
    look, _, _ = shown
    caplog.set_level("INFO", "coordinator")
    for second in range(1000):
        look(Wait("agents", 1, 3000.0), float(second))
    lines = [line for line in caplog.messages if "still waiting" in line]
    assert len(lines) == 5  # after 10, 30, 90, 270 and 810 s
    look(Wait("updates", 1, 3000.0), 1001.0)
    assert len(caplog.messages) == len(lines)


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        ("1970-01-01T00:26:40+00:00", "waits for updates since 00:16:45 UTC, until 00:26:40 at most, 1 missing"),
        ("", "waits for updates since 00:16:45 UTC, as long as it takes, 1 missing"),
    ],
)
def test_the_status_of_a_coordinator_says_it(until, expected):
    since = "1970-01-01T00:16:45+00:00"
    board = {"waiting_for": "updates", "num_missing": 1, "waiting_since": since, "waiting_until": until}
    assert _wait_line(board) == expected


def test_an_agent_shows_since_when_it_is_in_its_state():
    metrics = AgentMetrics("pi-3", "lab")
    name = "midge_agent_state_since_timestamp_seconds"
    before = metrics.registry.get_sample_value(name, {"federation": "lab", "agent_id": "pi-3"})
    metrics.state("TRAINING")
    after = metrics.registry.get_sample_value(name, {"federation": "lab", "agent_id": "pi-3"})
    assert before is not None
    assert after is not None
    assert after >= before > 1e9
