"""An agent in conversations: invitations, models, training and updates, while brokers and coordinators come and go."""

from __future__ import annotations

import math
import random
from typing import Any

import msgspec
import pytest

from edge_agent import agent_events as ev
from edge_agent.agent import Agent, AgentState
from midge import PROTOCOL, __version__
from midge.wire.frames import content_tag
from midge.wire.messages import (
    MAX_EPOCH_JUMP,
    Acceptance,
    Cancel,
    CoordinatorStatus,
    Credit,
    Head,
    Invitation,
    Progress,
    Receipt,
    Refusal,
    RollCall,
    TrainingConfig,
    UpdateHeader,
)
from tests import measured
from tests.machines import EPOCH, LAYOUT, RUN_ID, digest, finished, of_kind, only, version_digest

NUM_FRAMES = 3


def status(*, online: bool = True, epoch: int = EPOCH) -> CoordinatorStatus:
    return CoordinatorStatus(online=online, epoch=epoch, instance="i1", protocol=1, version="0.1")


def head(round_num: int = 0, **changes: Any) -> Head:
    fields: dict[str, Any] = {
        "run_id": RUN_ID,
        "epoch": EPOCH,
        "round_num": round_num,
        "slot": round_num % 2,
        "model_digest": version_digest(round_num),
        "layout": LAYOUT.tensors,
        "frame_elements": 4,
        "codec": "float32",
        "counters": (),
        "task": "digits",
    }
    return Head(**(fields | changes))


def invitation(round_num: int = 1, attempt: int = 1, **changes: Any) -> Invitation:
    fields: dict[str, Any] = {
        "run_id": RUN_ID,
        "epoch": EPOCH,
        "round_num": round_num,
        "attempt": attempt,
        "model_digest": version_digest(round_num - 1),
        "task": "digits",
        "training": TrainingConfig(),
        "seed": 7,
        "credit": 2,
        "deadline_s": 600.0,
    }
    return Invitation(**(fields | changes))


def address_of(message: Any) -> dict[str, Any]:
    return {key: getattr(message, key) for key in ("run_id", "epoch", "round_num", "attempt")}


class Talk:
    """A conversation with an agent: after each step its invariants hold, and no deadline is left in the past."""

    def __init__(self, update: ev.FinishedUpdate | None = None, *, online: bool = True) -> None:
        self.now = 0.0
        self.agent = Agent(random.Random(1), 0.0, update)
        if online:
            self.hear(ev.BrokerConnected())
            self.hear(ev.CoordinatorSeen(status()))

    def hear(self, event: ev.Event, after_s: float = 0.0) -> list[ev.Command]:
        self.now += after_s
        commands = self.agent.step(event, self.now)
        self.agent.check()
        assert self.agent.deadline() > self.now, f"woken again and again in {self.agent.work}"
        return commands

    def wait(self, seconds: float) -> list[ev.Command]:
        """Let time pass, with a timer at each deadline; returns all commands."""
        until, commands = self.now + seconds, []
        while self.agent.deadline() <= until:
            self.now = self.agent.deadline()
            commands += self.hear(ev.TimePassed())
        self.now = until
        return commands + self.hear(ev.TimePassed())

    def invite(self, round_num: int = 1, attempt: int = 1, **changes: Any) -> list[ev.Command]:
        return self.hear(ev.Invited(invitation(round_num, attempt, **changes)))

    def pull(self) -> list[ev.Command]:
        """Every frame of the model comes, and it is checked."""
        commands = [command for index in range(NUM_FRAMES) for command in self.hear(ev.FrameStored(index))]
        assert only(commands, ev.CheckModel)
        return commands + self.hear(ev.ModelChecked(is_right=True))

    def to_fetching(self) -> list[ev.Command]:
        self.invite()
        return self.hear(ev.HeadSeen(head()))

    def to_training(self) -> list[ev.Command]:
        self.to_fetching()
        return self.pull()

    def to_uploading(self) -> list[ev.Command]:
        """The update has three frames, the credit is two."""
        self.to_training()
        return self.hear(ev.TrainingFinished(finished(RUN_ID, 1, version_digest(0))))

    def to_awaiting_receipt(self) -> list[ev.Command]:
        self.to_uploading()
        return self.tell(Credit, missing=((2, 3),), credit=2)

    def tell(self, kind: Any, **fields: Any) -> list[ev.Command]:
        """Tell the agent something at the address of its invitation, but for `fields`."""
        assert self.agent.invitation is not None
        return self.hear(ev.Told(kind(**(address_of(self.agent.invitation) | fields))))

    def receipt(self, *, accepted: bool = True, **fields: Any) -> list[ev.Command]:
        assert self.agent.update is not None
        return self.tell(Receipt, **({"update_digest": self.agent.update.update_digest, "accepted": accepted} | fields))


WORK = {
    AgentState.FETCHING: Talk.to_fetching,
    AgentState.TRAINING: Talk.to_training,
    AgentState.UPLOADING: Talk.to_uploading,
    AgentState.AWAITING_RECEIPT: Talk.to_awaiting_receipt,
}
in_each_work = pytest.mark.parametrize("work", WORK)


def at(work: AgentState) -> Talk:
    talk = Talk()
    WORK[work](talk)
    assert talk.agent.work is work
    return talk


def said(commands: list[ev.Command], kind: Any) -> list[Any]:
    return [say.message for say in of_kind(commands, ev.Say) if isinstance(say.message, kind)]


# The happy path.


def test_a_round_from_the_invitation_to_the_receipt():
    talk = Talk()
    commands = talk.invite()
    assert of_kind(commands, ev.WriteInvitation) == [ev.WriteInvitation(invitation())]
    assert said(commands, Acceptance) == [Acceptance(**address_of(invitation()))]
    assert only(commands, ev.WatchHead) == ev.WatchHead(RUN_ID)
    assert commands.index(only(commands, ev.WriteInvitation)) < commands.index(only(commands, ev.Say))
    assert talk.agent.state is AgentState.FETCHING

    commands = talk.hear(ev.HeadSeen(head()))
    assert commands == [ev.OpenModel(head()), ev.AskFrames(head(), (0, 1, 2), ())]
    assert talk.agent.wants_frame(RUN_ID, 1, content_tag(version_digest(0)))
    commands = talk.pull()
    assert only(commands, ev.Train) == ev.Train(invitation(), head())
    assert talk.agent.state is AgentState.TRAINING

    update = finished(RUN_ID, 1, version_digest(0))
    commands = talk.hear(ev.TrainingFinished(update))
    (header,) = said(commands, UpdateHeader)
    assert (header.update_digest, header.num_frames, header.num_examples) == (update.update_digest, 3, 10)
    assert address_of(header) == address_of(invitation())
    assert only(commands, ev.SendFrames) == ev.SendFrames(update, (0, 1))  # the credit is 2
    assert talk.agent.state is AgentState.UPLOADING

    commands = talk.tell(Credit, missing=((1, 3),), credit=2)
    assert only(commands, ev.SendFrames).indices == (2,)
    assert talk.agent.state is AgentState.AWAITING_RECEIPT
    commands = talk.receipt()
    assert only(commands, ev.EraseWork)
    assert only(commands, ev.RoundEnded) == ev.RoundEnded(invitation(), "accepted")
    assert talk.agent.state is AgentState.IDLE
    assert talk.agent.update is None
    assert talk.agent.deadline() == math.inf


def test_each_change_of_state_is_noted_once():
    talk = Talk(online=False)
    states = of_kind(talk.hear(ev.BrokerConnected()), ev.StateChanged)
    states += of_kind(talk.hear(ev.CoordinatorSeen(status())), ev.StateChanged)
    states += of_kind(talk.to_training(), ev.StateChanged)
    assert [note.state for note in states] == ["idle", "training"]
    assert of_kind(talk.hear(ev.TimePassed()), ev.StateChanged) == []


def test_the_next_round_of_a_run_needs_no_new_subscription_to_its_head():
    talk = at(AgentState.AWAITING_RECEIPT)
    talk.receipt()
    talk.hear(ev.HeadSeen(head(1)))
    commands = talk.invite(2)
    assert of_kind(commands, ev.WatchHead) == []
    assert only(commands, ev.OpenModel).head == head(1)


def test_an_invitation_that_comes_before_its_head_waits_for_it():
    talk = at(AgentState.AWAITING_RECEIPT)
    talk.receipt()
    assert of_kind(talk.invite(2), ev.OpenModel) == []  # the head at hand is of version 0
    assert only(talk.hear(ev.HeadSeen(head(1))), ev.OpenModel).head == head(1)


def test_an_invitation_of_another_run_watches_its_head():
    talk = at(AgentState.TRAINING)
    commands = talk.invite(1, run_id="other")
    assert only(commands, ev.WatchHead) == ev.WatchHead("other")
    assert only(commands, ev.StopTraining)
    assert talk.hear(ev.HeadSeen(head())) == [ev.Stale("head of another run")]


# Objections.


def test_an_agent_that_objects_refuses_and_begins_nothing():
    talk = Talk()
    commands = talk.hear(ev.Invited(invitation(), ev.Objection("battery", "12 % left")))
    refusal = Refusal(**address_of(invitation()), reason="battery", detail="12 % left")
    assert said(commands, Refusal) == [refusal]
    assert only(commands, ev.RoundEnded) == ev.RoundEnded(invitation(), "refused", "battery", "12 % left")
    assert of_kind(commands, ev.WriteInvitation) == []
    assert talk.agent.state is AgentState.IDLE


def test_a_training_that_fails_is_refused_with_its_reason():
    talk = at(AgentState.TRAINING)
    commands = talk.hear(ev.TrainingFailed(ev.Objection("memory", "killed at 512 MiB")))
    assert said(commands, Refusal) == [Refusal(**address_of(invitation()), reason="memory", detail="killed at 512 MiB")]
    assert only(commands, ev.RoundEnded).outcome == "refused"
    assert talk.agent.state is AgentState.IDLE


def test_a_failure_of_a_training_that_is_no_more_changes_nothing():
    for work in (AgentState.FETCHING, AgentState.UPLOADING):
        talk = at(work)
        assert talk.hear(ev.TrainingFailed(ev.Objection("worker"))) == []
        assert talk.agent.work is work


def test_a_long_explanation_is_cut_to_what_a_message_holds():
    talk = at(AgentState.TRAINING)
    (refusal,) = said(talk.hear(ev.TrainingFailed(ev.Objection("worker", "x" * 9999))), Refusal)
    assert len(refusal.detail) == 500


def test_a_model_that_does_not_fit_is_refused_with_the_versions_of_both():
    versions = f" (Midge {__version__} on the agent, 0.1 on the coordinator)"
    for detail, kept in (
        ("w has (2,), expected (3,)", "w has (2,), expected (3,)"),
        ("w" * 500, "w" * (500 - len(versions))),
    ):
        talk = at(AgentState.TRAINING)
        (refusal,) = said(talk.hear(ev.TrainingFailed(ev.Objection("layout", detail))), Refusal)
        assert (refusal.reason, refusal.detail) == ("layout", kept + versions)


def test_a_refusal_that_may_have_been_lost_is_said_again():
    talk = at(AgentState.TRAINING)
    talk.hear(ev.BrokerLost())
    (refusal,) = said(talk.hear(ev.TrainingFailed(ev.Objection("memory"))), Refusal)
    assert said(talk.hear(ev.BrokerConnected()), Refusal) == [refusal]
    assert said(talk.invite(), Refusal) == [refusal]  # the coordinator invites again: it has not heard of it
    assert talk.agent.state is AgentState.IDLE
    talk.invite(1, 2)
    talk.hear(ev.BrokerLost())
    assert said(talk.hear(ev.BrokerConnected()), Refusal) == []


# Invitations again, newer and older.


@in_each_work
def test_the_same_invitation_again_is_accepted_again_and_the_work_goes_on(work: AgentState):
    talk = at(work)
    commands = talk.invite(deadline_s=500.0)  # it says how much time is left, so it differs
    assert said(commands, Acceptance) == [Acceptance(**address_of(invitation()))]
    assert of_kind(commands, ev.WriteInvitation | ev.StopTraining | ev.OpenModel | ev.Train) == []
    assert talk.agent.work is work
    assert len(said(commands, UpdateHeader)) == (work in (AgentState.UPLOADING, AgentState.AWAITING_RECEIPT))


@pytest.mark.parametrize("change", [{"attempt": 2}, {"epoch": EPOCH + 1}])
@in_each_work
def test_a_new_attempt_or_epoch_renews_the_address_and_the_work_goes_on(work: AgentState, change: dict[str, int]):
    talk = at(work)
    renewed = invitation(**({"attempt": 1} | change))
    commands = talk.hear(ev.Invited(renewed))
    assert of_kind(commands, ev.WriteInvitation) == [ev.WriteInvitation(renewed)]
    assert said(commands, Acceptance) == [Acceptance(**address_of(renewed))]
    assert talk.agent.work is work
    assert of_kind(commands, ev.StopTraining | ev.OpenModel) == []
    for header in said(commands, UpdateHeader):
        assert address_of(header) == address_of(renewed)
    stale = Credit(**address_of(invitation()), missing=(), credit=1)
    assert talk.hear(ev.Told(stale)) == [ev.Stale("credit")]


def test_a_renewed_upload_asks_what_the_coordinator_lacks_before_it_sends_more():
    talk = at(AgentState.UPLOADING)
    commands = talk.invite(1, 2)
    assert of_kind(commands, ev.SendFrames) == []
    assert only(talk.tell(Credit, missing=((0, 3),), credit=3), ev.SendFrames).indices == (0, 1, 2)


def test_a_renewed_training_ends_at_the_new_address():
    talk = at(AgentState.TRAINING)
    talk.invite(1, 2)
    (header,) = said(talk.hear(ev.TrainingFinished(finished(RUN_ID, 1, version_digest(0)))), UpdateHeader)
    assert header.attempt == 2


@in_each_work
def test_an_invitation_to_the_next_round_replaces_the_work(work: AgentState):
    talk = at(work)
    talk.hear(ev.HeadSeen(head(1)))
    commands = talk.invite(2)
    assert len(of_kind(commands, ev.StopTraining)) == (work is AgentState.TRAINING)
    assert of_kind(commands, ev.WriteInvitation) == [ev.WriteInvitation(invitation(2))]
    assert only(commands, ev.OpenModel).head == head(1)
    assert talk.agent.work is AgentState.FETCHING
    assert talk.hear(ev.TrainingFinished(finished(RUN_ID, 1, version_digest(0)))) == []
    talk.pull()
    assert talk.agent.update is None


def test_an_update_of_the_round_before_does_not_end_the_training_at_hand():
    talk = at(AgentState.TRAINING)
    talk.hear(ev.HeadSeen(head(1)))
    talk.invite(2)
    talk.pull()
    assert talk.hear(ev.TrainingFinished(finished(RUN_ID, 1, version_digest(0)))) == []
    assert talk.agent.work is AgentState.TRAINING
    talk.hear(ev.TrainingFinished(finished(RUN_ID, 2, version_digest(1))))
    assert talk.agent.work is AgentState.UPLOADING


def test_other_training_settings_are_other_work():
    talk = at(AgentState.TRAINING)
    commands = talk.invite(1, 2, training=TrainingConfig(local_epochs=9))
    assert only(commands, ev.StopTraining)
    assert talk.agent.work is AgentState.FETCHING


@in_each_work
def test_an_invitation_of_an_older_epoch_is_ignored(work: AgentState):
    talk = at(work)
    assert talk.invite(2, epoch=EPOCH - 1) == [ev.Stale("invitation of an older epoch")]
    assert talk.agent.work is work


def test_an_epoch_that_was_only_announced_fences_older_invitations_too():
    talk = Talk()
    talk.hear(ev.CoordinatorSeen(status(epoch=9)))
    assert talk.invite() == [ev.Stale("invitation of an older epoch")]
    assert talk.agent.state is AgentState.IDLE


@pytest.mark.fault(20)
@pytest.mark.parametrize("made_up", [2**53, EPOCH + 1_000_000])
def test_an_agent_that_believed_an_epoch_beyond_all_measure_listens_to_the_coordinator_again(made_up: int):
    """Such a presence may be retained at the broker, and the coordinator goes above none of that kind."""
    talk = Talk()
    talk.hear(ev.CoordinatorSeen(status(epoch=made_up)))
    assert talk.agent.epoch == made_up
    talk.hear(ev.CoordinatorSeen(status(epoch=EPOCH)))
    assert talk.agent.epoch == EPOCH
    talk.hear(ev.CoordinatorSeen(status(epoch=made_up)))
    assert said(talk.invite(), Acceptance) == [Acceptance(**address_of(invitation()))]


def test_below_all_measure_an_older_epoch_is_an_older_coordinators():
    talk = Talk()
    talk.hear(ev.CoordinatorSeen(status(epoch=EPOCH + 999_999)))
    assert talk.hear(ev.CoordinatorSeen(status(epoch=EPOCH))) == [ev.Stale("presence of an older coordinator")]
    assert talk.invite() == [ev.Stale("invitation of an older epoch")]


@pytest.mark.parametrize("older", [(1, 2), (2, 1)])
def test_a_late_delivery_of_an_earlier_invitation_does_not_replace_newer_work(older: tuple[int, int]):
    talk = Talk()
    talk.hear(ev.HeadSeen(head(1)))
    talk.invite(2, 2)
    assert [type(command) for command in talk.invite(*older)] == [ev.Stale]
    assert talk.agent.invitation == invitation(2, 2)


@pytest.mark.parametrize("accepted", [True, False])
def test_a_late_delivery_of_an_invitation_whose_work_has_ended_begins_nothing(accepted: bool):
    talk = at(AgentState.AWAITING_RECEIPT)
    talk.receipt(accepted=accepted)
    assert [type(command) for command in talk.invite()] == [ev.Stale]
    assert talk.agent.state is AgentState.IDLE


def test_after_a_cancellation_only_a_new_attempt_begins_the_work_again():
    talk = at(AgentState.TRAINING)
    talk.tell(Cancel, reason="abandoned")
    assert [type(command) for command in talk.invite()] == [ev.Stale]
    talk.invite(1, 2)
    assert talk.agent.work is AgentState.FETCHING


# Cancellations.


@in_each_work
def test_a_cancellation_ends_the_work_and_keeps_a_finished_update(work: AgentState):
    talk = at(work)
    commands = talk.tell(Cancel, reason="closed")
    assert only(commands, ev.RoundEnded) == ev.RoundEnded(invitation(), "cancelled", "closed")
    assert len(of_kind(commands, ev.StopTraining)) == (work is AgentState.TRAINING)
    assert of_kind(commands, ev.EraseWork) == []
    assert talk.agent.state is AgentState.IDLE
    is_finished = work in (AgentState.UPLOADING, AgentState.AWAITING_RECEIPT)
    assert (talk.agent.update is not None) == is_finished
    assert talk.agent.deadline() == math.inf


def test_a_kept_update_is_offered_to_the_next_attempt_and_not_trained_again():
    talk = at(AgentState.AWAITING_RECEIPT)
    kept = talk.agent.update
    talk.tell(Cancel, reason="abandoned")
    commands = talk.invite(1, 2)
    (header,) = said(commands, UpdateHeader)
    assert (header.attempt, header.update_digest) == (2, kept.update_digest)
    assert only(commands, ev.SendFrames).indices == (0, 1)
    assert said(commands, Acceptance)
    assert talk.agent.work is AgentState.UPLOADING


def test_a_kept_update_is_dropped_once_another_training_begins():
    talk = at(AgentState.AWAITING_RECEIPT)
    kept = talk.agent.update
    talk.tell(Cancel, reason="closed")
    talk.invite(2)
    assert talk.agent.work is AgentState.FETCHING
    assert talk.agent.update is kept
    talk.hear(ev.HeadSeen(head(1)))
    talk.pull()
    assert talk.agent.work is AgentState.TRAINING
    assert talk.agent.update is None


def test_what_is_told_while_idle_or_at_another_address_is_stale():
    talk = Talk()
    old = address_of(invitation())
    for message in (
        Credit(**old, missing=(), credit=1),
        Cancel(**old, reason="late"),
        Receipt(**old, update_digest=digest("x"), accepted=True),
    ):
        assert [type(command) for command in talk.hear(ev.Told(message))] == [ev.Stale]
    talk.to_training()
    for change in ({"epoch": EPOCH - 1}, {"attempt": 2}, {"round_num": 2}, {"run_id": "other"}):
        assert talk.tell(Cancel, **change, reason="late") == [ev.Stale("cancel")]
    assert talk.agent.work is AgentState.TRAINING


def test_a_quarantine_is_told_whether_the_agent_works_or_not_and_stops_no_work():
    talk = Talk()
    told = Cancel(**address_of(invitation()), reason="quarantined")
    assert talk.hear(ev.Told(told)) == [ev.Quarantined(told.run_id, told.round_num)]
    talk.to_training()
    assert talk.tell(Cancel, reason="quarantined") == [ev.Quarantined(told.run_id, told.round_num)]
    assert talk.agent.work is AgentState.TRAINING


# Fetching.


def test_only_frames_of_the_awaited_version_that_are_missing_are_wanted():
    talk = at(AgentState.FETCHING)
    tag = content_tag(version_digest(0))
    talk.hear(ev.FrameStored(0))
    assert talk.agent.wants_frame(RUN_ID, 1, tag)
    assert not talk.agent.wants_frame(RUN_ID, 0, tag)
    assert not talk.agent.wants_frame(RUN_ID, 3, tag)
    assert not talk.agent.wants_frame("other", 1, tag)
    assert not talk.agent.wants_frame(RUN_ID, 1, content_tag(version_digest(1)))
    talk.hear(ev.FrameStored(1))
    talk.hear(ev.FrameStored(2))
    talk.hear(ev.ModelChecked(is_right=True))
    assert not talk.agent.wants_frame(RUN_ID, 1, tag)


def test_a_model_that_does_not_add_up_is_fetched_again_twice_and_then_refused():
    talk = at(AgentState.FETCHING)
    for _ in range(2):
        for index in range(NUM_FRAMES):
            talk.hear(ev.FrameStored(index))
        commands = talk.hear(ev.ModelChecked(is_right=False))
        assert only(commands, ev.AskFrames).wanted == (0, 1, 2)
    for index in range(NUM_FRAMES):
        talk.hear(ev.FrameStored(index))
    (refusal,) = said(talk.hear(ev.ModelChecked(is_right=False)), Refusal)
    assert refusal.reason == "fetch"
    assert talk.agent.state is AgentState.IDLE


def test_a_model_that_adds_up_after_two_failures_is_trained_on():
    talk = at(AgentState.FETCHING)
    for is_right in (False, False, True):
        for index in range(NUM_FRAMES):
            talk.hear(ev.FrameStored(index))
        commands = talk.hear(ev.ModelChecked(is_right=is_right))
    assert only(commands, ev.Train)


def test_the_verdict_on_a_model_that_is_not_fetched_any_more_is_ignored():
    talk = at(AgentState.TRAINING)
    assert talk.hear(ev.ModelChecked(is_right=False)) == []
    assert talk.hear(ev.FrameStored(0)) == []
    assert Talk().hear(ev.ModelChecked(is_right=True)) == []


def test_frames_that_do_not_come_are_asked_for_again():
    talk = at(AgentState.FETCHING)
    talk.hear(ev.FrameStored(1))
    assert only(talk.wait(2.5), ev.AskFrames) == ev.AskFrames(head(), (0, 2), ())


def test_a_head_that_does_not_come_is_asked_for_again_with_growing_patience():
    talk = Talk()
    talk.invite()
    times = []
    while talk.now < 100:
        talk.now = talk.agent.deadline()
        times += [talk.now] * len(of_kind(talk.hear(ev.TimePassed()), ev.WatchHead))
    waits = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    for wait, patience in zip(waits, (2, 4, 8, 16, 30), strict=False):
        assert 0.75 * patience <= wait <= 1.25 * patience
    assert only(talk.hear(ev.HeadSeen(head())), ev.OpenModel)


def test_a_model_that_does_not_come_before_the_deadline_is_refused():
    talk = Talk()
    talk.invite(deadline_s=60.0)
    commands = talk.wait(60)
    assert [refusal.reason for refusal in said(commands, Refusal)] == ["fetch"]
    assert only(commands, ev.RoundEnded).outcome == "refused"
    assert talk.agent.state is AgentState.IDLE


def test_a_new_attempt_gives_the_fetching_its_own_deadline():
    talk = Talk()
    talk.invite(deadline_s=60.0)
    talk.wait(50)
    talk.invite(1, 2, deadline_s=60.0)
    talk.wait(50)
    assert talk.agent.work is AgentState.FETCHING
    talk.wait(10)
    assert talk.agent.work is AgentState.IDLE


def test_a_head_of_another_version_stops_the_pull_and_the_awaited_one_begins_it_anew():
    talk = at(AgentState.FETCHING)
    talk.hear(ev.FrameStored(0))
    assert talk.hear(ev.HeadSeen(head(5))) == []
    assert not talk.agent.wants_frame(RUN_ID, 1, content_tag(version_digest(0)))
    assert of_kind(talk.wait(40), ev.WatchHead)  # it is late, or lost
    assert only(talk.hear(ev.HeadSeen(head())), ev.AskFrames).wanted == (0, 1, 2)


def test_the_same_head_again_does_not_disturb_the_pull():
    talk = at(AgentState.FETCHING)
    talk.hear(ev.FrameStored(0))
    assert talk.hear(ev.HeadSeen(head(epoch=EPOCH + 1))) == []
    assert not talk.agent.wants_frame(RUN_ID, 0, content_tag(version_digest(0)))


def test_a_codec_that_this_agent_does_not_know_is_refused():
    talk = Talk()
    talk.invite()
    commands = talk.hear(ev.HeadSeen(head(codec="int8")))
    assert [refusal.reason for refusal in said(commands, Refusal)] == ["protocol"]
    assert of_kind(commands, ev.OpenModel) == []
    assert talk.agent.state is AgentState.IDLE


# Training.


def test_progress_is_told_at_most_once_a_second_and_only_while_it_trains():
    talk = at(AgentState.TRAINING)
    told = []
    for _ in range(50):
        told += of_kind(talk.hear(ev.TrainingProgressed(0.5), after_s=0.1), ev.Say)
    assert len(told) == 5
    assert {say.qos for say in told} == {0}
    assert {(say.message.phase, say.message.fraction) for say in told} == {("training", 0.5)}
    assert Talk().hear(ev.TrainingProgressed(0.5)) == []


@pytest.mark.parametrize(("fraction", "told"), [(-0.1, 0.0), (1.5, 1.0)])
def test_progress_is_a_fraction(fraction: float, told: float):
    talk = at(AgentState.TRAINING)
    assert [message.fraction for message in said(talk.hear(ev.TrainingProgressed(fraction)), Progress)] == [told]


# Uploading.


def test_silence_makes_the_agent_offer_its_update_again_until_it_hears():
    talk = at(AgentState.AWAITING_RECEIPT)
    headers = said(talk.wait(120), UpdateHeader)
    assert 4 <= len(headers) <= 8  # after 2, 4, 8, 16, 30, 30, 30 seconds, each a quarter more or less
    assert only(talk.tell(Credit, missing=((1, 2),), credit=2), ev.SendFrames).indices == (1,)


def test_a_coordinator_that_lacks_the_header_gets_it_again():
    talk = at(AgentState.UPLOADING)
    commands = talk.tell(Credit, missing=((0, 3),), credit=3, need_header=True)
    assert len(said(commands, UpdateHeader)) == 1
    # The frames that it had sent were dropped for want of their header: they are sent again as soon as that has come.
    assert only(talk.tell(Credit, missing=((0, 3),), credit=3), ev.SendFrames).indices == (0, 1, 2)


def test_credit_while_there_is_nothing_to_send_is_ignored():
    talk = at(AgentState.TRAINING)
    assert talk.tell(Credit, missing=((0, 3),), credit=3, need_header=True) == []


def test_a_rejected_update_is_erased_and_the_reason_is_noted():
    talk = at(AgentState.AWAITING_RECEIPT)
    commands = talk.receipt(accepted=False, reason="norm", detail="delta of norm 9")
    assert only(commands, ev.RoundEnded) == ev.RoundEnded(invitation(), "rejected", "norm", "delta of norm 9")
    assert only(commands, ev.EraseWork)
    assert talk.agent.update is None


def test_a_receipt_of_another_update_is_stale():
    talk = at(AgentState.AWAITING_RECEIPT)
    assert talk.receipt(update_digest=digest("another")) == [ev.Stale("receipt of another update")]
    assert talk.agent.update is not None
    assert talk.agent.work is AgentState.AWAITING_RECEIPT


@in_each_work
def test_a_disk_that_fails_ends_the_work_with_a_refusal(work: AgentState):
    talk = at(work)
    commands = talk.hear(ev.DiskFailed("no space left"))
    assert [(refusal.reason, refusal.detail) for refusal in said(commands, Refusal)] == [("disk", "no space left")]
    assert len(of_kind(commands, ev.StopTraining)) == (work is AgentState.TRAINING)
    assert talk.agent.state is AgentState.IDLE
    assert (talk.agent.update is not None) == (work in (AgentState.UPLOADING, AgentState.AWAITING_RECEIPT))


def test_an_update_that_cannot_be_read_any_more_is_not_offered_again():
    talk = at(AgentState.UPLOADING)
    talk.hear(ev.DiskFailed("input/output error", lost_update=True))
    assert talk.agent.update is None
    talk.invite(1, 2)
    assert talk.agent.work is AgentState.FETCHING
    assert Talk().hear(ev.DiskFailed("no space left")) == []


# The connection.


def test_an_agent_that_connects_says_that_it_is_there():
    talk = Talk(online=False)
    assert talk.agent.state is AgentState.OFFLINE
    assert only(talk.hear(ev.BrokerConnected()), ev.AnnouncePresence)
    assert talk.agent.state is AgentState.IDLE


@in_each_work
def test_work_survives_the_loss_of_the_broker(work: AgentState):
    talk = at(work)
    before = talk.agent.invitation
    commands = talk.hear(ev.BrokerLost())
    assert of_kind(commands, ev.StopTraining | ev.EraseWork) == []
    assert talk.agent.state is (AgentState.TRAINING if work is AgentState.TRAINING else AgentState.OFFLINE)
    assert of_kind(talk.wait(3600), ev.Say) == []
    assert talk.agent.work is work
    assert talk.agent.invitation == before


@in_each_work
def test_after_the_broker_is_back_the_work_goes_on(work: AgentState):
    talk = at(work)
    talk.hear(ev.BrokerLost())
    talk.wait(5)
    commands = talk.hear(ev.BrokerConnected())
    assert only(commands, ev.AnnouncePresence)
    assert only(commands, ev.WatchHead) == ev.WatchHead(RUN_ID)
    assert talk.agent.state is work
    asked = of_kind(commands, ev.AskFrames)
    assert [ask.wanted for ask in asked] == ([(0, 1, 2)] if work is AgentState.FETCHING else [])
    assert len(said(commands, UpdateHeader)) == (work in (AgentState.UPLOADING, AgentState.AWAITING_RECEIPT))


def test_a_training_that_ends_without_a_broker_is_offered_once_it_is_back():
    talk = at(AgentState.TRAINING)
    talk.hear(ev.BrokerLost())
    assert talk.hear(ev.TrainingProgressed(0.9)) == []
    talk.hear(ev.TrainingFinished(finished(RUN_ID, 1, version_digest(0))))
    assert talk.agent.state is AgentState.OFFLINE
    commands = talk.hear(ev.BrokerConnected(), after_s=60)
    assert len(said(commands, UpdateHeader)) == 1
    assert of_kind(commands, ev.SendFrames) == []  # it asks first what arrived
    assert only(talk.tell(Credit, missing=((0, 3),), credit=3), ev.SendFrames).indices == (0, 1, 2)


def test_a_model_whose_deadline_passed_while_the_broker_was_away_is_refused_when_it_is_back():
    talk = Talk()
    talk.invite(deadline_s=60.0)
    talk.hear(ev.BrokerLost())
    talk.wait(100)
    assert [refusal.reason for refusal in said(talk.hear(ev.BrokerConnected()), Refusal)] == ["fetch"]


def test_while_the_coordinator_is_away_an_agent_does_not_ask_and_offers_again_when_it_is_back():
    talk = at(AgentState.AWAITING_RECEIPT)
    talk.hear(ev.CoordinatorSeen(status(online=False)))
    assert of_kind(talk.wait(3600), ev.Say) == []
    commands = talk.hear(ev.CoordinatorSeen(status(epoch=EPOCH + 1)))
    assert len(said(commands, UpdateHeader)) == 1
    assert said(talk.hear(ev.CoordinatorSeen(status(epoch=EPOCH + 1))), UpdateHeader) == []
    assert len(said(talk.wait(30), UpdateHeader)) >= 1


def test_an_agent_that_has_not_heard_of_the_coordinator_asks_all_the_same():
    talk = at(AgentState.AWAITING_RECEIPT)
    talk.hear(ev.CoordinatorSeen(status(online=False)))
    talk.hear(ev.BrokerLost())
    talk.hear(ev.BrokerConnected())  # and the retained presence of the coordinator is lost
    assert said(talk.wait(10), UpdateHeader)


def test_the_will_of_an_earlier_coordinator_does_not_silence_an_agent():
    talk = at(AgentState.AWAITING_RECEIPT)
    talk.hear(ev.CoordinatorSeen(status(epoch=EPOCH + 1)))
    commands = talk.hear(ev.CoordinatorSeen(status(online=False, epoch=EPOCH)))
    assert [type(command) for command in commands] == [ev.Stale]
    assert said(talk.wait(10), UpdateHeader)


def test_a_coordinator_that_speaks_is_there_whatever_its_presence_says():
    talk = at(AgentState.UPLOADING)
    talk.hear(ev.CoordinatorSeen(status(online=False)))
    talk.tell(Credit, missing=((0, 3),), credit=1)
    assert said(talk.wait(10), UpdateHeader)


# The roll.


def test_the_roll_is_answered_once_within_its_spread():
    talk = Talk()
    talk.hear(ev.RollCalled(RollCall(epoch=EPOCH, spread_s=20.0)))
    due = talk.agent.deadline()
    assert 0 < due < 20
    talk.hear(ev.RollCalled(RollCall(epoch=EPOCH, spread_s=20.0)))
    assert talk.agent.deadline() <= due  # a second call never puts the answer off
    assert len(of_kind(talk.wait(40), ev.AnnouncePresence)) == 1


def test_a_roll_without_spread_is_answered_at_once():
    assert only(Talk().hear(ev.RollCalled(RollCall(epoch=EPOCH))), ev.AnnouncePresence)


def test_agents_spread_their_answers():
    answers = []
    for seed in range(200):
        agent = Agent(random.Random(seed), 0.0)
        agent.step(ev.BrokerConnected(), 0.0)
        agent.step(ev.RollCalled(RollCall(epoch=EPOCH, spread_s=10.0)), 0.0)
        answers.append(agent.deadline())
    in_each_fifth = [sum(1 for at in answers if fifth * 2 <= at < fifth * 2 + 2) for fifth in range(5)]
    assert sum(in_each_fifth) == 200
    assert min(in_each_fifth) > 20  # 40 each on average, standard deviation sqrt(200 * 0.2 * 0.8) = 5.7


def test_a_call_that_cannot_be_answered_is_answered_by_the_next_birth():
    talk = Talk()
    talk.hear(ev.RollCalled(RollCall(epoch=EPOCH, spread_s=5.0)))
    talk.hear(ev.BrokerLost())
    assert of_kind(talk.wait(10), ev.AnnouncePresence) == []
    assert len(of_kind(talk.hear(ev.BrokerConnected()), ev.AnnouncePresence)) == 1


# Restarts.


def test_an_agent_that_restarts_with_a_finished_update_offers_it_when_it_is_invited_again():
    update = finished(RUN_ID, 1, version_digest(0))
    talk = Talk(update)
    assert talk.agent.state is AgentState.IDLE
    commands = talk.invite(1, 1, epoch=EPOCH)
    assert [header.update_digest for header in said(commands, UpdateHeader)] == [update.update_digest]
    assert of_kind(commands, ev.Train | ev.OpenModel | ev.WatchHead) == []
    talk.receipt()
    assert talk.agent.update is None


def test_an_agent_that_restarts_with_an_update_of_another_version_trains_anew():
    for stale in (finished(RUN_ID, 1, version_digest(9)), finished("other", 1, version_digest(0))):
        talk = Talk(stale)
        talk.to_training()
        assert talk.agent.work is AgentState.TRAINING
        assert talk.agent.update is None


def test_an_old_invitation_that_comes_late_after_a_restart_does_not_cost_a_finished_update():
    update = finished(RUN_ID, 2, version_digest(1))
    talk = Talk(update)
    talk.invite(1)
    talk.hear(ev.HeadSeen(head(1)))
    assert talk.agent.work is AgentState.FETCHING  # of a version that is no longer there
    commands = talk.invite(2)
    assert [header.update_digest for header in said(commands, UpdateHeader)] == [update.update_digest]
    assert of_kind(commands, ev.Train | ev.OpenModel | ev.WatchHead) == []


# Whatever comes.


def random_event(rng: random.Random, talk: Talk) -> ev.Event:
    """Anything that a network, a worker or a coordinator may bring about."""
    old = {"run_id": rng.choice((RUN_ID, RUN_ID, "other")), "epoch": rng.choice((EPOCH, EPOCH, EPOCH + 1, EPOCH - 1))}
    old |= {"round_num": rng.choice((1, 2)), "attempt": rng.choice((1, 2))}
    if talk.agent.invitation is not None and rng.random() < 0.8:
        old = address_of(talk.agent.invitation)
    round_num = old["round_num"]
    known = talk.agent.update.update_digest if talk.agent.update else digest("x")
    ranges = tuple((rng.randrange(4), rng.randrange(9)) for _ in range(rng.randrange(3)))
    choices: list[ev.Event] = [
        ev.BrokerConnected(),
        ev.BrokerConnected(),
        ev.BrokerLost(),
        ev.CoordinatorSeen(status(online=rng.random() < 0.7, epoch=old["epoch"])),
        ev.RollCalled(RollCall(epoch=1, spread_s=rng.choice((0.0, 5.0)))),
        ev.Invited(invitation(**(old | {"model_digest": version_digest(round_num - 1)}))),
        ev.Invited(invitation(**old), ev.Objection("battery") if rng.random() < 0.2 else None),
        ev.Told(Credit(**old, missing=ranges, credit=rng.randrange(4), need_header=rng.random() < 0.2)),
        ev.Told(Receipt(**old, update_digest=known, accepted=rng.random() < 0.5)),
        ev.Told(Cancel(**old, reason="late")),
        ev.HeadSeen(head(rng.randrange(3))),
        ev.HeadSeen(head(round_num - 1)),
        ev.FrameStored(rng.randrange(3)),
        ev.FrameStored(rng.randrange(3)),
        ev.FrameStored(rng.randrange(3)),
        ev.ModelChecked(is_right=rng.random() < 0.7),
        ev.TrainingProgressed(rng.random()),
        ev.TrainingFinished(finished(old["run_id"], round_num, version_digest(round_num - 1))),
        ev.TrainingFailed(ev.Objection("memory")),
        ev.DiskFailed("no space left", lost_update=rng.random() < 0.5),
        ev.TimePassed(),
    ]
    return rng.choice(choices)


@pytest.mark.parametrize("seed", measured.first(10, range(60)))
def test_whatever_comes_an_agent_never_raises_and_its_invariants_hold(seed: int):
    rng = random.Random(seed)
    talk = Talk()
    works = set()
    for _ in range(800):
        talk.hear(random_event(rng, talk), after_s=rng.choice((0.0, 0.0, 0.5, 20.0)))
        works.add(talk.agent.work)
    assert AgentState.FETCHING in works


# Coordinators that cannot be, or that speak another protocol.


def test_an_epoch_that_was_none_is_forgotten_once_the_coordinator_speaks():
    talk = Talk()
    talk.hear(ev.CoordinatorSeen(status(epoch=2**53)))
    assert only(talk.hear(ev.CoordinatorSeen(status(online=False))), ev.Stale)  # a will says nothing of who is there
    talk.hear(ev.CoordinatorSeen(status()))
    assert talk.agent.epoch == EPOCH
    talk.invite(run_id="elsewhere", epoch=2**53)
    assert talk.agent.epoch == 2**53
    assert [message.epoch for message in said(talk.invite(), Acceptance)] == [EPOCH]
    assert talk.agent.epoch == EPOCH


def test_a_coordinator_that_is_only_older_stays_fenced():
    talk = Talk()
    talk.hear(ev.CoordinatorSeen(status(epoch=EPOCH + MAX_EPOCH_JUMP - 1)))
    assert only(talk.hear(ev.CoordinatorSeen(status())), ev.Stale)
    assert only(talk.invite(), ev.Stale)


def test_a_coordinator_of_another_protocol_is_named_once_and_its_invitation_refused_until_it_is_brought_up_to_date():
    talk = Talk()
    other = msgspec.structs.replace(status(), protocol=PROTOCOL + 1, version="9.1")
    expected = (
        f"the coordinator speaks protocol {PROTOCOL + 1} (Midge 9.1), this agent {PROTOCOL} (Midge {__version__}): "
        "install the same Midge on both"
    )
    assert only(talk.hear(ev.CoordinatorSeen(other)), ev.ProtocolDiffers).detail == expected
    assert talk.hear(ev.CoordinatorSeen(other)) == []
    (refusal,) = said(talk.invite(), Refusal)
    assert (refusal.reason, refusal.detail) == ("protocol", expected)
    talk.hear(ev.CoordinatorSeen(status(epoch=EPOCH + 1)))
    assert said(talk.invite(epoch=EPOCH + 1), Acceptance)
