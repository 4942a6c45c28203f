"""What goes into the machine of an agent, and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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


@dataclass(frozen=True, slots=True)
class Objection:
    """Why an agent will not take part."""

    reason: RefusalReason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class FinishedUpdate:
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
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    frames_bytes: int = 0


# Events, in the past tense.


@dataclass(frozen=True, slots=True)
class BrokerConnected:
    """The broker can be reached; subscriptions and retained messages may be gone."""


@dataclass(frozen=True, slots=True)
class BrokerLost:
    """The broker cannot be reached."""


@dataclass(frozen=True, slots=True)
class CoordinatorSeen:
    """The coordinator's presence came."""

    status: CoordinatorStatus


@dataclass(frozen=True, slots=True)
class RollCalled:
    """The coordinator calls the roll."""

    call: RollCall


@dataclass(frozen=True, slots=True)
class Invited:
    """An invitation came; `objection` is what the operator's rules say against it."""

    invitation: Invitation
    objection: Objection | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """The coordinator answered an update, or wants the work no more."""

    message: Credit | Receipt | Cancel


@dataclass(frozen=True, slots=True)
class HeadSeen:
    """The head of a run's model came."""

    head: Head


@dataclass(frozen=True, slots=True)
class FrameStored:
    """A wanted frame of the model is on disk."""

    index: int


@dataclass(frozen=True, slots=True)
class ModelChecked:
    """The model on disk was compared with the head's digest."""

    is_right: bool


@dataclass(frozen=True, slots=True)
class TrainingProgressed:
    """The worker says how far it is, 0 to 1."""

    fraction: float


@dataclass(frozen=True, slots=True)
class TrainingFinished:
    """The worker wrote its update to disk."""

    update: FinishedUpdate


@dataclass(frozen=True, slots=True)
class TrainingFailed:
    """The worker could not do it, or died."""

    objection: Objection


@dataclass(frozen=True, slots=True)
class DiskFailed:
    """The disk is full or fails: the command was not done, nor those after it. Maybe the finished update cannot be read."""

    detail: str
    lost_update: bool = False


@dataclass(frozen=True, slots=True)
class TimePassed:
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


@dataclass(frozen=True, slots=True)
class AnnouncePresence:
    """Publish this agent's presence."""


@dataclass(frozen=True, slots=True)
class Say:
    """Tell the coordinator something."""

    message: ToCoordinator
    qos: int = 1


@dataclass(frozen=True, slots=True)
class WriteInvitation:
    """Write this down, durably, before anything else is done."""

    invitation: Invitation


@dataclass(frozen=True, slots=True)
class EraseWork:
    """The round is over for this agent: erase the invitation and the update."""


@dataclass(frozen=True, slots=True)
class WatchHead:
    """Subscribe to the head of this run's model, and to no other."""

    run_id: str


@dataclass(frozen=True, slots=True)
class OpenModel:
    """Make room on disk for this version."""

    head: Head


@dataclass(frozen=True, slots=True)
class AskFrames:
    """Subscribe to frames of the head's version, after unsubscribing from others."""

    head: Head
    wanted: tuple[int, ...]
    done: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CheckModel:
    """Compare the model on disk with the head's digest; `ModelChecked` follows."""

    head: Head


@dataclass(frozen=True, slots=True)
class Train:
    """Have the worker train; `TrainingFinished` or `TrainingFailed` follows."""

    invitation: Invitation
    head: Head


@dataclass(frozen=True, slots=True)
class StopTraining:
    """End the training under way; nothing follows."""


@dataclass(frozen=True, slots=True)
class SendFrames:
    """Publish these frames of the update on disk."""

    update: FinishedUpdate
    indices: tuple[int, ...]


# Notes: what a person or a metric wants to know. Nothing depends on them.


@dataclass(frozen=True, slots=True)
class StateChanged:
    """The agent's state changed."""

    state: str


@dataclass(frozen=True, slots=True)
class RoundEnded:
    """The agent's part in a round ended: accepted, rejected, refused or cancelled."""

    invitation: Invitation
    outcome: str
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Stale:
    """A message was not for what the agent does now."""

    what: str


NOTES = (StateChanged, RoundEnded, Stale)
Note = StateChanged | RoundEnded | Stale

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
