"""What goes into the machine of an agent, and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from midge.wire.messages import (
    Cancel,
    CoordinatorStatus,
    Credit,
    Evaluation,
    Head,
    Invitation,
    Receipt,
    RefusalReason,
    RollCall,
    ToCoordinator,
)


class Objection(Struct, frozen=True):
    """Why an agent will not take part."""

    reason: RefusalReason
    detail: str = ""


class FinishedUpdate(Struct, frozen=True):
    """A finished update as it lies on disk, and all that its header says but the address."""

    run_id: str
    round_num: int
    model_digest: str
    layout_digest: str
    update_digest: str
    num_frames: int
    num_examples: int
    counters: tuple[int, ...]
    training_s: float = 0.0
    metrics: Mapping[str, float] = {}
    evaluation: Evaluation | None = None
    frames_bytes: int = 0


# Events, in the past tense.


class BrokerConnected(Struct, frozen=True):
    """The broker can be reached; subscriptions and retained messages may be gone."""


class BrokerLost(Struct, frozen=True):
    """The broker cannot be reached."""


class CoordinatorSeen(Struct, frozen=True):
    """The coordinator's presence came."""

    status: CoordinatorStatus


class RollCalled(Struct, frozen=True):
    """The coordinator calls the roll."""

    call: RollCall


class Invited(Struct, frozen=True):
    """An invitation came; `objection` is what the operator's rules say against it."""

    invitation: Invitation
    objection: Objection | None = None


class Told(Struct, frozen=True):
    """The coordinator answered an update, or wants the work no more."""

    message: Credit | Receipt | Cancel


class HeadSeen(Struct, frozen=True):
    """The head of a run's model came."""

    head: Head


class FrameStored(Struct, frozen=True):
    """A wanted frame of the model is on disk."""

    index: int


class ModelChecked(Struct, frozen=True):
    """The model on disk was compared with the head's digest."""

    is_right: bool


class TrainingProgressed(Struct, frozen=True):
    """The worker says how far it is, 0 to 1."""

    fraction: float


class TrainingFinished(Struct, frozen=True):
    """The worker wrote its update to disk."""

    update: FinishedUpdate


class TrainingFailed(Struct, frozen=True):
    """The worker could not do it, or died."""

    objection: Objection


class DiskFailed(Struct, frozen=True):
    """The disk is full or fails: the command was not done, nor those after it. Maybe the finished update cannot be read."""

    detail: str
    lost_update: bool = False


class TimePassed(Struct, frozen=True):
    """Nothing but time."""


Event = (
    BrokerConnected
    | BrokerLost
    | CoordinatorSeen
    | RollCalled
    | Invited
    | Told
    | HeadSeen
    | FrameStored
    | ModelChecked
    | TrainingProgressed
    | TrainingFinished
    | TrainingFailed
    | DiskFailed
    | TimePassed
)


# Commands, in the imperative.


class AnnouncePresence(Struct, frozen=True):
    """Publish this agent's presence."""


class Say(Struct, frozen=True):
    """Tell the coordinator something."""

    message: ToCoordinator
    qos: int = 1


class WriteInvitation(Struct, frozen=True):
    """Write this down, durably, before anything else is done."""

    invitation: Invitation


class EraseWork(Struct, frozen=True):
    """The round is over for this agent: erase the invitation and the update."""


class WatchHead(Struct, frozen=True):
    """Subscribe to the head of this run's model, and to no other."""

    run_id: str


class OpenModel(Struct, frozen=True):
    """Make room on disk for this version."""

    head: Head


class AskFrames(Struct, frozen=True):
    """Subscribe to frames of the head's version, after unsubscribing from others."""

    head: Head
    wanted: tuple[int, ...]
    done: tuple[int, ...]


class CheckModel(Struct, frozen=True):
    """Compare the model on disk with the head's digest; `ModelChecked` follows."""

    head: Head


class Train(Struct, frozen=True):
    """Have the worker train; `TrainingFinished` or `TrainingFailed` follows."""

    invitation: Invitation
    head: Head


class StopTraining(Struct, frozen=True):
    """End the training under way; nothing follows."""


class SendFrames(Struct, frozen=True):
    """Publish these frames of the update on disk."""

    update: FinishedUpdate
    indices: tuple[int, ...]


# Notes: what a person or a metric wants to know. Nothing depends on them.


class StateChanged(Struct, frozen=True):
    """The agent's state changed."""

    state: str


class RoundEnded(Struct, frozen=True):
    """The agent's part in a round ended: accepted, rejected, refused or cancelled."""

    invitation: Invitation
    outcome: str
    reason: str = ""
    detail: str = ""


class Stale(Struct, frozen=True):
    """A message was not for what the agent does now."""

    what: str


class ProtocolDiffers(Struct, frozen=True):
    """The coordinator speaks another protocol: its invitations are refused until one of the two is brought up to date."""

    detail: str


class Quarantined(Struct, frozen=True):
    """The coordinator invites this agent to no round for a while: its updates were rejected again and again."""

    run_id: str
    round_num: int


NOTES = (StateChanged, RoundEnded, Quarantined, Stale, ProtocolDiffers)
Note = StateChanged | RoundEnded | Quarantined | Stale | ProtocolDiffers

Command = (
    AnnouncePresence
    | Say
    | WriteInvitation
    | EraseWork
    | WatchHead
    | OpenModel
    | AskFrames
    | CheckModel
    | Train
    | StopTraining
    | SendFrames
    | Note
)
