"""One attempt with its messages: what each agent is told, which updates count, and that every header meets one fate."""

from __future__ import annotations

import math
from typing import Any

import pytest

from coordinator import run_events as ev
from coordinator.attempt import Address, Tallies
from coordinator.round import MemberState, RoundState
from coordinator.uplink import FrameFacts, Verdict
from midge.wire.frames import Frame, content_tag, run_tag
from midge.wire.messages import (
    Acceptance,
    Cancel,
    Credit,
    Evaluation,
    Invitation,
    Progress,
    Receipt,
    TrainingConfig,
)
from tests.machines import (
    EPOCH,
    RUN_ID,
    Talk,
    config,
    digest,
    digest_of_update,
    facts,
    header,
    of_kind,
    only,
    sent,
    version_digest,
)


def collecting(*agent_ids: str, **changes: Any) -> Talk:
    """A run whose first round waits for the updates of these agents, a and b where none is named."""
    talk = Talk(config(**changes))
    talk.to_collecting(*agent_ids)
    return talk


def tally(talk: Talk, outcome: str, reason: str = "") -> int:
    return talk.run.tallies.counts[outcome, reason]


def states(talk: Talk) -> dict[str, MemberState]:
    assert talk.run.attempt is not None
    return talk.run.attempt.round.members


def frame(agent_id: str, index: int = 0, **changes: Any) -> Frame:
    """A frame as it comes, of the update that `header` announces, but for `changes`."""
    fields: dict[str, Any] = {
        "codec": 0,
        "run_tag": run_tag(RUN_ID),
        "round_num": 1,
        "index": index,
        "num_elements": 2 if index == 2 else 4,
        "content_tag": content_tag(digest_of_update(agent_id)),
        "body": memoryview(b""),
    }
    return Frame(**(fields | changes))


# The happy path.


def test_an_invitation_says_what_to_train_on_how_and_for_how_long():
    talk = Talk(config(training=TrainingConfig(local_epochs=3), report_deadline_s=600))
    commands = talk.to_collecting()
    assert sent(commands, Invitation)["a"] == Invitation(
        run_id=RUN_ID,
        epoch=EPOCH,
        round_num=1,
        attempt=1,
        model_digest=version_digest(0),
        task="digits",
        training=TrainingConfig(local_epochs=3),
        seed=7,
        credit=3,
        deadline_s=600.0,
    )
    assert {send.expiry_s for send in of_kind(commands, ev.Send)} == {600.0}


def test_an_invitation_that_is_repeated_says_how_much_time_is_left():
    talk = collecting()
    (invitation,) = sent(talk.leave("a") + talk.wait(20) + talk.come("a"), Invitation).values()
    assert invitation.deadline_s == 580.0


def test_a_header_is_answered_with_credit_and_the_last_frame_with_a_receipt():
    talk = collecting()
    assert sent(talk.offer("a"), Credit) == {
        "a": Credit(**talk.address._asdict(), missing=((0, 3),), credit=3, need_header=False)
    }
    assert sent(talk.frame("a", 1), Credit)["a"].missing == ((0, 1), (2, 3))
    talk.frame("a", 0)
    commands = talk.frame("a", 2)
    receipt = Receipt(**talk.address._asdict(), update_digest=digest_of_update("a"), accepted=True)
    assert sent(commands, Receipt) == {"a": receipt}
    assert (tally(talk, "received"), tally(talk, "accepted")) == (1, 1)
    assert states(talk)["a"] is MemberState.REPORTED


def test_an_accepted_update_is_saved_with_all_that_its_header_said_in_the_step_that_answers():
    talk = collecting()
    score = Evaluation(num_examples=5, loss=0.5, metrics={"accuracy": 0.8})
    talk.offer("a", num_examples=12, training_s=3.5, metrics={"loss": 0.25}, evaluation=score)
    commands = talk.frame("a", 0, sum_squares=9.0) + talk.frame("a", 1, sum_squares=16.0)
    assert of_kind(commands, ev.SaveUpdate) == []
    commands = talk.frame("a", 2, sum_squares=0.0)
    update = ev.AcceptedUpdate("a", 1, digest_of_update("a"), 12, (), 5.0, 3.5, {"loss": 0.25}, score)
    assert only(commands, ev.SaveUpdate) == ev.SaveUpdate(1, update)
    assert only(commands, ev.SaveAttempt).members["a"] is MemberState.REPORTED
    assert only(commands, ev.SaveTallies).tallies["accepted", ""] == 1


def test_a_header_stands_for_an_acceptance_that_was_lost():
    talk = Talk()
    talk.prepared()
    talk.published()
    talk.come("a", "b")
    assert states(talk)["a"] is MemberState.INVITED
    talk.offer("a")
    assert states(talk)["a"] is MemberState.ACCEPTED


def test_frames_that_were_kept_from_before_make_an_update_complete_at_once():
    talk = collecting()
    commands = talk.offer("a", stored={index: facts("a", index) for index in range(3)})
    assert sent(commands, Receipt)["a"].accepted
    assert sent(commands, Credit) == {}


def test_what_an_agent_says_of_its_work_is_noted():
    talk = collecting()
    commands = talk.hear(ev.MessageCame("a", Progress(**talk.address._asdict(), phase="training", fraction=0.5)))
    assert only(commands, ev.AgentSpoke) == ev.AgentSpoke("a", "training", 0.5)
    assert of_kind(talk.accept("a"), ev.AgentSpoke) == [ev.AgentSpoke("a", "accepted")]
    assert of_kind(talk.refuse("a"), ev.AgentSpoke) == [ev.AgentSpoke("a", "refused", 0.0, "battery")]


def test_words_to_another_address_or_of_a_stranger_are_ignored():
    talk = collecting()
    for address in (
        talk.address._replace(epoch=EPOCH - 1),
        talk.address._replace(attempt=2),
        talk.address._replace(round_num=2),
        talk.address._replace(run_id="other"),
    ):
        assert talk.hear(ev.MessageCame("a", Acceptance(**address._asdict()))) == []
    assert talk.accept("stranger") == []


# Again, and late.


@pytest.mark.fault(5)
def test_the_same_header_again_is_answered_with_what_is_missing_and_counted_as_a_duplicate():
    talk = collecting()
    talk.offer("a")
    talk.frame("a", 0)
    assert sent(talk.offer("a"), Credit)["a"].missing == ((1, 3),)
    assert (tally(talk, "received"), tally(talk, "duplicate")) == (2, 1)


@pytest.mark.fault(5)
def test_the_header_of_an_accepted_update_is_answered_with_its_receipt_again():
    talk = collecting()
    talk.update("a")
    assert sent(talk.offer("a"), Receipt)["a"].accepted
    assert (tally(talk, "received"), tally(talk, "accepted"), tally(talk, "duplicate")) == (2, 1, 1)


def test_an_agent_that_offers_another_update_than_the_one_that_counts_is_told_to_stop():
    talk = collecting()
    talk.update("a")
    assert sent(talk.offer("a", salt="trained again"), Cancel)["a"].reason == "closed"
    assert tally(talk, "duplicate") == 1


def test_another_update_of_the_same_agent_replaces_the_one_under_way_and_its_frames_are_forgotten():
    talk = collecting()
    talk.offer("a")
    talk.frame("a", 0)
    commands = talk.offer("a", salt="again")
    assert sent(commands, Credit)["a"].missing == ((0, 3),)
    assert only(commands, ev.ForgetFrames) == ev.ForgetFrames("a", digest_of_update("a"))
    assert tally(talk, "late", "replaced") == 1
    assert sent(talk.frames("a", "again"), Receipt)["a"].accepted


def test_an_update_that_comes_after_the_round_has_closed_is_cancelled():
    talk = collecting("a", "b", "c", minimum=3, quorum=2, report_deadline_s=600)
    talk.update("a")
    talk.update("b")
    talk.offer("c")
    commands = talk.wait(600)
    assert sent(commands, Cancel)["c"].reason == "closed"
    assert tally(talk, "late", "closed") == 1
    assert sent(talk.offer("c"), Cancel)["c"].reason == "late"
    assert tally(talk, "late", "closed") == 2
    assert talk.frame("c", 0) == []  # it was on its way


@pytest.mark.fault(7, 18)
def test_a_header_of_an_older_epoch_or_attempt_is_answered_with_an_invitation():
    for change in ({"epoch": EPOCH - 1}, {"attempt": 0}):
        talk = collecting()
        old = talk.address._replace(**change)
        commands = talk.offer("a", address=old)
        assert sent(commands, Invitation)["a"].epoch == EPOCH
        assert sent(commands, Cancel) == {}
        assert tally(talk, "late", "stale") == 1


@pytest.mark.fault(7, 18)
def test_a_header_of_another_round_or_run_is_cancelled_at_its_own_address():
    for change in ({"round_num": 2}, {"run_id": "other"}):
        talk = collecting()
        old = talk.address._replace(**change)
        told = sent(talk.offer("a", address=old), Cancel)["a"]
        assert told == Cancel(**old._asdict(), reason="late")
        assert tally(talk, "late", "stale") == 1


@pytest.mark.fault(7)
def test_a_header_for_a_newer_coordinator_is_left_to_that_one():
    for agent_id in ("a", "stranger"):
        talk = collecting()
        commands = talk.offer(agent_id, address=talk.address._replace(epoch=EPOCH + 1))
        assert of_kind(commands, ev.Send) == []
        assert tally(talk, "late", "stale") == 1


def test_an_accepted_update_that_is_offered_at_an_old_address_gets_its_receipt_there():
    talk = collecting()
    talk.update("a")
    old = talk.address._replace(epoch=EPOCH - 1)
    told = sent(talk.offer("a", address=old), Receipt)["a"]
    assert told == Receipt(**old._asdict(), update_digest=digest_of_update("a"), accepted=True)
    assert tally(talk, "duplicate") == 1


# Rejections.


@pytest.mark.fault(11, 12)
@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("model_digest", {"model_digest": digest("other")}),
        ("layout", {"layout_digest": digest("other")}),
        ("num_frames", {"num_frames": 4}),
        ("num_examples", {"num_examples": 0}),
        ("counters", {"counters": (1,)}),
    ],
)
def test_a_header_that_fails_a_gate_is_rejected_before_any_frame_is_taken(reason: str, changes: dict[str, Any]):
    talk = collecting()
    commands = talk.offer("a", **changes)
    receipt = sent(commands, Receipt)["a"]
    assert (receipt.accepted, receipt.reason) == (False, reason)
    assert receipt.detail
    assert sent(commands, Credit) == {}
    assert states(talk)["a"] is MemberState.REJECTED
    assert talk.run.frame_verdict("a", frame("a"), 0) is Verdict.STALE
    assert tally(talk, "rejected", reason) == 1
    again = sent(talk.offer("a"), Receipt)["a"]
    assert (again.accepted, again.reason) == (False, reason)
    assert tally(talk, "duplicate") == 1


@pytest.mark.fault(10)
@pytest.mark.parametrize(("reason", "squares"), [("not_finite", math.nan), ("not_finite", math.inf), ("norm", 1e6)])
def test_an_update_whose_elements_fail_a_gate_is_rejected_and_its_frames_are_forgotten(reason: str, squares: float):
    talk = collecting(norm_bound=10.0)
    talk.offer("a")
    talk.frame("a", 0)
    talk.frame("a", 1)
    commands = talk.frame("a", 2, sum_squares=squares)
    receipt = sent(commands, Receipt)["a"]
    assert (receipt.accepted, receipt.reason, receipt.update_digest) == (False, reason, digest_of_update("a"))
    assert only(commands, ev.ForgetFrames) == ev.ForgetFrames("a", digest_of_update("a"))
    assert of_kind(commands, ev.SaveUpdate) == []
    assert states(talk)["a"] is MemberState.REJECTED
    assert tally(talk, "rejected", reason) == 1


@pytest.mark.fault(19)
def test_an_agent_that_was_not_invited_is_rejected():
    talk = collecting()
    receipt = sent(talk.offer("stranger"), Receipt)["stranger"]
    assert (receipt.accepted, receipt.reason) == (False, "identity")
    assert tally(talk, "rejected", "identity") == 1
    assert "stranger" not in states(talk)


def test_a_bad_header_ends_the_transfer_that_was_under_way():
    talk = collecting()
    talk.offer("a")
    commands = talk.offer("a", salt="again", num_examples=0)
    assert sent(commands, Receipt)["a"].reason == "num_examples"
    assert only(commands, ev.ForgetFrames).update_digest == digest_of_update("a")
    assert (tally(talk, "late", "replaced"), tally(talk, "rejected", "num_examples")) == (1, 1)


@pytest.mark.fault(8)
def test_frames_that_do_not_add_up_are_asked_for_again_twice_then_the_update_is_rejected():
    talk = collecting()
    talk.offer("a")
    forgotten = ev.ForgetFrames("a", digest_of_update("a"))
    for _ in range(2):
        commands = talk.frames("a", "corrupt")
        assert of_kind(commands, ev.ForgetFrames) == [forgotten]
        assert of_kind(commands, ev.Send)[-1].message.missing == ((0, 3),)
        assert of_kind(commands, ev.UpdateSettled) == []
    commands = talk.frames("a", "corrupt")
    assert of_kind(commands, ev.ForgetFrames) == [forgotten]
    assert sent(commands, Receipt)["a"].reason == "digest"
    assert tally(talk, "rejected", "digest") == 1


def test_frames_that_add_up_the_second_time_count():
    talk = collecting()
    talk.offer("a")
    talk.frames("a", "corrupt")
    assert sent(talk.frames("a"), Receipt)["a"].accepted


def test_an_agent_that_keeps_changing_its_update_is_rejected_before_it_fills_the_spool():
    talk = collecting()
    for time in range(9):  # the first, and eight in its place
        assert sent(talk.offer("a", salt=str(time)), Receipt) == {}
    receipt = sent(talk.offer("a", salt="9"), Receipt)["a"]
    assert (receipt.reason, receipt.detail.partition(":")[0]) == (
        "digest",
        "offered 10 different updates in one attempt",
    )
    assert (tally(talk, "late", "replaced"), tally(talk, "rejected", "digest")) == (9, 1)
    assert states(talk)["a"] is MemberState.REJECTED


def test_a_rejected_agent_is_replaced():
    talk = collecting("a", "b", target=2, over_select=1.0)
    talk.come("c")
    commands = talk.offer("a", num_examples=0)
    assert set(sent(commands, Invitation)) == {"c"}


# Refused and lost.


def test_an_agent_that_refuses_in_the_middle_of_its_upload_ends_it():
    talk = collecting()
    talk.offer("a")
    talk.refuse("a")
    assert states(talk)["a"] is MemberState.REFUSED
    assert tally(talk, "late", "closed") == 1
    assert sent(talk.offer("a"), Cancel)["a"].reason == "late"


def test_the_credit_of_a_lost_agent_goes_to_the_one_that_replaces_it():
    talk = Talk(config(target=1, minimum=1, quorum=1, over_select=1.0))
    talk.prepared()
    talk.published()
    (first,) = sent(talk.come("a"), Invitation)
    talk.come("b")
    talk.run.attempt.uplink.transfers[first].credit = 256  # as of a model of more than 256 frames
    talk.run.attempt.uplink._free = 0
    assert sent(talk.leave("a"), Invitation)["b"].credit == 3
    assert talk.run.attempt.uplink.credit("a") == 0


def test_a_lost_agent_that_comes_back_goes_on_where_it_was():
    talk = collecting()
    talk.offer("a")
    talk.frame("a", 0)
    talk.leave("a")
    assert tally(talk, "late", "lost") == 1
    assert sent(talk.come("a"), Invitation)["a"].credit == 3
    commands = talk.offer("a", stored={0: facts("a", 0)})
    assert sent(commands, Credit)["a"].missing == ((1, 3),)
    talk.frame("a", 1)
    assert sent(talk.frame("a", 2), Receipt)["a"].accepted


def test_an_agent_that_was_taken_for_lost_and_never_left_is_heard_when_it_asks():
    talk = collecting()
    talk.offer("a")
    talk.leave("a")
    assert talk.run.frame_verdict("a", frame("a"), 0) is Verdict.STALE
    assert sent(talk.offer("a"), Credit)["a"].credit == 3
    assert states(talk)["a"] is MemberState.ACCEPTED


def test_a_lost_agent_that_speaks_at_an_old_address_is_waited_for_like_one_that_has_just_come():
    talk = collecting()
    talk.leave("a")
    assert set(sent(talk.offer("a", address=talk.address._replace(epoch=EPOCH - 1)), Invitation)) == {"a"}
    assert states(talk)["a"] is MemberState.INVITED
    assert set(sent(talk.wait(2), Invitation)) == {"a"}  # it may have been lost
    talk.wait(18)
    assert states(talk)["a"] is MemberState.LOST
    assert talk.run.attempt.uplink.credit("a") == 0


# Frames.


@pytest.mark.fault(6, 7)
@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, Verdict.WANTED),
        ({"run_tag": run_tag("other")}, Verdict.STALE),
        ({"round_num": 2}, Verdict.STALE),
        ({"content_tag": content_tag(digest("other"))}, Verdict.STALE),
        ({"index": 1}, Verdict.MALFORMED),  # under the topic of frame 0
        ({"num_elements": 3}, Verdict.MALFORMED),
    ],
)
def test_a_frame_is_wanted_only_where_all_of_it_fits(changes: dict[str, Any], verdict: Verdict):
    talk = collecting()
    talk.offer("a")
    assert talk.run.frame_verdict("a", frame("a", **changes), 0) is verdict


def test_frames_of_strangers_and_of_agents_that_are_done_are_stale():
    talk = collecting()
    talk.update("a")
    assert talk.run.frame_verdict("a", frame("a"), 0) is Verdict.STALE
    assert talk.run.frame_verdict("stranger", frame("stranger"), 0) is Verdict.STALE


def test_frames_without_their_header_are_answered_by_asking_for_it():
    talk = collecting()
    verdict = talk.run.frame_verdict("a", frame("a"), 0)
    assert verdict is Verdict.UNANNOUNCED
    talk.hear(ev.FrameDropped("a", verdict))
    told = sent(talk.wait(0.06), Credit)["a"]
    assert told.need_header
    assert told.missing == ((0, 3),)


def test_a_frame_that_came_already_is_answered_with_what_is_missing():
    talk = collecting()
    talk.offer("a")
    talk.frame("a", 0)
    assert talk.run.frame_verdict("a", frame("a"), 0) is Verdict.DUPLICATE
    assert talk.hear(ev.FrameDropped("a", Verdict.DUPLICATE)) == []
    assert sent(talk.wait(0.06), Credit)["a"].missing == ((1, 3),)


def test_other_frames_that_are_dropped_are_not_answered():
    talk = collecting()
    talk.offer("a")
    for agent_id, verdict in (("a", Verdict.STALE), ("a", Verdict.MALFORMED), ("stranger", Verdict.UNANNOUNCED)):
        talk.hear(ev.FrameDropped(agent_id, verdict))
    assert sent(talk.wait(1.0), Credit) == {}


def test_a_frame_of_a_transfer_that_ended_changes_nothing():
    talk = collecting()
    talk.update("a")
    assert talk.hear(ev.FrameStored("a", 0, FrameFacts(b"x", 1.0))) == []


# Phases.


def test_each_phase_of_a_round_is_measured_once():
    talk = Talk(config(target=1, minimum=1, quorum=1, over_select=1.0, rounds=1))
    talk.prepared()
    talk.published()
    commands = talk.come("a")
    talk.now += 4.0
    commands += talk.come("b") + talk.refuse("a")  # nobody's update is under way: b is invited in the same phase
    talk.now += 6.0
    commands += talk.update("b")
    talk.now += 3.0
    commands += talk.aggregated()
    phases = {note.phase: note.duration_s for note in of_kind(commands, ev.PhaseEnded)}
    assert phases == {"selecting": 0.0, "collecting": 10.0, "aggregating": 3.0}
    assert len(of_kind(commands, ev.PhaseEnded)) == 3


# A higher epoch.


def test_a_coordinator_that_raises_its_epoch_invites_whom_it_waits_for_again():
    talk = collecting("a", "b", "c", minimum=3, quorum=3)
    talk.update("a")
    talk.offer("b")
    commands = talk.run.raise_epoch(9)
    told = sent(commands, Invitation)
    assert {agent_id: message.epoch for agent_id, message in told.items()} == {"b": 9, "c": 9}
    assert sent(talk.offer("b"), Credit)["b"].epoch == 9
    assert tally(talk, "duplicate") == 1


def test_a_coordinator_that_raises_its_epoch_while_it_averages_or_after_the_end_invites_nobody():
    talk = collecting("a", "b", "c", minimum=3, quorum=2, report_deadline_s=600, rounds=1)
    talk.update("a")
    talk.update("b")
    talk.wait(600)
    assert talk.run.attempt.round.state is RoundState.AGGREGATING
    assert talk.run.raise_epoch(9) == []
    talk.run.check()
    talk = collecting()
    talk.hear(ev.StopAsked())
    assert talk.run.raise_epoch(9) == []


# Tallies.


def test_updates_that_were_announced_when_the_process_ended_are_late():
    tallies = Tallies({("received", ""): 7, ("accepted", ""): 3, ("late", "stale"): 1})
    assert tallies.num_received == 7
    assert tallies.counts["late", "restart"] == 3  # 7 - 3 - 1
    assert tallies.num_settled == 7
    assert tallies.changed
    assert not Tallies({("received", ""): 1, ("accepted", ""): 1}).changed


def test_an_address_makes_and_reads_messages():
    address = Address("r1", 3, 5, 2)
    message = address.on(Cancel, reason="late")
    assert (message.run_id, message.epoch, message.round_num, message.attempt) == ("r1", 3, 5, 2)
    assert header("a", address).attempt == 2
