"""What goes into the machine of a run, and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from coordinator.cohort import Change
from coordinator.round import MemberState, RoundState
from coordinator.uplink import FrameFacts, Verdict
from midge.wire.frames import Framing
from midge.wire.layout import Layout
from midge.wire.messages import Acceptance, Evaluation, Progress, Refusal, ToAgent, UpdateHeader

# Events, in the past tense.


@dataclass(frozen=True, slots=True)
class ModelPrepared:
    """The model of round 0 is stored."""

    digest: str
    layout: Layout
    framing: Framing


@dataclass(frozen=True, slots=True)
class PreparationFailed:
    """The task could not make its model."""

    reason: str


@dataclass(frozen=True, slots=True)
class BrokerConnected:
    """The broker can be reached; it may have forgotten everything."""


@dataclass(frozen=True, slots=True)
class BrokerLost:
    """The broker cannot be reached."""

    reason: str


@dataclass(frozen=True, slots=True)
class ModelPublished:
    """All frames of this version, and its head, are with the broker."""

    round_num: int


@dataclass(frozen=True, slots=True)
class FleetMoved:
    """An agent came, left or restarted; the fleet knows it already."""

    agent_id: str
    change: Change


@dataclass(frozen=True, slots=True)
class MessageCame:
    """An agent said something; its identity is the topic's."""

    agent_id: str
    message: Acceptance | Refusal | Progress


@dataclass(frozen=True, slots=True)
class UpdateOffered:
    """An agent sent an update's header; `stored` are frames of that very update which are in the spool already."""

    agent_id: str
    header: UpdateHeader
    stored: Mapping[int, FrameFacts] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FrameStored:
    """A frame that was wanted is in the spool."""

    agent_id: str
    index: int
    facts: FrameFacts


@dataclass(frozen=True, slots=True)
class FrameDropped:
    """A frame came that is not wanted."""

    agent_id: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class UpdatesAggregated:
    """The next version is stored."""

    digest: str
    delta_norm: float


@dataclass(frozen=True, slots=True)
class AggregationBroke:
    """The next version could not be made."""

    reason: str


@dataclass(frozen=True, slots=True)
class ModelEvaluated:
    """How a version does on the coordinator's test data; None where the task has none, or it failed."""

    round_num: int
    score: Evaluation | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class CloseAsked:
    """The operator wants the round to end with what has come."""


@dataclass(frozen=True, slots=True)
class StopAsked:
    """The operator wants the run to stop, and to be resumed some day."""


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Nothing but time."""


Event = (
    ModelPrepared
    | PreparationFailed
    | BrokerConnected
    | BrokerLost
    | ModelPublished
    | FleetMoved
    | MessageCame
    | UpdateOffered
    | FrameStored
    | FrameDropped
    | UpdatesAggregated
    | AggregationBroke
    | ModelEvaluated
    | CloseAsked
    | StopAsked
    | TimePassed
)


# Commands, in the imperative. Whatever is to be saved is saved before anything is sent.


@dataclass(frozen=True, slots=True)
class PrepareModel:
    """Make the model of round 0; `ModelPrepared` or `PreparationFailed` follows."""

    seed: int


@dataclass(frozen=True, slots=True)
class PublishModel:
    """Publish this version, frames first and head last; `ModelPublished` follows."""

    round_num: int
    digest: str


@dataclass(frozen=True, slots=True)
class CallRoll:
    """Ask every agent to say that it is there."""


@dataclass(frozen=True, slots=True)
class Send:
    """Tell an agent something."""

    agent_id: str
    message: ToAgent
    expiry_s: float | None = None


@dataclass(frozen=True, slots=True)
class ForgetFrames:
    """These frames will not be needed."""

    agent_id: str
    update_digest: str


@dataclass(frozen=True, slots=True)
class AcceptedUpdate:
    """An update that counts, as it is stored."""

    agent_id: str
    attempt: int
    update_digest: str
    num_examples: int
    counters: tuple[int, ...]
    norm: float
    training_s: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluation: Evaluation | None = None


@dataclass(frozen=True, slots=True)
class AggregateUpdates:
    """Average these; `UpdatesAggregated` or `AggregationBroke` follows."""

    round_num: int
    base_digest: str
    updates: tuple[AcceptedUpdate, ...]


@dataclass(frozen=True, slots=True)
class EvaluateModel:
    """Evaluate this version on test data; `ModelEvaluated` follows, in any case."""

    round_num: int
    digest: str


@dataclass(frozen=True, slots=True)
class SaveRun:
    """Persist where the run stands."""

    state: str
    reason: str
    round_num: int
    best_round: int | None
    best_value: float | None


@dataclass(frozen=True, slots=True)
class SaveAttempt:
    """Persist where an attempt stands.

    `can_wait` where a restart would do the same without it: that an agent took its invitation, say.
    """

    round_num: int
    attempt: int
    state: RoundState
    reason: str
    members: Mapping[str, MemberState]
    can_wait: bool = False


@dataclass(frozen=True, slots=True)
class SaveUpdate:
    """Persist an accepted update, its frames first."""

    round_num: int
    update: AcceptedUpdate


@dataclass(frozen=True, slots=True)
class SaveVersion:
    """Persist a version: each has one digest and one parent."""

    round_num: int
    digest: str
    parent: str | None
    num_updates: int = 0
    num_examples: int = 0
    delta_norm: float = 0.0
    duration_s: float = 0.0
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class SaveEvaluation:
    """Persist how a version does: `source` is central (test data) or federated (the agents' own)."""

    round_num: int
    source: str
    score: Evaluation


@dataclass(frozen=True, slots=True)
class SaveTallies:
    """Persist the run's counts of updates by (outcome, reason)."""

    tallies: Mapping[tuple[str, str], int]


# Notes: what a person or a metric wants to know. Nothing depends on them.


@dataclass(frozen=True, slots=True)
class RunChanged:
    """The run's state changed."""

    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class RoundOpened:
    """An attempt began."""

    round_num: int
    attempt: int


@dataclass(frozen=True, slots=True)
class PhaseEnded:
    """A phase of a round took so long."""

    round_num: int
    phase: str
    duration_s: float


@dataclass(frozen=True, slots=True)
class RoundEnded:
    """An attempt ended."""

    round_num: int
    attempt: int
    outcome: str
    reason: str
    duration_s: float
    num_updates: int
    num_examples: int
    delta_norm: float
    update_norms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class AgentSpoke:
    """An agent accepted, made progress or refused (`state` says which)."""

    agent_id: str
    state: str
    fraction: float = 0.0
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class UpdateSettled:
    """An update met its fate: accepted, rejected, late or duplicate."""

    agent_id: str
    outcome: str
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class UpdateReceived:
    """A header came."""

    agent_id: str


@dataclass(frozen=True, slots=True)
class MessageStale:
    """A message or a frame of another run, epoch, round or attempt was dropped; `kind` is control or update."""

    kind: str


Note = RunChanged | RoundOpened | PhaseEnded | RoundEnded | AgentSpoke | UpdateSettled | UpdateReceived | MessageStale
NOTES = (RunChanged, RoundOpened, PhaseEnded, RoundEnded, AgentSpoke, UpdateSettled, UpdateReceived, MessageStale)

Save = SaveRun | SaveAttempt | SaveUpdate | SaveVersion | SaveEvaluation | SaveTallies
SAVES = (SaveRun, SaveAttempt, SaveUpdate, SaveVersion, SaveEvaluation, SaveTallies)

Command = PrepareModel | PublishModel | CallRoll | Send | ForgetFrames | AggregateUpdates | EvaluateModel | Save | Note
