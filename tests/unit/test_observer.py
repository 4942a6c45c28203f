"""The observer: metrics say what the run's own counts say, the board what a person asks, and neither grows without bound."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from coordinator import run_events as ev
from coordinator.board import HISTORY, Board, Shared
from coordinator.cohort import Change, Fleet
from coordinator.metrics import Metrics
from coordinator.observer import Watch
from coordinator.round import MemberState, RoundState
from midge.transport.base import Connected, Disconnected
from midge.wire.errors import MessageError
from midge.wire.messages import Evaluation, Refusal
from tests.machines import RUN_ID, Talk, config, presence, version_digest

SCORE = Evaluation(num_examples=10, loss=0.5, metrics={"accuracy": 0.75, "recall": 0.5})


class Watched:
    """An observer, and what it shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.shared = Shared(Board(federation="lab", broker="mqtt://broker:1883"))
        self.watch = Watch(Metrics("lab", self.registry), self.shared)
        self.watch.begin_run(RUN_ID, target=3, quorum=2)

    @property
    def board(self) -> Board:
        return self.shared.board

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, {"federation": "lab", **labels})

    def of_run(self, name: str, **labels: str) -> float | None:
        return self.value(name, run=RUN_ID, **labels)

    def updates(self) -> Counter[str]:
        """Updates by outcome."""
        counts: Counter[str] = Counter()
        for family in self.registry.collect():
            for sample in family.samples:
                if sample.name == "midge_updates_total" and sample.value:
                    counts[sample.labels["outcome"]] += int(sample.value)
        return counts

    def tell(self, commands: list[ev.Command]) -> None:
        """Do with the run's commands what the driver does."""
        for command in commands:
            if isinstance(command, ev.NOTES):
                self.watch.note(command)
            elif isinstance(command, ev.SAVES):
                self.watch.saved(command)

    def hear(self, fleet: Fleet, agent_id: str, **changes: Any) -> None:
        """An agent's presence comes."""
        change = fleet.hear(agent_id, presence(**changes), retained=False)
        self.watch.fleet(fleet, agent_id, change)


@pytest.fixture
def watched():
    return Watched()


def test_metrics_count_updates_as_the_run_does(watched):
    talk = Talk(config(rounds=2, minimum=3))
    watched.tell(talk.first)
    watched.tell(talk.to_collecting("a", "b", "c"))
    address = talk.address
    watched.tell(talk.update("a"))
    watched.tell(talk.update("a"))  # once more: a duplicate
    watched.tell(talk.offer("stranger"))  # rejected: it was not invited
    watched.tell(talk.offer("b", num_examples=0))  # rejected
    watched.tell(talk.offer("c", address=address._replace(round_num=9)))  # late
    watched.tell(talk.update("c"))
    watched.tell(talk.aggregated())
    watched.tell(talk.offer("b", address=address))  # late: the round is over
    tallies = talk.run.tallies
    assert tallies.num_received == 7
    assert watched.of_run("midge_updates_received_total") == tallies.num_received
    by_outcome: Counter[str] = Counter()
    for (outcome, _), count in tallies.counts.items():
        by_outcome[outcome] += count
    received = by_outcome.pop("received")
    assert watched.updates() == by_outcome == {"accepted": 2, "duplicate": 1, "rejected": 2, "late": 2}
    assert by_outcome.total() == received
    for reason in ("identity", "num_examples"):
        assert watched.of_run("midge_updates_total", outcome="rejected", reason=reason) == 1
    assert watched.of_run("midge_rounds_total", outcome="committed") == 1


def test_a_refusal_is_counted_by_its_reason_and_shown_with_its_words(watched, caplog):
    talk = Talk(config(rounds=2, minimum=3))
    watched.tell(talk.first + talk.to_collecting("a", "b", "c"))
    refusal = Refusal(**talk.address._asdict(), reason="battery", detail="12 % left")
    with caplog.at_level(logging.WARNING, "coordinator"):
        watched.tell(talk.hear(ev.MessageCame("a", refusal)))
    assert watched.of_run("midge_refusals_total", reason="battery") == 1
    view = watched.board.agents["a"]
    assert (view.activity, view.detail) == ("refused", "12 % left")
    assert "agent refused" in caplog.text


def test_what_an_agent_says_cannot_steer_the_terminal_that_shows_it(watched):
    words = "\x1b[2J\x07 sensor\r\nround committed \u202e\x9b31m"
    watched.watch.note(ev.AgentSpoke("a", "refused", 0.0, "worker", words))
    watched.watch.note(ev.UpdateSettled("b", "rejected", "norm", words))
    watched.watch.note(ev.RoundEnded(1, 1, "abandoned", words, 1.0, 0, 0, 0.0, ()))
    watched.watch.note(ev.RunChanged("failed", words))
    watched.watch.look(words, 0, 0)
    board = watched.board
    shown = [board.status, board.reason, *board.events, *(view.detail for view in board.agents.values())]
    assert len(shown) == 5
    for text in shown:
        assert "\\x1b[2J\\x07 sensor\\r\\nround committed \\u202e\\x9b31m" in text
        assert text.isprintable()


def test_stale_and_invalid_messages_are_counted_by_kind(watched):
    for kind in ("control", "update", "update"):
        watched.watch.note(ev.MessageStale(kind))
    for kind in ("presence", "update", "outbox", "coordinator", "other"):
        watched.watch.refused(kind, MessageError("no JSON"))
    assert watched.value("midge_messages_stale_total", kind="control") == 1
    assert watched.value("midge_messages_stale_total", kind="update") == 2
    assert watched.value("midge_messages_invalid_total", kind="presence") == 1
    assert watched.value("midge_messages_invalid_total", kind="update") == 1
    assert watched.value("midge_messages_invalid_total", kind="control") == 3


def test_traffic_and_the_brokers_own_figures_are_counted(watched):
    watched.watch.traffic("in", "update", 100)
    watched.watch.traffic("in", "update", 50)
    watched.watch.broker_says("$SYS/broker/publish/messages/dropped", b"7")
    assert watched.value("midge_traffic_bytes_total", direction="in", kind="update") == 150
    assert watched.value("midge_messages_total", direction="in", kind="update") == 2
    assert watched.value("midge_broker_messages_dropped_total") == 7


def test_a_round_is_followed_from_its_opening_to_its_end(watched):
    watch, board = watched.watch, watched.board
    watch.note(ev.RunChanged("in_round", ""))
    watch.note(ev.RoundOpened(4, 2))
    assert (board.state, board.round_num, board.attempt) == ("in_round", 4, 2)
    assert watched.of_run("midge_run_state", state="running") == 1
    assert (watched.of_run("midge_cohort_target"), watched.of_run("midge_quorum")) == (3, 2)
    members = {"a": MemberState.REPORTED, "b": MemberState.ACCEPTED, "c": MemberState.INVITED, "d": MemberState.LOST}
    watch.saved(ev.SaveAttempt(4, 2, RoundState.COLLECTING, "", members))
    counts = [watched.of_run(f"midge_cohort_{name}") for name in ("invited", "accepted", "reported")]
    assert counts == [4, 2, 1]
    assert {view.agent_id: view.activity for view in board.agents.values()} == {
        "a": "idle",
        "b": "idle",
        "c": "invited",
        "d": "lost",
    }
    watch.note(ev.AgentSpoke("b", "accepted"))
    assert board.agents["b"].activity == "fetching"
    watch.note(ev.AgentSpoke("b", "training", 0.5))
    assert (board.agents["b"].activity, board.agents["b"].fraction) == ("training", 0.5)
    watch.note(ev.UpdateSettled("b", "accepted"))
    assert (board.agents["b"].activity, board.agents["b"].fraction) == ("accepted", 1.0)
    watch.note(ev.PhaseEnded(4, "collecting", 1.5))
    watch.note(ev.RoundEnded(4, 2, "committed", "", 2.5, 2, 20, 0.25, (1.0, 3.0)))
    assert watched.of_run("midge_phase_duration_seconds_sum", phase="collecting") == 1.5
    assert watched.of_run("midge_round_duration_seconds_sum") == 2.5
    assert watched.of_run("midge_round_examples") == 20
    assert [watched.of_run("midge_update_norm", stat=stat) for stat in ("min", "median", "max")] == [1.0, 2.0, 3.0]
    assert board.agents["b"].activity == "idle"


def test_an_abandoned_round_is_an_event_that_a_person_reads(watched, caplog):
    watched.watch.note(ev.RoundEnded(4, 2, "abandoned", "1 of 2 updates after 600 s", 600.0, 1, 0, 0.0, (1.0,)))
    assert watched.board.events == ["round 4, attempt 2 abandoned: 1 of 2 updates after 600 s"]
    assert watched.of_run("midge_rounds_total", outcome="abandoned") == 1
    assert watched.of_run("midge_round_examples") is None
    assert "round abandoned" in caplog.text


def test_versions_and_their_scores_are_on_the_board_and_in_the_metrics(watched):
    watch, board = watched.watch, watched.board
    watch.saved(ev.SaveVersion(1, version_digest(1), version_digest(0), 2, 20, 1.5, 0.25, attempts=1))
    watch.saved(ev.SaveEvaluation(1, "central", SCORE))
    watch.saved(ev.SaveEvaluation(0, "federated", Evaluation(num_examples=5, loss=0.25)))
    watch.saved(ev.SaveRun("in_round", "", 1, 1, 0.75))
    view = board.history[1]
    assert (view.num_updates, view.num_examples, view.delta_norm, view.duration_s) == (2, 20, 1.5, 0.25)
    assert view.central == SCORE
    assert board.history[0].federated is not None
    assert (board.best_round, board.best_value) == (1, 0.75)
    assert watched.of_run("midge_accuracy_ratio", source="central") == 0.75
    assert watched.of_run("midge_loss", source="federated") == 0.25
    assert watched.of_run("midge_accuracy_ratio", source="federated") is None
    assert watched.of_run("midge_best_metric") == 0.75


def test_the_fleet_is_counted_by_state_and_each_agent_shown(watched):
    fleet = Fleet()
    watched.hear(fleet, "a")
    watched.hear(fleet, "b")
    watched.hear(fleet, "b", online=False)
    counts = {state: watched.value("midge_agents", state=state) for state in ("online", "silent", "offline")}
    assert counts == {"online": 1, "silent": 0, "offline": 1}
    views = watched.board.agents
    assert (views["a"].presence, views["a"].activity) == ("online", "idle")
    assert (views["b"].presence, views["b"].activity) == ("offline", "offline")
    watched.hear(fleet, "b", incarnation="2")
    assert (views["b"].presence, views["b"].activity) == ("online", "idle")


def test_without_the_broker_nobody_is_known_to_be_here(watched):
    fleet = Fleet()
    watched.hear(fleet, "a")
    watched.watch.broker(Connected("5"))
    assert (watched.board.is_connected, watched.value("midge_broker_connected")) == (True, 1)
    fleet.lose_all()
    watched.watch.broker(Disconnected("connection refused"))
    assert (watched.board.is_connected, watched.board.broker_problem) == (False, "connection refused")
    assert watched.value("midge_broker_connected") == 0
    assert watched.board.agents["a"].presence == "silent"
    assert [watched.value("midge_agents", state=state) for state in ("online", "silent")] == [0, 1]
    watched.watch.broker(Connected("5"))
    assert watched.board.broker_problem == ""


def test_a_connection_that_trying_again_cannot_mend_is_an_error_in_the_log(watched, caplog):
    watched.watch.broker(Disconnected("not authorised", fatal=True))
    watched.watch.broker(Disconnected("connection refused"))
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


@pytest.mark.parametrize(
    ("state", "shown"),
    [
        ("preparing", "waiting"),
        ("waiting", "waiting"),
        ("publishing", "running"),
        ("in_round", "running"),
        ("finishing", "running"),
        ("done", "done"),
        ("failed", "failed"),
        ("stopped", "stopped"),
    ],
)
def test_each_state_of_a_run_is_one_of_those_that_prometheus_knows(watched, state, shown):
    watched.watch.note(ev.RunChanged(state, ""))
    states = ("waiting", "running", "done", "failed", "stopped")
    assert {each: watched.of_run("midge_run_state", state=each) for each in states} == {
        each: float(each == shown) for each in states
    }


def test_once_a_turn_it_looks_at_what_is_missing(watched):
    watched.watch.look("waiting for agents: 1 of 3 are there", 2, 4096)
    assert watched.board.status == "waiting for agents: 1 of 3 are there"
    assert watched.of_run("midge_agents_missing") == 2
    assert watched.value("midge_inbox_queue_bytes") == 4096


def test_an_earlier_runs_series_go_when_another_begins(watched):
    watched.watch.note(ev.UpdateReceived("a"))
    watched.watch.begin_run("r2", target=1, quorum=1)
    assert watched.of_run("midge_updates_received_total") is None
    assert watched.value("midge_updates_received_total", run="r2") == 0


def test_without_a_run_nothing_of_a_run_is_shown():
    registry = CollectorRegistry()
    watch = Watch(Metrics("lab", registry), Shared(Board(federation="lab", broker="b")))
    watch.look("no run", 0, 0)
    watch.evaluated_in(1.0)
    assert "run=" not in str([sample.labels for family in registry.collect() for sample in family.samples])


def test_however_long_it_watches_the_board_stays_bounded(watched):
    watch = watched.watch
    for round_num in range(HISTORY + 200):
        watch.saved(ev.SaveVersion(round_num, version_digest(0), None))
        watch.note(ev.RoundEnded(round_num, 1, "abandoned", "x", 1.0, 0, 0, 0.0, ()))
        for outcome in ("late", "duplicate"):
            watch.note(ev.UpdateSettled(f"stranger-{round_num}", outcome))
        watch.note(ev.UpdateReceived(f"stranger-{round_num}"))
    board = watched.board
    assert (len(board.history), len(board.events), len(board.agents)) == (HISTORY, 50, 0)


@pytest.mark.fault(19, 31)
def test_strangers_that_offer_updates_under_one_name_after_another_get_no_line_and_few_in_the_log(watched, caplog):
    series = len(list(watched.registry.collect()))
    with caplog.at_level(logging.WARNING, "coordinator"):
        for number in range(500):
            watched.watch.note(ev.UpdateSettled(f"stranger-{number}", "rejected", "identity", "was not invited"))
            watched.watch.refused("outbox", MessageError("x"))
    assert watched.board.agents == {}
    assert watched.of_run("midge_updates_total", outcome="rejected", reason="identity") == 500
    assert watched.value("midge_messages_invalid_total", kind="control") == 500
    assert len(list(watched.registry.collect())) == series
    assert len(caplog.records) <= 2 * 31  # 30 of each, and what a second or so adds


@pytest.mark.fault(31)
def test_agents_that_come_once_and_go_leave_nothing_behind(watched, monkeypatch):
    monkeypatch.setattr("coordinator.observer._MAX_GONE", 5)
    fleet = Fleet()

    def hear(agent_id: str, **changes: Any) -> None:
        change = fleet.hear(agent_id, presence(**changes), retained=False)
        watched.watch.fleet(fleet, agent_id, change)

    def num_series() -> int:
        return sum(len(family.samples) for family in watched.registry.collect())

    hear("stays")
    before = num_series()
    for number in range(100):
        hear(f"once-{number}", task="another")
        watched.watch.saved(ev.SaveUpdate(1, ev.AcceptedUpdate(f"once-{number}", 1, "0" * 64, 10, (), 1.0)))
        hear(f"once-{number}", online=False)
    assert sorted(watched.board.agents) == [*(f"once-{number}" for number in range(95, 100)), "stays"]
    assert watched.watch._misfits.keys() == watched.board.agents.keys()
    assert watched.watch._incarnations.keys() == watched.board.agents.keys()
    assert num_series() == before
    watched.watch.broker(Disconnected("gone"))
    assert len(watched.board.agents) == 6
    hear("once-99")
    hear("late", task="another")
    hear("late", online=False)
    assert "once-95" in watched.board.agents  # one that came back made room
    assert watched.board.agents["once-99"].activity == "idle"


def test_an_agent_of_another_task_is_shown_with_its_task_and_warned_of_once(watched, caplog):
    watched.board.task = "digits"
    fleet = Fleet()
    with caplog.at_level(logging.WARNING, "coordinator"):
        watched.hear(fleet, "zed", task="mnist")
        watched.hear(fleet, "zed", task="mnist")
        watched.hear(fleet, "zed", task="mnist", incarnation="2")
        watched.hear(fleet, "a", task="digits")
    assert [record.getMessage() for record in caplog.records] == ["agent cannot take part"]
    assert watched.board.agents["zed"].detail == "was started with --task mnist, the run's task is digits"
    assert watched.board.agents["a"].detail == ""
    watched.hear(fleet, "zed", task="digits", incarnation="3")
    assert watched.board.agents["zed"].detail == ""


def test_every_change_of_an_agent_is_one_line_in_the_log(watched, caplog):
    fleet = Fleet()
    with caplog.at_level(logging.INFO, "coordinator"):
        watched.hear(fleet, "a")
        watched.hear(fleet, "a")
        watched.hear(fleet, "a", incarnation="2")
        watched.hear(fleet, "a", incarnation="2", online=False)
    messages = [record.message.split("  ")[0] for record in caplog.records]
    assert [message for message in messages if message.startswith("agent")] == [
        f"agent {change}" for change in (Change.CAME, Change.RESTARTED, Change.LEFT)
    ]


def test_an_agents_report_is_on_the_board_and_in_the_metrics_until_it_is_gone_or_the_run_is_over(watched):
    talk = Talk(config(rounds=2, minimum=2))
    watched.tell(talk.first)
    watched.tell(talk.to_collecting("a", "b"))
    watched.tell(talk.update("a", evaluation=SCORE, metrics={"loss": 0.125}))
    watched.tell(talk.update("b"))
    report = watched.board.agent_rounds["a"][1]
    assert (report.training_loss, report.evaluation, report.num_examples) == (0.125, SCORE, 10)
    norm = 3**0.5  # three frames, each with a sum of squares of 1
    assert watched.of_run("midge_agent_update_norm", agent_id="b") == report.norm == norm
    assert watched.of_run("midge_agent_loss", agent_id="a") == 0.5
    assert watched.of_run("midge_agent_accuracy_ratio", agent_id="a") == 0.75
    assert watched.of_run("midge_agent_training_loss", agent_id="a") == 0.125
    assert watched.of_run("midge_agent_loss", agent_id="b") is None
    fleet = Fleet()
    watched.hear(fleet, "b")
    watched.hear(fleet, "b", online=False)
    assert watched.of_run("midge_agent_update_norm", agent_id="b") is None
    assert watched.of_run("midge_agent_update_norm", agent_id="a") == norm
    watched.tell([ev.RunChanged("done", "")])
    assert watched.of_run("midge_agent_update_norm", agent_id="a") is None
    assert watched.board.agent_rounds["a"][1] == report


def test_what_is_told_again_after_a_write_that_failed_changes_only_what_was_missed(caplog):
    watched = Watched()
    told: list[ev.Save] = [ev.SaveVersion(1, version_digest(1), None, 2, 20), ev.SaveEvaluation(1, "central", SCORE)]
    for save in told:
        watched.watch.saved(save)
    before = watched.shared.snapshot()
    with caplog.at_level(logging.INFO, "coordinator"):
        watched.watch.catch_up(told)
    assert watched.shared.snapshot() == before
    assert caplog.records == []
    watched.watch.catch_up([*told, ev.SaveVersion(2, version_digest(2), None, 3, 30)])
    assert watched.board.history[2].num_updates == 3


def test_two_processes_that_take_turns_under_one_id_are_counted_and_named_once(watched, caplog):
    fleet = Fleet()
    with caplog.at_level(logging.ERROR, "coordinator"):
        for incarnation in ("aa", "bb", "cc"):  # restarted twice: nothing wrong
            watched.hear(fleet, "pi-1", incarnation=incarnation)
        assert watched.value("midge_agent_id_conflicts_total") == 0
        for incarnation in ("bb", "cc", "bb"):
            watched.hear(fleet, "pi-1", incarnation=incarnation)
    assert watched.value("midge_agent_id_conflicts_total") == 3
    assert watched.board.agents["pi-1"].detail.startswith("two processes use this agent id in turn: give each its own")
    assert len(watched.board.events) == 1
    assert [record.getMessage() for record in caplog.records] == ["two processes use one agent id"]


def test_who_is_in_quarantine_is_shown_until_it_is_over(watched, caplog):
    with caplog.at_level(logging.INFO, "coordinator"):
        watched.watch.note(ev.AgentQuarantined("a", 12, "quarantined until round 12 is over: 3 updates rejected"))
    view = watched.board.agents["a"]
    assert (view.quarantined_until, view.quarantine) == (12, "quarantined until round 12 is over: 3 updates rejected")
    assert watched.board.events == ["a is quarantined until round 12 is over: 3 updates rejected"]
    assert watched.of_run("midge_agents_quarantined") == 1
    assert "agent quarantined" in caplog.text
    watched.watch.note(ev.AgentReleased("a"))
    assert watched.board.agents["a"].quarantined_until == 0
    assert watched.of_run("midge_agents_quarantined") == 0


def test_a_quarantine_of_an_earlier_run_is_not_shown_in_the_next(watched):
    watched.watch.note(ev.AgentQuarantined("a", 12, "quarantined"))
    watched.watch.begin_run("next", target=3, quorum=2)
    assert watched.board.agents["a"].quarantined_until == 0


def test_a_refused_candidate_is_counted_and_told_with_who_is_left_out(watched, caplog):
    with caplog.at_level(logging.WARNING, "coordinator"):
        watched.watch.note(ev.CandidateJudged(3, 1, "its loss is twice as much", ("c",)))
    assert watched.of_run("midge_candidates_refused_total") == 1
    assert caplog.records[-1].getMessage().startswith("candidate refused")


def test_who_is_left_out_counts_as_neither_invited_nor_accepted(watched):
    members = {"a": MemberState.REPORTED, "b": MemberState.INVITED, "c": MemberState.LEFT_OUT}
    watched.watch.saved(ev.SaveAttempt(1, 2, RoundState.COLLECTING, "", members))
    assert watched.of_run("midge_cohort_invited") == 2
    assert watched.of_run("midge_cohort_accepted") == 1
    assert watched.board.agents["c"].activity == "left out"
