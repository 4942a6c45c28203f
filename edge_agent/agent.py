"""An agent's part in a federation: answer invitations, fetch the model, train, send the update, wait for its receipt.

Purpose: take part in one round at a time, and lose no finished work: not when the broker goes, not when the coordinator
restarts, not when the agent itself does. It must not know of sockets, files, torch or clocks (`now` is monotonic seconds).

States
    OFFLINE           the broker cannot be reached (whatever the work: it is kept, and a training goes on)
    IDLE              no invitation
    FETCHING          pulling the model of the invitation's version
    TRAINING          the worker is at it
    UPLOADING         frames of the update are on their way, within credit
    AWAITING_RECEIPT  every frame was sent; the coordinator has not said accepted or rejected

Work passes FETCHING -> TRAINING -> UPLOADING -> AWAITING_RECEIPT -> IDLE, and from any of them to IDLE on a cancellation, a
refusal or a failure. Every event is legal in every state: a network may deliver anything at any time. What does not match
the invitation at hand is stale, noted and ignored; an invitation of an older epoch than the newest one seen is ignored.

An invitation that is older than the newest one, or whose work has ended already, is a late delivery: it begins nothing, but
a refusal is said again, since nobody acknowledges one. A newer invitation replaces the work at hand. If it is for the same
(run, round, model) it changes only the address, that is the epoch and the attempt: a training goes on, and a finished update
is offered again, never trained again. A finished update is kept until a receipt, or until the next training begins: after
a restart nobody remembers which invitation was the newest, and an old one that comes late must not cost the work.
"""

from __future__ import annotations

import enum
import math
import random
from typing import NamedTuple

from edge_agent import agent_events as ev
from edge_agent.pull import Ask, Pull
from edge_agent.push import Push
from midge import PROTOCOL, __version__
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
    ToCoordinator,
    UpdateHeader,
)

_PROGRESS_EVERY_S = 1.0
_MAX_MODEL_RETRIES = 2
_FIRST_HEAD_PATIENCE_S = 2.0
_LONGEST_HEAD_PATIENCE_S = 30.0
_MAX_DETAIL = 500


class AgentState(enum.StrEnum):
    """What an agent is doing."""

    OFFLINE = "offline"
    IDLE = "idle"
    FETCHING = "fetching"
    TRAINING = "training"
    UPLOADING = "uploading"
    AWAITING_RECEIPT = "awaiting_receipt"


class Agent:
    """The machine. `step` takes an event and the time and returns commands; `deadline` says when to call it at the latest.

    Args:
        rng: of jitter and of the delay at a roll call; seeded in tests.
        now: monotonic seconds.
        update: a finished update that an earlier process left on disk.
    """

    def __init__(self, rng: random.Random, now: float, update: ev.FinishedUpdate | None = None) -> None:
        self.now = now
        self.work = AgentState.IDLE
        self.epoch = 0
        self.invitation: Invitation | None = None
        self.update = update
        self._rng = rng
        self._connected = False
        self._coordinator_is_away = False
        self._head: Head | None = None
        self._watching = ""
        self._pull: Pull | None = None
        self._push: Push | None = None
        self._fetch_by = math.inf
        self._head_patience_s = _FIRST_HEAD_PATIENCE_S
        self._ask_head_at = math.inf
        self._model_retries = 0
        self._answer_at = math.inf
        self._progress_at = -math.inf
        self._reported_state = AgentState.OFFLINE
        self._newest: Invitation | None = None
        self._refusal: ev.Say | None = None
        self._coordinator_version = ""
        self._misfit = ""

    @property
    def state(self) -> AgentState:
        """What the agent is doing; OFFLINE wherever the broker cannot be reached, but for a training that goes on."""
        if not self._connected and self.work is not AgentState.TRAINING:
            return AgentState.OFFLINE
        return self.work

    @property
    def head(self) -> Head | None:
        """The head of the model that the agent pulls or pulled last."""
        return self._head

    def step(self, event: ev.Event, now: float) -> list[ev.Command]:
        """Take one event at `now`, and return what is to be done. A peer can never make it raise."""
        self.now = max(self.now, now)
        commands = self._settle()
        commands += self._apply(event)
        if self.state is not self._reported_state:
            self._reported_state = self.state
            commands.append(ev.StateChanged(self.state))
        return commands

    def deadline(self) -> float:
        """When time alone changes something; infinity where it never does."""
        times = [self._answer_at]
        if self._connected and self.work is AgentState.FETCHING:
            times.append(self._fetch_by)
            times.append(self._pull.deadline() if self._pull is not None else self._ask_head_at)
        if self._can_upload() and self._push is not None:
            times.append(self._push.deadline())
        return min(times)

    def wants_frame(self, run_id: str, index: int, content_tag: bytes) -> bool:
        """Whether a frame of a model, under this run's topic, is one that is still missing."""
        return (
            self.work is AgentState.FETCHING
            and self._pull is not None
            and self._head is not None
            and self._head.run_id == run_id
            and bytes.fromhex(self._head.model_digest[:16]) == content_tag
            and self._pull.wants(index)
        )

    def check(self) -> None:
        """Assert the invariants that hold between any two steps."""
        assert (self.work is AgentState.IDLE) == (self.invitation is None), f"{self.work} with {self.invitation}"
        if self.work in (AgentState.UPLOADING, AgentState.AWAITING_RECEIPT):
            assert self._push is not None, "uploading nothing"
            assert self.update is not None, "uploading nothing"
            assert self.invitation is not None
            assert self.update.model_digest == self.invitation.model_digest, "I3: an update of another version"
        else:
            assert self._push is None, "a transfer outlived its upload"

    # What events and time do.

    def _settle(self) -> list[ev.Command]:
        commands: list[ev.Command] = []
        if self.now >= self._answer_at:
            self._answer_at = math.inf
            if self._connected:
                commands.append(ev.AnnouncePresence())
        if self._connected and self.work is AgentState.FETCHING:
            if self.now >= self._fetch_by:
                return commands + self._refuse(ev.Objection("fetch", "the model did not arrive before the deadline"))
            commands += self._ask_again()
        if self._can_upload() and self._push is not None and self._push.ask(self.now):
            commands.append(self._header())
        return commands

    def _ask_again(self) -> list[ev.Command]:
        """Ask for what did not come: frames, or the head that names them; it is retained, and may have been lost on its way."""
        if self._pull is not None:
            again = self._pull.ask_again(self.now)
            return self._ask(again) if again is not None else []
        if self.now < self._ask_head_at:
            return []
        self._head_patience_s = min(self._head_patience_s * 2, _LONGEST_HEAD_PATIENCE_S)
        self._await_head()
        return [ev.WatchHead(self._watching)]

    def _await_head(self) -> None:
        self._ask_head_at = self.now + self._head_patience_s * self._rng.uniform(0.75, 1.25)

    def _apply(self, event: ev.Event) -> list[ev.Command]:
        match event:
            case ev.FrameStored(index):
                return self._on_frame(index)
            case ev.Told(message):
                return self._on_told(message)
            case ev.Invited(invitation, objection):
                return self._on_invited(invitation, objection)
            case ev.HeadSeen(head):
                return self._on_head(head)
            case ev.TrainingProgressed(fraction):
                return self._on_progress(fraction)
            case ev.TrainingFinished(update):
                return self._on_finished(update)
            case ev.TrainingFailed(objection):
                return self._refuse(self._with_versions(objection)) if self.work is AgentState.TRAINING else []
            case ev.DiskFailed(detail, lost_update):
                self.update = None if lost_update else self.update
                return self._refuse(ev.Objection("disk", detail)) if self.invitation is not None else []
            case ev.ModelChecked(is_right):
                return self._on_checked(is_right=is_right)
            case ev.CoordinatorSeen():
                return self._on_coordinator(event)
            case ev.RollCalled(call):
                self._answer_at = min(self._answer_at, self.now + self._rng.uniform(0.0, call.spread_s))
                return self._settle()
            case ev.BrokerConnected():
                return self._on_connected()
            case ev.BrokerLost():
                self._connected = self._coordinator_is_away = False
            case ev.TimePassed():
                pass
        return []

    # Connection and coordinator.

    def _on_connected(self) -> list[ev.Command]:
        self._connected = True
        commands: list[ev.Command] = [ev.AnnouncePresence()]
        if self._refusal is not None:
            commands.append(self._refusal)  # it may have been lost, and nobody acknowledges one
        if self._watching:
            commands.append(ev.WatchHead(self._watching))
            self._await_head()
        if self._pull is not None:
            commands += self._ask(self._pull.reconnect(self.now))
        if self._push is not None:
            self._push.asked(self.now)
            commands.append(self._header())
        return commands + self._settle()

    def _on_coordinator(self, event: ev.CoordinatorSeen) -> list[ev.Command]:
        status = event.status
        if self._is_older_epoch(status.epoch) or (status.epoch < self.epoch and not status.online):
            return [ev.Stale("presence of an older coordinator")]
        came_back = status.online and self._coordinator_is_away
        self._coordinator_is_away = not status.online
        self.epoch = status.epoch
        self._coordinator_version = status.version
        commands = self._compare_protocols(status) if status.online else []
        if came_back and self._push is not None:
            self._push.asked(self.now)
            commands.append(self._header())
        return commands

    def _compare_protocols(self, status: CoordinatorStatus) -> list[ev.Command]:
        """Note once that the coordinator speaks another protocol; its invitations are refused for that."""
        before, self._misfit = self._misfit, ""
        if status.protocol != PROTOCOL:
            ours = f"this agent {PROTOCOL} (Midge {__version__})"
            theirs = f"the coordinator speaks protocol {status.protocol} (Midge {status.version})"
            self._misfit = f"{theirs}, {ours}: install the same Midge on both"
        return [ev.ProtocolDiffers(self._misfit)] if self._misfit not in ("", before) else []

    def _is_older_epoch(self, epoch: int) -> bool:
        """Whether it is of a coordinator that another one has taken over from.

        A coordinator goes above whatever epoch an agent has seen, but not above one beyond all measure: an agent that kept to
        such a one would be lost to the federation.
        """
        return epoch < self.epoch < epoch + MAX_EPOCH_JUMP

    def _can_upload(self) -> bool:
        return self._connected and not self._coordinator_is_away  # where nobody has said so, it is worth asking

    # Invitations.

    def _on_invited(self, invitation: Invitation, objection: ev.Objection | None) -> list[ev.Command]:
        if self._is_older_epoch(invitation.epoch):
            return [ev.Stale("invitation of an older epoch")]
        if _is_older(invitation, self._newest):
            return [ev.Stale("invitation of an older attempt")]
        if self.invitation is None and self._newest is not None and _address(invitation) == _address(self._newest):
            return [self._refusal or ev.Stale("invitation of work that has ended")]
        self._newest = invitation
        self._refusal = None
        self.epoch = invitation.epoch
        self._coordinator_is_away = False
        if self.invitation is not None and _same_work(self.invitation, invitation):
            return self._renew(invitation)
        commands = self._abandon_work()
        if self._misfit:
            objection = ev.Objection("protocol", self._misfit)
        if objection is not None:
            return [*commands, *self._say_refusal(invitation, objection)]
        self.invitation = invitation
        commands += [ev.WriteInvitation(invitation), self._say(Acceptance)]
        if self.update is not None and _trained_for(self.update, invitation):
            return commands + self._begin_upload()
        return commands + self._begin_fetch()

    def _renew(self, invitation: Invitation) -> list[ev.Command]:
        """The same work under the same or another address: a new attempt, a new epoch, or a repetition."""
        is_new = self.invitation is None or _address(invitation) != _address(self.invitation)
        self.invitation = invitation
        commands: list[ev.Command] = [ev.WriteInvitation(invitation)] if is_new else []
        commands.append(self._say(Acceptance))
        if self.work is AgentState.FETCHING:
            self._fetch_by = self.now + max(invitation.deadline_s, 1.0)
        if self._push is not None:
            self._push.acknowledge(((0, self._push.num_frames),), 0, self.now)
            self._push.asked(self.now)
            commands.append(self._header())
        return commands

    # Fetching.

    def _begin_fetch(self) -> list[ev.Command]:
        assert self.invitation is not None
        self.work = AgentState.FETCHING
        self._fetch_by = self.now + max(self.invitation.deadline_s, 1.0)
        self._head_patience_s = _FIRST_HEAD_PATIENCE_S
        self._await_head()
        self._model_retries = 0
        if self._watching != self.invitation.run_id:
            self._watching = self.invitation.run_id
            self._head = None
            return [ev.WatchHead(self._watching)]
        return self._begin_pull()

    def _on_head(self, head: Head) -> list[ev.Command]:
        if head.run_id != self._watching:
            return [ev.Stale("head of another run")]
        is_other = self._head is None or self._head.model_digest != head.model_digest
        self._head = head
        if is_other:
            self._pull = None
            self._await_head()
        return self._begin_pull() if self.work is AgentState.FETCHING and self._pull is None else []

    def _begin_pull(self) -> list[ev.Command]:
        """Pull, if the head at hand is of the version that the invitation names; else wait for that head."""
        head, invitation = self._head, self.invitation
        if head is None or invitation is None or head.model_digest != invitation.model_digest:
            return []
        num_elements = sum(tensor.num_elements for tensor in head.layout if tensor.is_float)
        if num_elements < 1 or head.codec != "float32":
            return self._refuse(ev.Objection("protocol", f"a model of {num_elements} elements, codec {head.codec}"))
        self._pull = Pull(-(-num_elements // head.frame_elements), self._rng, self.now)
        return [ev.OpenModel(head), *self._ask(self._pull.start())]

    def _ask(self, ask: Ask) -> list[ev.Command]:
        return [ev.AskFrames(self._head, ask.wanted, ask.done)] if self._head and (ask.wanted or ask.done) else []

    def _on_frame(self, index: int) -> list[ev.Command]:
        if self._pull is None or self._head is None or self.work is not AgentState.FETCHING:
            return []
        ask = self._pull.take(index, self.now)
        commands = self._ask(ask) if ask is not None else []
        if self._pull.is_complete:
            commands.append(ev.CheckModel(self._head))
        return commands

    def _on_checked(self, *, is_right: bool) -> list[ev.Command]:
        if self.work is not AgentState.FETCHING or self._pull is None or self._head is None or self.invitation is None:
            return []
        if is_right:
            self._pull = self.update = None  # the file of an earlier update is about to be overwritten
            self.work = AgentState.TRAINING
            return [ev.Train(self.invitation, self._head)]
        self._model_retries += 1
        if self._model_retries > _MAX_MODEL_RETRIES:
            return self._refuse(ev.Objection("fetch", "the model's frames do not add up to its digest"))
        return self._ask(self._pull.restart(self.now))

    # Training.

    def _on_progress(self, fraction: float) -> list[ev.Command]:
        if self.work is not AgentState.TRAINING or self.now < self._progress_at or not self._connected:
            return []
        self._progress_at = self.now + _PROGRESS_EVERY_S
        return [self._say(Progress, phase="training", fraction=min(max(fraction, 0.0), 1.0))]

    def _on_finished(self, update: ev.FinishedUpdate) -> list[ev.Command]:
        if self.work is not AgentState.TRAINING or self.invitation is None or not _trained_for(update, self.invitation):
            return []
        self.update = update
        return self._begin_upload()

    # Uploading.

    def _begin_upload(self) -> list[ev.Command]:
        assert self.update is not None
        assert self.invitation is not None
        self.work = AgentState.UPLOADING
        self._push = Push(self.update.num_frames, self.invitation.credit, self._rng, self.now)
        return [self._header(), *self._send_frames()]

    def _send_frames(self) -> list[ev.Command]:
        if self._push is None or self.update is None:
            return []
        indices = self._push.next_frames()
        self.work = AgentState.AWAITING_RECEIPT if self._push.all_sent else AgentState.UPLOADING
        return [ev.SendFrames(self.update, indices)] if indices else []

    def _on_told(self, message: Credit | Receipt | Cancel) -> list[ev.Command]:
        if isinstance(message, Cancel) and message.reason == "quarantined":
            return [ev.Quarantined(message.run_id, message.round_num)]
        if self.invitation is None or _address(message) != _address(self.invitation):
            return [ev.Stale(type(message).__name__.lower())]
        self._coordinator_is_away = False
        match message:
            case Credit():
                return self._on_credit(message)
            case Receipt():
                return self._on_receipt(message)
            case Cancel(reason=reason):
                ended = ev.RoundEnded(self.invitation, "cancelled", reason)
                return [ended, *self._abandon_work()]

    def _on_credit(self, credit: Credit) -> list[ev.Command]:
        if self._push is None:
            return []
        self._push.acknowledge(credit.missing, credit.credit, self.now)
        commands: list[ev.Command] = []
        if credit.need_header:  # without it, all frames that came were dropped: its answer says which to send again
            self._push.asked(self.now)
            commands.append(self._header())
        return commands + self._send_frames()

    def _on_receipt(self, receipt: Receipt) -> list[ev.Command]:
        if self.update is None or self.invitation is None or receipt.update_digest != self.update.update_digest:
            return [ev.Stale("receipt of another update")]
        outcome = "accepted" if receipt.accepted else "rejected"
        ended = ev.RoundEnded(self.invitation, outcome, receipt.reason or "", receipt.detail)
        commands = self._abandon_work()
        self.update = None
        return [ended, *commands, ev.EraseWork()]

    # Ends.

    def _with_versions(self, objection: ev.Objection) -> ev.Objection:
        """Where two models do not fit, the first question is which Midge made each: built-in tasks change with it."""
        if objection.reason != "layout":
            return objection
        other = self._coordinator_version or "unknown"
        versions = f" (Midge {__version__} on the agent, {other} on the coordinator)"
        return ev.Objection("layout", objection.detail[: _MAX_DETAIL - len(versions)] + versions)

    def _refuse(self, objection: ev.Objection) -> list[ev.Command]:
        assert self.invitation is not None
        invitation = self.invitation
        commands = self._abandon_work()
        return [*self._say_refusal(invitation, objection), *commands]

    def _say_refusal(self, invitation: Invitation, objection: ev.Objection) -> list[ev.Command]:
        address, reason, detail = _address(invitation)._asdict(), objection.reason, objection.detail
        self._refusal = ev.Say(Refusal(**address, reason=reason, detail=detail[:_MAX_DETAIL]))
        return [self._refusal, ev.RoundEnded(invitation, "refused", reason, detail)]

    def _abandon_work(self) -> list[ev.Command]:
        """Back to IDLE; a finished update stays on disk."""
        was_training = self.work is AgentState.TRAINING
        self.work = AgentState.IDLE
        self.invitation = None
        self._pull = None
        self._push = None
        self._fetch_by = math.inf
        return [ev.StopTraining()] if was_training else []

    # Saying things.

    def _say(self, kind: type[Acceptance | Progress], **fields: object) -> ev.Say:
        assert self.invitation is not None
        message: ToCoordinator = kind(**_address(self.invitation)._asdict(), **fields)  # type: ignore[arg-type]
        return ev.Say(message, qos=0 if kind is Progress else 1)

    def _header(self) -> ev.Say:
        assert self.update is not None
        assert self.invitation is not None
        update, invitation = self.update, self.invitation
        return ev.Say(
            UpdateHeader(
                run_id=invitation.run_id,
                epoch=invitation.epoch,
                round_num=invitation.round_num,
                attempt=invitation.attempt,
                model_digest=update.model_digest,
                layout_digest=update.layout_digest,
                update_digest=update.update_digest,
                num_frames=update.num_frames,
                num_examples=update.num_examples,
                counters=update.counters,
                training_s=update.training_s,
                metrics=dict(update.metrics),
                evaluation=update.evaluation,
            )
        )


class _Address(NamedTuple):
    run_id: str
    epoch: int
    round_num: int
    attempt: int


def _address(message: Invitation | Credit | Receipt | Cancel) -> _Address:
    return _Address(message.run_id, message.epoch, message.round_num, message.attempt)


def _same_work(one: Invitation, other: Invitation) -> bool:
    key = (one.run_id, one.round_num, one.model_digest, one.training, one.seed)
    return key == (other.run_id, other.round_num, other.model_digest, other.training, other.seed)


def _is_older(invitation: Invitation, newest: Invitation | None) -> bool:
    """Whether it is of the same run and epoch, but of an earlier attempt or round: a late delivery."""
    if newest is None or (invitation.run_id, invitation.epoch) != (newest.run_id, newest.epoch):
        return False
    return (invitation.round_num, invitation.attempt) < (newest.round_num, newest.attempt)


def _trained_for(update: ev.FinishedUpdate, invitation: Invitation) -> bool:
    key = (update.run_id, update.round_num, update.model_digest)
    return key == (invitation.run_id, invitation.round_num, invitation.model_digest)
