"""The held-out gate: what it refuses, what the next attempt does without, and that a crash in between changes nothing."""

import pytest

from coordinator import round_events as rounds
from coordinator import run_events as ev
from coordinator.config import load_settings
from coordinator.held_out import HeldOutGate, furthest
from coordinator.quarantine import QuarantineConfig, Strike
from coordinator.round import MemberState, RoundState
from coordinator.run import Resumed, RunState, Version
from coordinator.run_settings import run_config
from coordinator.strategies import FedAvg
from midge.settings import SettingsError
from midge.wire.messages import Cancel, Evaluation, Invitation
from tests.machines import FRAMING, LAYOUT, Talk, config, digest, of_kind, only, sent, version_digest

GATE = HeldOutGate(max_loss_ratio=2.0, max_accuracy_drop=0.1)


def score(loss, accuracy=None):
    return Evaluation(num_examples=10, loss=loss, metrics={} if accuracy is None else {"accuracy": accuracy})


def test_a_candidate_with_more_than_twice_its_parents_loss_is_refused():
    gate = HeldOutGate(max_loss_ratio=2.0)
    assert gate.objection(score(1.0), score(0.5)) == ""
    assert gate.objection(score(1.1), score(0.5)) == (
        "its loss on test data is 1.1, its parent's 0.5: 2.2 times as much, and max_loss_ratio is 2"
    )


def test_a_candidate_that_loses_more_accuracy_than_it_may_is_refused():
    gate = HeldOutGate(max_accuracy_drop=0.25)
    assert gate.objection(score(9, 0.5), score(1, 0.75)) == ""
    assert gate.objection(score(9, 0.25), score(1, 0.75)) == (
        "its accuracy on test data is 0.25, its parent's 0.75: 0.5 less, and max_accuracy_drop is 0.25"
    )


@pytest.mark.parametrize("parent", [None, score(0.0), score(-1.0)])
def test_without_a_parents_loss_to_compare_with_nothing_is_refused(parent):
    assert HeldOutGate(max_loss_ratio=2.0).objection(score(1e9), parent) == ""


def test_a_task_without_the_numbers_that_the_gate_needs_is_named():
    assert "no test data on the coordinator" in GATE.impossible(None)
    assert "tells no accuracy" in HeldOutGate(max_accuracy_drop=0.1).impossible(score(1.0))
    assert GATE.impossible(score(1.0)) == GATE.impossible(score(1.0, 0.5)) == ""


def test_the_furthest_update_is_the_one_with_the_largest_norm_and_of_equals_the_last():
    assert furthest([("a", 1.0), ("b", 3.0), ("c", 2.0)]) == "b"
    assert furthest([("a", 3.0), ("b", 3.0)]) == "b"


# In a run.


def checked(agents=("a", "b", "c"), **settings):
    """A run whose gate is on, with these updates averaged: that of c reaches three times as far as the others'."""
    talk = Talk(config(rounds=3, held_out=GATE, is_checked=True, start_agents=len(agents), **settings))
    talk.to_collecting(*agents)
    commands = send_updates(talk)
    assert len(only(commands, ev.AggregateUpdates).updates) == len(agents)
    return talk


def send_updates(talk):
    awaited = talk.run.attempt.round.awaited
    return [
        command
        for agent_id in awaited
        for command in (*talk.offer(agent_id), *talk.frames(agent_id, sum_squares=9.0 if agent_id == "c" else 1.0))
    ]


def aggregated(talk, name="candidate"):
    return talk.hear(ev.UpdatesAggregated(digest(name), 1.0, digest(f"state of {name}")))


def test_a_candidate_is_evaluated_before_it_is_committed_and_not_again():
    talk = checked()
    commands = aggregated(talk)
    assert of_kind(commands, ev.SaveVersion) == []
    assert only(commands, ev.EvaluateModel) == ev.EvaluateModel(1, digest("candidate"))
    assert only(commands, ev.SaveAttempt).state is RoundState.CHECKING
    assert talk.run.status() == "round 1 of 3: comparing the candidate with the version before it"
    commands = talk.evaluated(1, accuracy=0.6)
    saved = only(commands, ev.SaveVersion)
    assert (saved.digest, saved.server_state) == (digest("candidate"), digest("state of candidate"))
    assert only(commands, ev.SaveEvaluation).score.metrics == {"accuracy": 0.6}
    assert of_kind(commands, ev.EvaluateModel) == []
    assert talk.run.best == (1, 0.6)


def refuse(talk):
    """Round 0 has an accuracy of 0.5; the candidate has 0.1."""
    aggregated(talk)
    return talk.evaluated(talk.run.current_round, accuracy=0.1)


@pytest.mark.fault(32)
def test_a_refused_candidate_is_discarded_and_the_next_attempt_does_without_the_furthest_update():
    talk = checked()
    commands = refuse(talk)
    assert of_kind(commands, ev.SaveVersion) == []
    assert only(commands, ev.DiscardModel) == ev.DiscardModel(digest("candidate"), digest("state of candidate"))
    assert only(commands, ev.CandidateJudged).left_out == ("c",)
    ended = only(commands, ev.RoundEnded)
    assert ended.outcome == "abandoned"
    assert ended.reason == (
        "the candidate was refused: its accuracy on test data is 0.1, its parent's 0.5: 0.4 less, and max_accuracy_drop is "
        "0.1; the update of c reached furthest, and is left out of this round"
    )
    assert of_kind(commands, ev.SaveAttempt)[-1].members["c"] is MemberState.LEFT_OUT
    assert only(commands, ev.SaveStrike).strike == Strike(1, 1, "c", "held_out")
    # The others' work counts: nobody is invited, and the two are averaged at once.
    commands = talk.wait(2.0)
    assert sent(commands, Invitation) == {}
    assert [update.agent_id for update in only(commands, ev.AggregateUpdates).updates] == ["a", "b"]
    aggregated(talk, "better")
    saved = only(talk.evaluated(1, accuracy=0.6), ev.SaveVersion)
    assert (saved.digest, saved.num_updates, saved.attempts) == (digest("better"), 2, 2)
    assert sorted(sent(talk.published(), Invitation)) == ["a", "b", "c"]


def test_where_too_few_would_be_left_nobody_is_left_out_and_attempts_are_bounded():
    talk = checked(("b", "c"), max_attempts=2)
    assert only(refuse(talk), ev.CandidateJudged).left_out == ()
    talk.wait(2.0)
    commands = refuse(talk)
    assert talk.run.state is RunState.FAILED
    assert talk.run.reason.startswith(
        "round 1 was abandoned 2 times, the last time: the candidate was refused: its accuracy"
    )
    assert only(commands, ev.RunChanged).state == "failed"


def test_another_agent_takes_the_place_of_the_one_that_is_left_out():
    talk = Talk(config(rounds=3, held_out=GATE, is_checked=True, target=2, over_select=1.0, start_agents=3))
    talk.prepared()
    talk.evaluated(0)
    talk.published()
    first = sent(talk.come("a", "b", "c"), Invitation)
    assert len(first) == 2
    talk.accept(*first)
    send_updates(talk)
    (left_out,) = only(refuse(talk), ev.CandidateJudged).left_out
    (third,) = {"a", "b", "c"} - first.keys()
    assert list(sent(talk.wait(2.0), Invitation)) == [third]
    assert left_out not in {send.agent_id for send in of_kind(talk.wait(30.0), ev.Send)}


@pytest.mark.parametrize("when", [RoundState.CHECKING, RoundState.ABANDONED])
def test_a_coordinator_that_is_killed_comes_to_the_same_verdict_and_leaves_out_the_same(when):
    talk = checked()
    saves = of_kind(aggregated(talk), ev.SaveAttempt)
    updates = list(talk.run.accepted.values())
    if when is RoundState.ABANDONED:
        saves = of_kind(talk.evaluated(1, accuracy=0.1), ev.SaveAttempt)
    last = saves[-1]
    assert last.state is when
    again = Talk(
        talk.run.config,
        epoch=2,
        fleet=talk.fleet,
        resumed=Resumed(
            version=Version(0, version_digest(0)),
            layout=LAYOUT,
            framing=FRAMING,
            attempt=1,
            round_state=last.state,
            members=last.members,
            accepted=updates,
            score=score(0.5, 0.5),
        ),
    )
    if when is RoundState.CHECKING:  # the same updates are aggregated again, to the same bits
        assert only(again.first, ev.AggregateUpdates).updates == tuple(updates)
        assert only(refuse(again), ev.CandidateJudged).left_out == ("c",)
        again.published()
        commands = again.wait(2.0)
    else:
        commands = again.published()
    assert [update.agent_id for update in only(commands, ev.AggregateUpdates).updates] == ["a", "b"]
    assert again.run.attempt.round.attempt == 2


def test_an_evaluation_that_fails_commits_nothing_and_blames_nobody():
    talk = checked()
    aggregated(talk)
    commands = talk.hear(ev.ModelEvaluated(1, None, "the process was killed"))
    assert only(commands, ev.RoundEnded).reason == (
        "the candidate was refused: it could not be evaluated: the process was killed"
    )
    assert only(commands, ev.CandidateJudged).left_out == ()
    assert of_kind(commands, ev.SaveStrike) == []
    assert len(only(talk.wait(2.0), ev.AggregateUpdates).updates) == 3


def test_a_task_without_test_data_ends_the_run_with_what_to_do():
    talk = Talk(config(held_out=GATE, is_checked=True))
    talk.prepared()
    talk.hear(ev.ModelEvaluated(0, None))
    assert talk.run.state is RunState.FAILED
    assert "the task has no test data on the coordinator: give it some (data_dir)" in talk.run.reason


def test_who_is_left_out_again_and_again_is_quarantined_and_told():
    talk = checked(quarantine=QuarantineConfig(after=1))
    commands = refuse(talk)
    assert only(commands, ev.AgentQuarantined).agent_id == "c"
    assert sent(commands, Cancel)["c"].reason == "quarantined"


def test_a_result_that_was_being_checked_is_made_again():
    talk = checked()
    aggregated(talk)
    restored = rounds.Aggregate(("a", "b", "c"))
    machine = type(talk.run.attempt.round).restore(
        talk.run.config.round,
        round_num=1,
        attempt=1,
        seed=7,
        now=0.0,
        state=RoundState.CHECKING,
        members=talk.run.attempt.round.members,
    )
    assert machine.resume() == [restored]


# Settings.


def test_the_gate_is_off_unless_it_is_asked_for():
    settings = load_settings()
    assert not run_config("r", settings, FedAvg()).round.is_checked
    asked = load_settings(assignments=["max_loss_ratio=2"])
    assert run_config("r", asked, FedAvg()).round.is_checked
    assert run_config("r", asked, FedAvg()).held_out == HeldOutGate(max_loss_ratio=2.0)


def test_a_gate_without_evaluation_is_refused_at_the_start():
    with pytest.raises(SettingsError, match=r"max_accuracy_drop is 0\.1, and versions are not evaluated \(evaluate\)"):
        load_settings(assignments=["max_accuracy_drop=0.1", "evaluate=false"])
