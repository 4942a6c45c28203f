"""A whole run in conversations: rounds, retries, evaluation, brokers and coordinators that go and come back."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from coordinator import run_events as ev
from coordinator.attempt import Address
from coordinator.cohort import Fleet
from coordinator.held_out import HeldOutGate
from coordinator.quarantine import QuarantineConfig
from coordinator.round import MemberState, RoundState
from coordinator.run import FINAL, Resumed, RunState, Version
from coordinator.scoring import Scoring
from coordinator.uplink import Verdict
from midge.wire.frames import Frame, content_tag, run_tag
from midge.wire.messages import Acceptance, Cancel, Credit, Evaluation, Invitation, Receipt, Refusal, TrainingConfig
from tests import measured
from tests.machines import (
    EPOCH,
    FRAMING,
    LAYOUT,
    RUN_ID,
    Talk,
    config,
    digest,
    digest_of_update,
    facts,
    header,
    of_kind,
    only,
    presence,
    sent,
    version_digest,
)


def aggregating(**changes: Any) -> Talk:
    talk = Talk(config(**changes))
    talk.to_aggregating()
    return talk


def updates(talk: Talk, *agent_ids: str) -> list[ev.Command]:
    """Their whole updates come."""
    return [command for agent_id in agent_ids for command in talk.update(agent_id)]


# The happy path.


def test_a_run_of_two_rounds_from_the_first_model_to_the_end():
    talk = Talk(config(rounds=2))
    assert of_kind(talk.first, ev.PrepareModel) == [ev.PrepareModel(7)]
    assert talk.run.status() == "making the initial model"
    commands = talk.prepared()
    assert only(commands, ev.SaveVersion) == ev.SaveVersion(0, version_digest(0), None)
    assert only(commands, ev.EvaluateModel) == ev.EvaluateModel(0, version_digest(0))
    assert only(commands, ev.PublishModel) == ev.PublishModel(0, version_digest(0))
    assert talk.run.state is RunState.PUBLISHING
    talk.evaluated(0, 0.1)
    assert only(talk.published(), ev.RunChanged).state == RunState.WAITING
    assert "0 of 2 are there" in talk.run.status()

    assert of_kind(talk.come("a"), ev.RoundOpened) == []
    commands = talk.come("b")
    assert only(commands, ev.RoundOpened) == ev.RoundOpened(1, 1)
    assert set(sent(commands, Invitation)) == {"a", "b"}
    talk.accept("a", "b")
    commands = updates(talk, "b", "a")
    average = only(commands, ev.AggregateUpdates)
    assert (average.round_num, average.base_digest) == (1, version_digest(0))
    assert [update.agent_id for update in average.updates] == ["a", "b"]  # in agent order, whatever came first
    assert "averaging 2 updates" in talk.run.status()

    talk.now += 4.0
    commands = talk.aggregated(delta_norm=2.5)
    saved = only(commands, ev.SaveVersion)
    assert saved == ev.SaveVersion(1, version_digest(1), version_digest(0), 2, 20, 2.5, 4.0, 1)
    ended = only(commands, ev.RoundEnded)
    assert (ended.outcome, ended.num_updates, ended.num_examples, ended.delta_norm) == ("committed", 2, 20, 2.5)
    assert ended.update_norms == pytest.approx((math.sqrt(3),) * 2)  # three frames of sum 1 each
    assert only(commands, ev.PublishModel) == ev.PublishModel(1, version_digest(1))
    talk.evaluated(1, 0.4)

    commands = talk.published()
    assert {message.round_num for message in sent(commands, Invitation).values()} == {2}
    assert {message.model_digest for message in sent(commands, Invitation).values()} == {version_digest(1)}
    updates(talk, "a", "b")
    talk.aggregated()
    assert talk.run.state is RunState.PUBLISHING
    talk.published()
    assert talk.run.state is RunState.FINISHING
    commands = talk.evaluated(2, 0.3)
    assert talk.run.state is RunState.DONE
    assert only(commands, ev.SaveRun) == ev.SaveRun("done", "", 2, 1, 0.4)
    assert talk.run.status() == "done: 2 rounds"


def test_each_transition_comes_with_its_save_in_the_same_step():
    talk = Talk()
    assert only(talk.first, ev.SaveRun).state == "preparing"
    assert only(talk.prepared(), ev.SaveVersion).round_num == 0
    talk.evaluated(0)
    assert only(talk.published(), ev.SaveRun).state == "waiting"
    talk.come("a")
    commands = talk.come("b")
    assert only(commands, ev.SaveAttempt).state is RoundState.COLLECTING
    assert only(commands, ev.SaveRun).state == "in_round"
    assert only(talk.accept("a"), ev.SaveAttempt).members["a"] is MemberState.ACCEPTED
    talk.update("a")
    talk.offer("b")
    talk.frame("b", 0)
    talk.frame("b", 1)
    commands = talk.frame("b", 2)
    assert only(commands, ev.SaveUpdate).update.agent_id == "b"
    assert only(commands, ev.SaveAttempt).state is RoundState.AGGREGATING
    commands = talk.aggregated()
    assert only(commands, ev.SaveVersion).round_num == 1
    assert only(commands, ev.SaveAttempt).state is RoundState.COMMITTED
    assert only(commands, ev.SaveRun).round_num == 1
    assert talk.hear(ev.TimePassed()) == []  # nothing is saved where nothing changed


def test_an_agent_that_comes_is_invited_once():
    talk = Talk()
    talk.prepared()
    talk.published()
    assert set(sent(talk.come("a", "b"), Invitation)) == {"a", "b"}  # `sent` counts twice as an error
    talk.leave("a")
    assert set(sent(talk.come("a"), Invitation)) == {"a"}
    assert set(sent(talk.come("b", incarnation="2"), Invitation)) == {"b"}


def test_agents_that_could_not_take_part_do_not_count():
    talk = Talk()
    talk.prepared()
    talk.published()
    talk.come("a")
    change = talk.fleet.hear("b", presence(task="mnist"), retained=False)
    assert change is not None
    talk.hear(ev.FleetMoved("b", change))
    assert talk.run.state is RunState.WAITING
    assert talk.run.num_available == 1


# The start.


def test_until_enough_agents_are_there_the_roll_is_called_every_ten_seconds():
    talk = Talk()
    assert only(talk.prepared(), ev.CallRoll)
    talk.published()
    assert len(of_kind(talk.wait(60), ev.CallRoll)) == 6
    talk.come("a", "b")
    assert of_kind(talk.wait(40), ev.CallRoll) == []


def test_a_run_to_which_nobody_comes_fails_at_its_start_deadline():
    talk = Talk(config(start_deadline_s=300))
    talk.prepared()
    talk.published()
    talk.come("a")
    assert of_kind(talk.wait(299), ev.RunChanged) == []
    commands = talk.wait(1)
    reason = "1 of 2 agents came within 300 s; start more agents, or lower min_agents"
    assert only(commands, ev.RunChanged) == ev.RunChanged("failed", reason)
    assert only(commands, ev.SaveRun).reason == reason


def test_a_wait_names_the_agents_that_are_here_for_another_task():
    talk = Talk(config(minimum=2, quorum=2))
    talk.prepared()
    talk.published()
    talk.come("a")
    talk.run.fleet.hear("zed", presence(task="two_workers.py:task"), retained=False)
    said = talk.run.status()
    assert said.startswith("waiting for agents: 1 of 2 are there (at most 60 min)")
    assert said.endswith("; zed was started with --task two_workers.py:task, the run's task is digits")
    for number in range(4):
        talk.run.fleet.hear(f"other-{number}", presence(task="mnist"), retained=False)
    assert talk.run.status().count("was started with") == 3
    assert talk.run.status().endswith("; and 2 more")


def test_a_round_that_waits_for_agents_names_those_that_are_here_for_another_task():
    talk = Talk(config())
    talk.to_collecting("a", "b")
    talk.leave("a", "b")
    talk.wait(31)
    talk.wait(2)
    talk.run.fleet.hear("zed", presence(task="mnist"), retained=False)
    assert talk.run.attempt.round.state is RoundState.SELECTING
    assert talk.run.status().endswith("; zed was started with --task mnist, the run's task is digits")


def test_a_run_waits_for_its_start_agents_before_the_first_round():
    talk = Talk(config(minimum=1, quorum=1, target=1, start_agents=3, over_select=1.0))
    talk.prepared()
    talk.published()
    talk.come("a", "b")
    assert talk.run.status().startswith("waiting for agents: 2 of 3 are there")
    talk.come("c")
    assert talk.run.state is RunState.IN_ROUND
    assert len(talk.run.attempt.round.awaited) == 1


def test_a_run_whose_start_agents_do_not_come_names_that_setting():
    talk = Talk(config(start_deadline_s=300, start_agents=5))
    talk.prepared()
    talk.published()
    talk.come("a", "b")
    talk.wait(300)
    assert talk.run.reason == "2 of 5 agents came within 300 s; start more agents, or lower start_agents"


def test_a_run_that_never_reaches_a_broker_says_so():
    talk = Talk(config(start_deadline_s=300), connected=False)
    talk.prepared()
    assert talk.run.status() == "waiting for the broker"
    talk.wait(300)
    assert talk.run.reason == "0 of 2 agents came within 300 s; the broker cannot be reached"


def test_the_start_deadline_begins_when_the_model_is_there_and_wakes_nobody_before():
    talk = Talk(config(start_deadline_s=300))
    talk.wait(1000)  # `Talk` finds a deadline in the past after each step
    talk.prepared()
    talk.wait(400)  # publishing takes its time too
    assert talk.run.state is RunState.PUBLISHING
    talk.come("a", "b")
    talk.published()
    assert talk.run.state is RunState.IN_ROUND


def test_a_run_to_which_nobody_came_while_it_published_fails_as_soon_as_it_has():
    talk = Talk(config(start_deadline_s=300))
    talk.prepared()
    talk.wait(400)
    talk.published()
    assert talk.run.state is RunState.FAILED


def test_a_run_whose_model_cannot_be_made_fails_with_the_reason():
    talk = Talk()
    commands = talk.hear(ev.PreparationFailed("no module named digits"))
    assert talk.run.state is RunState.FAILED
    assert only(commands, ev.SaveRun).reason == "no module named digits"


# Attempts.


def test_an_abandoned_attempt_is_tried_again_after_a_pause_that_doubles():
    talk = Talk(config(minimum=1, quorum=1, max_attempts=5))
    talk.to_collecting("a")
    opened = []
    for number in range(1, 5):
        commands = talk.refuse("a")
        assert only(commands, ev.RoundEnded).outcome == "abandoned"
        assert talk.run.deadline() - talk.now == 2 ** (number - 1)
        assert f"attempt {number} failed; trying again in" in talk.run.status()
        opened += of_kind(talk.wait(2 ** (number - 1)), ev.RoundOpened)
    assert opened == [ev.RoundOpened(1, attempt) for attempt in (2, 3, 4, 5)]


@pytest.mark.fault(2, 20)
def test_after_an_abandoned_attempt_the_model_is_put_to_the_broker_again_and_nothing_waits_for_that():
    """Whatever was there in its place, or was lost there, is so no more when agents are invited again."""
    talk = Talk(config(minimum=1, quorum=1, max_attempts=5))
    talk.to_collecting("a")
    commands = talk.refuse("a", "fetch")
    published = only(commands, ev.PublishModel)
    assert (published.round_num, published.digest) == (0, talk.run.version.digest)
    assert talk.run.state is RunState.WAITING
    assert only(talk.wait(1), ev.RoundOpened) == ev.RoundOpened(1, 2)
    assert talk.hear(ev.ModelPublished(0)) == []


def test_after_the_last_attempt_the_run_fails_with_the_last_reason():
    talk = Talk(config(minimum=1, quorum=1, max_attempts=2))
    talk.to_collecting("a")
    talk.refuse("a")
    talk.wait(1)
    commands = talk.refuse("a", "memory")
    assert talk.run.state is RunState.FAILED
    assert only(commands, ev.RunChanged).reason == (
        "round 1 was abandoned 2 times, the last time: "
        "0 updates, quorum is 1, with nobody left to wait for: a refused (memory)"
    )


def test_a_committed_round_gives_the_next_one_all_its_attempts():
    talk = Talk(config(max_attempts=2))
    talk.to_collecting()
    talk.refuse("a")
    talk.hear(ev.CloseAsked())
    talk.wait(1)
    updates(talk, "a", "b")
    assert only(talk.aggregated(), ev.SaveVersion).attempts == 2
    commands = talk.published()
    assert only(commands, ev.RoundOpened) == ev.RoundOpened(2, 1)


def test_an_update_of_an_abandoned_attempt_counts_in_the_next_one_without_an_invitation():
    talk = Talk(config(report_deadline_s=600))
    talk.to_collecting()
    talk.update("a")
    assert set(sent(talk.wait(600), Cancel)) == {"b"}
    commands = talk.wait(1)
    assert set(sent(commands, Invitation)) == {"b"}
    assert only(commands, ev.SaveAttempt).members == {"a": MemberState.REPORTED, "b": MemberState.INVITED}
    commands = talk.update("b")
    average = only(commands, ev.AggregateUpdates)
    assert [(update.agent_id, update.attempt) for update in average.updates] == [("a", 1), ("b", 2)]


def test_an_attempt_whose_updates_are_all_there_already_is_averaged_at_once():
    talk = aggregating()
    commands = talk.hear(ev.AggregationBroke("disk full"))
    assert only(commands, ev.RoundEnded).reason == "disk full"
    commands = talk.wait(1)
    assert len(only(commands, ev.AggregateUpdates).updates) == 2
    assert sent(commands, Invitation) == {}


def test_an_update_that_was_under_way_when_its_attempt_ended_is_late_and_may_be_offered_again():
    talk = Talk()
    talk.to_collecting()
    talk.offer("a")
    old = talk.address
    talk.hear(ev.CloseAsked())
    assert talk.run.tallies.counts["late", "closed"] == 1
    assert sent(talk.offer("a", address=old), Cancel)["a"].reason == "late"
    talk.wait(1)
    assert sent(talk.offer("a", address=old), Invitation)["a"].attempt == 2
    assert sent(talk.update("a"), Receipt)["a"].accepted


def test_a_header_that_comes_when_the_pause_is_over_finds_the_next_attempt_whether_or_not_a_timer_fired():
    answers = []
    for timer_fires in (True, False):
        talk = Talk()
        talk.to_collecting()
        old = talk.address
        talk.hear(ev.CloseAsked())
        commands = talk.hear(ev.TimePassed(), after_s=1.0) if timer_fires else []
        talk.now += 0.0 if timer_fires else 1.0
        commands += talk.hear(ev.UpdateOffered("a", header("a", old)))
        answers.append([send for send in of_kind(commands, ev.Send) if send.agent_id == "a"])
    assert answers[0] == answers[1]
    assert {type(send.message) for send in answers[0]} == {Invitation}


def test_the_operator_closes_a_round_with_what_has_come():
    talk = Talk(config(quorum=1))
    talk.to_collecting()
    talk.update("a")
    commands = talk.hear(ev.CloseAsked())
    assert [update.agent_id for update in only(commands, ev.AggregateUpdates).updates] == ["a"]
    assert set(sent(commands, Cancel)) == {"b"}


# The broker.


def test_without_a_broker_no_attempt_begins_and_none_is_used_up():
    talk = Talk(config(minimum=1, quorum=1))
    talk.to_collecting("a")
    talk.hear(ev.BrokerLost("gone"))
    talk.refuse("a")
    talk.wait(3600)
    assert talk.run.state is RunState.WAITING
    assert talk.run.status() == "waiting for the broker"
    assert only(talk.hear(ev.BrokerConnected()), ev.PublishModel).round_num == 0
    assert only(talk.published(), ev.RoundOpened) == ev.RoundOpened(1, 2)


def test_a_broker_that_comes_back_in_the_middle_of_a_round_gets_the_model_and_calls_the_roll_again():
    talk = Talk()
    talk.to_collecting()
    talk.update("a")
    talk.fleet.lose_all()
    talk.hear(ev.BrokerLost("gone"))
    talk.wait(5)
    commands = talk.hear(ev.BrokerConnected())
    assert only(commands, ev.PublishModel) == ev.PublishModel(0, version_digest(0))
    assert only(commands, ev.CallRoll)
    assert talk.run.state is RunState.IN_ROUND
    assert set(sent(talk.come("a", "b"), Invitation)) == {"b"}  # they answer; a has reported already
    assert talk.run.attempt.round.members == {"a": MemberState.REPORTED, "b": MemberState.INVITED}
    talk.update("b")
    talk.aggregated()
    assert talk.run.version == Version(1, version_digest(1))


def test_agents_that_answer_no_roll_call_for_a_minute_after_the_broker_came_back_are_lost():
    talk = Talk(config(quorum=1))
    talk.to_collecting()
    talk.fleet.lose_all()
    talk.hear(ev.BrokerLost("gone"))
    talk.hear(ev.BrokerConnected())
    talk.come("a")
    talk.accept("a")
    talk.wait(59)
    assert talk.run.attempt.round.members["b"] is MemberState.ACCEPTED
    talk.wait(1)
    assert talk.run.attempt.round.members == {"a": MemberState.ACCEPTED, "b": MemberState.LOST}
    assert [update.agent_id for update in only(talk.update("a"), ev.AggregateUpdates).updates] == ["a"]


def test_a_second_loss_of_the_broker_gives_agents_a_minute_of_their_own():
    talk = Talk()
    talk.to_collecting()
    for _ in range(3):
        talk.fleet.lose_all()
        talk.hear(ev.BrokerLost("gone"))
        talk.wait(60)
        talk.hear(ev.BrokerConnected())
        talk.wait(40)
    assert set(talk.run.attempt.round.members.values()) == {MemberState.ACCEPTED}


def test_the_roll_is_called_now_and_then_since_a_birth_may_have_been_lost():
    talk = Talk()
    talk.to_collecting()
    # The first call was at 0 s; while nobody is wanted the next is due 10 + 300 s later, and the one after at 620 s.
    assert len(of_kind(talk.wait(309), ev.CallRoll)) == 0
    assert len(of_kind(talk.wait(290), ev.CallRoll)) == 1


def test_an_abandoned_attempt_calls_the_roll_and_draws_those_that_failed_it_last():
    talk = Talk(config(target=1, minimum=1, quorum=1, over_select=1.0))
    talk.prepared()
    talk.published()
    (silent,) = sent(talk.come("a"), Invitation)
    talk.accept(silent)
    commands = talk.hear(ev.CloseAsked())
    assert only(commands, ev.CallRoll)
    talk.come("b", "c", "d", "e")
    (drawn,) = sent(talk.wait(1), Invitation)
    assert drawn != silent


def test_the_end_of_a_publication_that_was_cut_off_does_not_count():
    talk = Talk()
    talk.prepared()
    talk.hear(ev.BrokerLost("gone"))
    talk.published()
    assert talk.run.state is RunState.WAITING
    talk.hear(ev.BrokerConnected())
    assert talk.run.state is RunState.PUBLISHING
    assert only(talk.published(), ev.PhaseEnded).phase == "publishing"


def test_a_broker_that_goes_at_the_end_does_not_keep_a_run_from_being_done():
    talk = aggregating(rounds=1)
    talk.hear(ev.BrokerLost("gone"))
    talk.aggregated()
    assert talk.run.state is RunState.FINISHING
    talk.evaluated(1)
    assert talk.run.state is RunState.DONE


# Evaluation.


def commit(talk: Talk) -> list[ev.Command]:
    updates(talk, "a", "b")
    return talk.aggregated()


def test_the_next_round_runs_while_a_version_is_evaluated_and_the_one_after_waits_for_it():
    talk = Talk(config(rounds=4))
    talk.to_collecting()  # version 0 is evaluated
    commit(talk)
    assert only(talk.published(), ev.RoundOpened).round_num == 2
    commit(talk)  # versions 1 and 2 are under way
    assert of_kind(talk.published(), ev.RoundOpened) == []
    assert talk.run.state is RunState.WAITING
    assert talk.run.status() == "waiting for the evaluation of round 1"
    assert only(talk.evaluated(1), ev.RoundOpened).round_num == 3


def test_never_more_than_two_evaluations_are_under_way():
    talk = Talk(config(rounds=12))
    talk.prepared()
    talk.published()
    talk.come("a", "b")
    under_way = {0}
    while talk.run.state is not RunState.DONE:
        if talk.run.state is RunState.IN_ROUND:
            under_way |= {command.round_num for command in of_kind(commit(talk), ev.EvaluateModel)}
            talk.published()
        else:
            round_num = min(under_way)
            under_way.discard(round_num)
            talk.evaluated(round_num)
        assert len(under_way) <= 2
    assert talk.run.version == Version(12, version_digest(12))


def test_every_third_version_is_evaluated_and_the_last():
    talk = Talk(config(rounds=7, training=TrainingConfig(evaluate_every=3)))
    commands = talk.prepared()
    evaluated = [command.round_num for command in of_kind(commands, ev.EvaluateModel)]
    talk.published()
    talk.come("a", "b")
    while talk.run.state is not RunState.DONE:
        for round_num in list(talk.run.scoring.owed):
            talk.evaluated(round_num)
        if talk.run.state is RunState.IN_ROUND:
            evaluated += [command.round_num for command in of_kind(commit(talk), ev.EvaluateModel)]
            talk.published()
    assert evaluated == [0, 3, 6, 7]


def test_a_run_that_goes_on_owes_no_evaluation_of_a_version_that_is_passed_over():
    scoring = Scoring(config(rounds=7, training=TrainingConfig(evaluate_every=3)))
    scoring.restore(None, [Version(number, version_digest(number)) for number in (3, 4)])
    assert list(scoring.owed) == [3]


def test_the_best_version_is_the_one_of_the_highest_metric_and_the_first_of_equals():
    talk = Talk()
    talk.prepared()
    for round_num, accuracy in ((0, 0.1), (1, 0.7), (2, 0.7), (3, 0.6)):
        talk.evaluated(round_num, accuracy)
    assert talk.run.best == (1, 0.7)


def test_the_best_version_can_be_the_one_of_the_lowest_loss():
    talk = Talk(config(best_metric="loss", best_is_max=False))
    talk.prepared()
    for round_num, accuracy in ((0, 0.1), (1, 0.7), (2, 0.5)):
        talk.evaluated(round_num, accuracy)
    assert talk.run.best == (1, pytest.approx(0.3))  # loss is 1 - accuracy here


def test_a_metric_that_is_missing_or_not_finite_makes_no_version_the_best():
    talk = Talk(config(best_metric="loss", best_is_max=False))
    talk.prepared()
    talk.hear(ev.ModelEvaluated(0, Evaluation(num_examples=1, loss=math.nan)))
    assert talk.run.best is None
    talk.evaluated(1, 0.9)
    assert talk.run.best == (1, pytest.approx(0.1))
    talk = Talk(config(best_metric="f1"))
    talk.prepared()
    talk.evaluated(0)
    assert talk.run.best is None


def commit_evaluated(talk: Talk, *scores: Evaluation | None) -> list[ev.Command]:
    """Agents a, b, ... report with these evaluations of the version before, and the round is committed."""
    for agent_id, score in zip("abcdef", scores, strict=False):
        talk.update(agent_id, evaluation=score)
    return talk.aggregated()


SCORES = (
    Evaluation(num_examples=10, loss=1.0, metrics={"accuracy": 0.5, "f1": 0.1}),
    Evaluation(num_examples=30, loss=3.0, metrics={"accuracy": 0.9}),
)


def test_federated_evaluation_is_the_mean_over_examples_of_the_version_before():
    talk = Talk()
    talk.to_collecting()
    saved = [save for save in of_kind(commit_evaluated(talk, *SCORES), ev.SaveEvaluation) if save.source == "federated"]
    (save,) = saved
    assert save.round_num == 0
    # loss (10 * 1 + 30 * 3) / 40 = 2.5; accuracy (10 * 0.5 + 30 * 0.9) / 40 = 0.8; only one agent has f1
    assert (save.score.num_examples, save.score.loss) == (40, pytest.approx(2.5))
    assert save.score.metrics == {"accuracy": pytest.approx(0.8)}


def test_agents_that_evaluated_nothing_do_not_weigh_in():
    talk = Talk()
    talk.to_collecting()
    save = only(commit_evaluated(talk, None, SCORES[1]), ev.SaveEvaluation)
    assert save.score == Evaluation(num_examples=30, loss=3.0, metrics={"accuracy": 0.9})
    talk = Talk()
    talk.to_collecting()
    assert of_kind(commit_evaluated(talk, None, None), ev.SaveEvaluation) == []


def test_with_test_data_the_coordinators_own_evaluation_decides_what_is_best():
    talk = Talk()
    talk.to_collecting()  # version 0 has accuracy 0.5 there
    commit_evaluated(talk, *SCORES)
    assert talk.run.best == (0, 0.5)


def test_without_test_data_the_agents_evaluation_decides_what_is_best():
    talk = Talk()
    talk.prepared()
    talk.hear(ev.ModelEvaluated(0, None))
    talk.published()
    talk.come("a", "b")
    commands = commit_evaluated(talk, *SCORES)
    assert talk.run.best == (0, pytest.approx(0.8))
    assert of_kind(commands, ev.EvaluateModel) == []  # nothing to evaluate on


def test_an_evaluation_that_failed_does_not_mean_that_there_is_no_test_data():
    talk = Talk()
    talk.prepared()
    assert of_kind(talk.hear(ev.ModelEvaluated(0, None, "out of memory")), ev.SaveEvaluation) == []
    talk.published()
    talk.come("a", "b")
    commands = commit_evaluated(talk, *SCORES)
    assert talk.run.best is None
    assert only(commands, ev.EvaluateModel).round_num == 1


def test_a_run_without_evaluation_evaluates_nothing_and_waits_for_nothing():
    talk = Talk(config(rounds=3, evaluate=False))
    assert of_kind(talk.prepared(), ev.EvaluateModel) == []
    talk.published()
    talk.come("a", "b")
    while talk.run.state is not RunState.DONE:
        assert of_kind(commit(talk), ev.EvaluateModel) == []
        talk.published()
    assert talk.run.version == Version(3, version_digest(3))


# Stopping.


def test_a_stopped_run_keeps_everything_and_tells_agents_nothing():
    talk = Talk()
    talk.to_collecting()
    talk.offer("a")
    commands = talk.hear(ev.StopAsked())
    assert talk.run.state is RunState.STOPPED
    assert only(commands, ev.SaveRun).state == "stopped"
    assert of_kind(commands, ev.Send) == []
    assert talk.frame("a", 0) == []
    assert talk.hear(ev.UpdateOffered("a", header("a", talk.address))) == []
    assert talk.run.deadline() == math.inf


def test_after_the_end_agents_that_still_work_are_told_so():
    talk = aggregating(rounds=1)
    talk.aggregated()
    talk.published()
    talk.evaluated(1)
    assert talk.run.state is RunState.DONE
    old = Address(RUN_ID, EPOCH, 1, 1)
    assert sent(talk.offer("c", address=old), Cancel)["c"] == Cancel(**old._asdict(), reason="run_ended")
    assert talk.offer("c", address=old._replace(epoch=EPOCH + 1)) == []
    assert talk.aggregated() == []


# Restarts.


def resumed(**changes: Any) -> Resumed:
    fields: dict[str, Any] = {"version": Version(1, version_digest(1)), "layout": LAYOUT, "framing": FRAMING}
    return Resumed(**(fields | changes))


def update_of(agent_id: str, attempt: int = 1) -> ev.AcceptedUpdate:
    return ev.AcceptedUpdate(agent_id, attempt, digest_of_update(agent_id), 10, (), 1.0)


def present(*agent_ids: str) -> Fleet:
    fleet = Fleet()
    for agent_id in agent_ids:
        fleet.hear(agent_id, presence(), retained=False)
    return fleet


def test_a_run_resumed_between_rounds_publishes_its_version_and_goes_on():
    talk = Talk(config(rounds=3), resumed=resumed(), epoch=EPOCH + 1)
    assert of_kind(talk.first, ev.PrepareModel) == []
    assert only(talk.first, ev.PublishModel) == ev.PublishModel(1, version_digest(1))
    talk.published()
    assert talk.run.attempt.address == Address(RUN_ID, EPOCH + 1, 2, 1)
    assert {message.round_num for message in sent(talk.come("a", "b"), Invitation).values()} == {2}


def test_a_run_resumed_after_an_abandoned_attempt_counts_it():
    talk = Talk(config(rounds=3), resumed=resumed(attempt=3, round_state=RoundState.ABANDONED), fleet=present("a", "b"))
    assert only(talk.published(), ev.RoundOpened) == ev.RoundOpened(2, 4)


def test_a_run_resumed_while_selecting_begins_with_the_agents_that_are_there_already():
    begun = resumed(attempt=2, round_state=RoundState.SELECTING)
    talk = Talk(config(rounds=3), resumed=begun, fleet=present("a", "b"))
    assert set(sent(talk.first, Invitation)) == {"a", "b"}
    assert talk.run.attempt.address.attempt == 2


def test_a_run_resumed_while_selecting_calls_the_roll_and_waits_for_agents():
    talk = Talk(config(rounds=3), resumed=resumed(attempt=1, round_state=RoundState.SELECTING), connected=False)
    assert of_kind(talk.hear(ev.BrokerConnected()), ev.CallRoll) == [ev.CallRoll()]
    assert set(sent(talk.come("a", "b"), Invitation)) == {"a", "b"}


def collecting_again(**changes: Any) -> Talk:
    members = {"a": MemberState.REPORTED, "b": MemberState.ACCEPTED, "c": MemberState.INVITED}
    begun = resumed(attempt=2, round_state=RoundState.COLLECTING, members=members, accepted=[update_of("a")], **changes)
    return Talk(config(rounds=3, quorum=3), resumed=begun, epoch=EPOCH + 1)


def test_a_run_resumed_while_collecting_keeps_accepted_updates_and_invites_the_rest_at_its_new_epoch():
    talk = collecting_again()
    told = sent(talk.first, Invitation)
    assert {agent_id: (m.epoch, m.attempt) for agent_id, m in told.items()} == {
        "b": (EPOCH + 1, 2),
        "c": (EPOCH + 1, 2),
    }
    assert only(talk.first, ev.PublishModel).round_num == 1
    updates(talk, "b", "c")
    average = talk.run.attempt.round
    assert average.state is RoundState.AGGREGATING
    assert average.reported == ("a", "b", "c")


def test_agents_that_missed_the_restart_are_set_right_when_they_speak():
    talk = collecting_again()
    old = Address(RUN_ID, EPOCH, 2, 2)
    assert sent(talk.offer("b", address=old), Invitation)["b"].epoch == EPOCH + 1
    assert sent(talk.offer("a", address=old), Receipt)["a"].accepted
    frame = Frame(0, run_tag(RUN_ID), 2, 0, 4, content_tag(digest_of_update("b")), memoryview(b""))
    assert talk.run.frame_verdict("b", frame, 0) is Verdict.UNANNOUNCED


def test_a_run_resumed_while_averaging_averages_the_same_updates_again():
    members = {"a": MemberState.REPORTED, "b": MemberState.REPORTED, "c": MemberState.ACCEPTED}
    begun = resumed(
        attempt=1,
        round_state=RoundState.AGGREGATING,
        members=members,
        accepted=[update_of("b"), update_of("a")],
    )
    talk = Talk(config(rounds=3), resumed=begun, connected=False)
    average = only(talk.first, ev.AggregateUpdates)
    assert [update.agent_id for update in average.updates] == ["a", "b"]
    assert average.base_digest == version_digest(1)
    assert only(talk.aggregated(), ev.SaveVersion).parent == version_digest(1)


def test_a_run_resumed_after_its_last_round_is_done_once_it_is_published_and_evaluated():
    owed = [Version(1, version_digest(1))]
    talk = Talk(config(rounds=1), resumed=resumed(unevaluated=owed, best=(0, 0.9)))
    assert only(talk.first, ev.EvaluateModel) == ev.EvaluateModel(1, version_digest(1))
    talk.published()
    talk.evaluated(1, 0.5)
    assert talk.run.state is RunState.DONE
    assert talk.run.best == (0, 0.9)


def test_a_resumed_run_owes_no_more_than_two_evaluations_and_begins_no_round_before_one_is_in():
    owed = [Version(0, version_digest(0)), Version(1, version_digest(1))]
    talk = Talk(config(rounds=3), resumed=resumed(unevaluated=owed), fleet=present("a", "b"))
    assert [command.round_num for command in of_kind(talk.first, ev.EvaluateModel)] == [0, 1]
    assert of_kind(talk.published(), ev.RoundOpened) == []
    assert only(talk.evaluated(0), ev.RoundOpened).round_num == 2


def test_a_resumed_run_does_not_fail_for_want_of_agents_at_its_start():
    talk = Talk(config(rounds=3, start_deadline_s=10, selection_deadline_s=60), resumed=resumed())
    talk.published()
    talk.wait(30)
    assert talk.run.state is RunState.IN_ROUND


# Whatever comes.


def random_header(rng: random.Random, talk: Talk, agent_id: str) -> ev.UpdateOffered:
    """A header that is right in part."""
    attempt = talk.run.attempt
    address = attempt.address if attempt is not None else Address(RUN_ID, EPOCH, 1, 1)
    changes: dict[str, Any] = {"model_digest": talk.run.version.digest} if talk.run.version else {}
    match rng.randrange(12):
        case 0:
            address = address._replace(epoch=rng.randrange(6))
        case 1:
            address = address._replace(attempt=rng.randrange(4))
        case 2:
            address = address._replace(round_num=rng.randrange(4))
        case 3:
            changes |= {"num_examples": rng.choice((0, 2**53))}
        case 4:
            changes |= {"num_frames": 2}
        case 5:
            changes |= {"model_digest": digest("other")}
    salt = rng.choice(("", "", "", "again"))
    stored = {index: facts(agent_id, index, salt) for index in range(3) if rng.random() < 0.1}
    return ev.UpdateOffered(agent_id, header(agent_id, address, salt=salt, **changes), stored)


def random_event(rng: random.Random, talk: Talk) -> ev.Event | None:
    """Anything that a fleet, a broker, an operator or our own parts may bring about now."""
    agent_id = rng.choice("abcdef")
    attempt = talk.run.attempt
    match rng.randrange(16):
        case 0 | 1 | 2:
            return random_header(rng, talk, agent_id)
        case 3 | 4 | 5 | 6 | 7 if attempt is not None and agent_id in attempt.uplink.transfers:
            transfer = attempt.uplink.transfers[agent_id]
            lacking = [index for index in range(3) if index not in transfer.frames]
            if transfer.header is None or not lacking:
                return None
            said = "" if transfer.header.update_digest == digest_of_update(agent_id) else "again"
            salt = rng.choices((said, "corrupt"), (20, 1))[0]
            squares = rng.choices((1.0, math.nan), (50, 1))[0]
            index = rng.choice(lacking)
            return ev.FrameStored(agent_id, index, facts(agent_id, index, salt, squares))
        case 8 if attempt is not None:
            kind = rng.choice((Acceptance, Acceptance, Acceptance, Refusal))
            extra = {"reason": "battery"} if kind is Refusal else {}
            return ev.MessageCame(agent_id, kind(**attempt.address._asdict(), **extra))
        case 9 | 10:
            born = presence(rng.choice("12"), online=rng.random() < 0.7)
            change = talk.fleet.hear(agent_id, born, retained=False)
            return None if change is None else ev.FleetMoved(agent_id, change)
        case 11:
            return ev.FrameDropped(agent_id, rng.choice(list(Verdict)))
        case 12 if talk.run.version is not None:
            return ev.ModelPublished(talk.run.version.round_num)
        case 13:
            rare = rng.choice((ev.BrokerConnected(), ev.BrokerLost("gone"), ev.CloseAsked()))
            return rare if rng.random() < 0.2 else ev.BrokerConnected()
        case 14 if talk.run.version is not None:
            score = Evaluation(num_examples=1, loss=rng.random(), metrics={"accuracy": rng.random()})
            checking = attempt is not None and attempt.round.state is RoundState.CHECKING
            number = talk.run.current_round if checking else rng.randrange(talk.run.version.round_num + 1)
            return ev.ModelEvaluated(number, *rng.choices(((score,), (None, "it crashed")), (9, 1))[0])
        case 15 if attempt is not None and attempt.round.state is RoundState.AGGREGATING:
            if rng.random() < 0.3:
                return ev.AggregationBroke("disk full")
            return ev.UpdatesAggregated(version_digest(talk.run.current_round), 1.0)
    return None


@pytest.mark.parametrize("seed", measured.first(10, range(60)))
def test_whatever_comes_a_run_never_raises_and_every_header_meets_one_fate(seed: int):
    rng = random.Random(seed)
    target = rng.choice((0, 0, 2, 3))
    settings = config(
        rounds=20,
        minimum=2,
        quorum=2,
        target=target,
        report_deadline_s=120.0,
        max_attempts=1000,
        evaluate=rng.random() < 0.5,
        is_checked=seed % 2 == 0,
        held_out=HeldOutGate(max_loss_ratio=1.5) if seed % 2 == 0 else HeldOutGate(),
        quarantine=QuarantineConfig(after=rng.choice((0, 1, 3))),
    )
    talk = Talk(settings)
    talk.prepared()
    received = 0
    for _ in range(600):
        if rng.random() < 0.1:
            talk.now += rng.choice((0.01, 1.0, 30.0))
        event = random_event(rng, talk)
        if event is not None:
            received += isinstance(event, ev.UpdateOffered) and talk.run.state not in FINAL
            for send in of_kind(talk.hear(event), ev.Send):  # `Talk` checks the invariants after each step
                assert isinstance(send.message, Invitation | Credit | Receipt | Cancel)
    assert talk.run.tallies.num_received == received


def test_random_runs_commit_rounds():
    """The test above would prove little if its runs never came to anything."""
    talk = Talk(config(rounds=20, max_attempts=1000, evaluate=False, quarantine=QuarantineConfig(after=0)))
    talk.prepared()
    rng = random.Random(5)
    for _ in range(6000):
        event = random_event(rng, talk)
        if event is not None:
            talk.hear(event)
        talk.now += 0.05
    assert talk.run.current_round > 5
    fates = {outcome for outcome, _ in talk.run.tallies.counts}
    assert fates == {"received", "accepted", "rejected", "late", "duplicate"}


# Agents that are visited in turn, and what a strategy remembers.


def in_turn(order: tuple[str, ...] = (), min_agents: int = 2) -> Talk:
    bounds = {"target": 1, "minimum": 1, "quorum": 1, "over_select": 1.0, "in_turn": True, "visit_order": order}
    talk = Talk(config(rounds=4, min_agents=min_agents, evaluate=False, **bounds))
    talk.prepared()
    talk.published()
    return talk


def visit(talk: Talk, agent_id: str) -> list[ev.Command]:
    """The agent's update comes, is aggregated and published."""
    assert only(talk.update(agent_id), ev.AggregateUpdates).updates[0].agent_id == agent_id
    talk.aggregated()
    return talk.published()


def test_the_first_visit_waits_for_as_many_agents_as_the_operator_wants():
    talk = in_turn()
    assert sent(talk.come("bob"), Invitation) == {}
    assert talk.run.status().startswith("waiting for agents: 1 of 2 are there")
    assert talk.run.num_missing == 1
    assert set(sent(talk.come("alice"), Invitation)) == {"alice"}
    assert talk.run.num_missing == 0
    assert set(sent(visit(talk, "alice"), Invitation)) == {"bob"}


def test_each_visit_starts_from_what_the_last_one_left_and_goes_on_with_whoever_is_there():
    talk = in_turn(("bob", "alice"))
    talk.come("alice")
    invited = sent(talk.come("bob"), Invitation)
    assert invited["bob"].model_digest == version_digest(0)
    invited = sent(visit(talk, "bob"), Invitation)
    assert invited["alice"].model_digest == version_digest(1)
    talk.leave("bob")
    invited = sent(visit(talk, "alice"), Invitation)  # bob's turn, and he is gone
    assert set(invited) == {"alice"}
    assert invited["alice"].model_digest == version_digest(2)
    assert talk.run.num_missing == 0


def test_an_agent_that_is_not_in_the_order_is_never_visited_nor_waited_for():
    talk = in_turn(("bob", "alice"))
    assert sent(talk.come("eve", "bob"), Invitation) == {}
    assert talk.run.num_available == 1
    assert set(sent(talk.come("alice"), Invitation)) == {"bob"}


def test_what_the_strategy_remembers_is_saved_with_its_version_and_handed_to_the_next_round():
    talk = aggregating(evaluate=False)
    state = digest("state 1")
    commands = talk.hear(ev.UpdatesAggregated(version_digest(1), 1.0, state))
    assert only(commands, ev.SaveVersion).server_state == state
    assert talk.run.version == Version(1, version_digest(1), state)
    talk.published()
    average = only(updates(talk, "a", "b"), ev.AggregateUpdates)
    assert (average.base_digest, average.server_state) == (version_digest(1), state)


def test_a_resumed_run_hands_on_what_the_strategy_remembers():
    state = digest("state 1")
    talk = Talk(resumed=resumed(version=Version(1, version_digest(1), state)))
    talk.published()
    talk.come("a", "b")
    assert only(updates(talk, "a", "b"), ev.AggregateUpdates).server_state == state
