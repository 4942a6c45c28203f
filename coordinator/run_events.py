"""What goes into the machine of a run, and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from msgspec import Struct

from coordinator.cohort import Change
from coordinator.quarantine import Strike
from coordinator.round import MemberState, RoundState
from coordinator.uplink import FrameFacts, Verdict
from midge.wire.frames import Framing
from midge.wire.layout import Layout
from midge.wire.messages import Acceptance, Evaluation, Progress, Refusal, ToAgent, UpdateHeader

# Events, in the past tense.


class ModelPrepared(Struct, frozen=True):
    """The model of round 0 is stored."""

    digest: str
    layout: Layout
    framing: Framing


class PreparationFailed(Struct, frozen=True):
    """The task could not make its model."""

    reason: str


class BrokerConnected(Struct, frozen=True):
    """The broker can be reached; it may have forgotten everything."""


class BrokerLost(Struct, frozen=True):
    """The broker cannot be reached."""

    reason: str


class ModelPublished(Struct, frozen=True):
    """All frames of this version, and its head, are with the broker."""

    round_num: int


class FleetMoved(Struct, frozen=True):
    """An agent came, left or restarted; the fleet knows it already."""

    agent_id: str
    change: Change


class MessageCame(Struct, frozen=True):
    """An agent said something; its identity is the topic's."""

    agent_id: str
    message: Acceptance | Refusal | Progress


class UpdateOffered(Struct, frozen=True):
    """An agent sent an update's header; `stored` are frames of that very update which are in the spool already."""

    agent_id: str
    header: UpdateHeader
    stored: Mapping[int, FrameFacts] = {}


class FrameStored(Struct, frozen=True):
    """A frame that was wanted is in the spool."""

    agent_id: str
    index: int
    facts: FrameFacts


class FrameDropped(Struct, frozen=True):
    """A frame came that is not wanted."""

    agent_id: str
    verdict: Verdict


class UpdatesAggregated(Struct, frozen=True):
    """The next version is stored, and what the strategy remembers with it."""

    digest: str
    delta_norm: float
    server_state: str | None = None


class AggregationBroke(Struct, frozen=True):
    """The next version could not be made."""

    reason: str


class ModelEvaluated(Struct, frozen=True):
    """How a version does on the coordinator's test data; None where the task has none, or it failed."""

    round_num: int
    score: Evaluation | None
    reason: str = ""


class CloseAsked(Struct, frozen=True):
    """The operator wants the round to end with what has come."""


class StopAsked(Struct, frozen=True):
    """The operator wants the run to stop, and to be resumed some day."""


class TimePassed(Struct, frozen=True):
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


class PrepareModel(Struct, frozen=True):
    """Make the model of round 0; `ModelPrepared` or `PreparationFailed` follows."""

    seed: int


class PublishModel(Struct, frozen=True):
    """Publish this version, frames first and head last; `ModelPublished` follows."""

    round_num: int
    digest: str


class CallRoll(Struct, frozen=True):
    """Ask every agent to say that it is there."""


class Send(Struct, frozen=True):
    """Tell an agent something."""

    agent_id: str
    message: ToAgent
    expiry_s: float | None = None


class ForgetFrames(Struct, frozen=True):
    """These frames will not be needed."""

    agent_id: str
    update_digest: str


class AcceptedUpdate(Struct, frozen=True):
    """An update that counts, as it is stored."""

    agent_id: str
    attempt: int
    update_digest: str
    num_examples: int
    counters: tuple[int, ...]
    norm: float
    training_s: float = 0.0
    metrics: Mapping[str, float] = {}
    evaluation: Evaluation | None = None


class AggregateUpdates(Struct, frozen=True):
    """Average these; `UpdatesAggregated` or `AggregationBroke` follows."""

    round_num: int
    base_digest: str
    updates: tuple[AcceptedUpdate, ...]
    server_state: str | None = None
    """Digest of what the strategy remembers since the base was made."""


class EvaluateModel(Struct, frozen=True):
    """Evaluate this version, or candidate, on test data; `ModelEvaluated` follows, in any case."""

    round_num: int
    digest: str


class DiscardModel(Struct, frozen=True):
    """A candidate was refused: its files go, unless something else has the same content."""

    digest: str
    server_state: str | None = None


class SaveRun(Struct, frozen=True):
    """Persist where the run stands."""

    state: str
    reason: str
    round_num: int
    best_round: int | None
    best_value: float | None


class SaveAttempt(Struct, frozen=True):
    """Persist where an attempt stands.

    `can_wait` where a restart would do the same without it: that an agent took its invitation, say.
    """

    round_num: int
    attempt: int
    state: RoundState
    reason: str
    members: Mapping[str, MemberState]
    can_wait: bool = False


class SaveUpdate(Struct, frozen=True):
    """Persist an accepted update, its frames first."""

    round_num: int
    update: AcceptedUpdate


class SaveVersion(Struct, frozen=True):
    """Persist a version: each has one digest and one parent."""

    round_num: int
    digest: str
    parent: str | None
    num_updates: int = 0
    num_examples: int = 0
    delta_norm: float = 0.0
    duration_s: float = 0.0
    attempts: int = 0
    server_state: str | None = None


class SaveEvaluation(Struct, frozen=True):
    """Persist how a version does: `source` is central (test data) or federated (the agents' own)."""

    round_num: int
    source: str
    score: Evaluation


class SaveStrike(Struct, frozen=True):
    """Persist that an agent's update was rejected for its content, or left out."""

    strike: Strike


class SaveTallies(Struct, frozen=True):
    """Persist the run's counts of updates by (outcome, reason)."""

    tallies: Mapping[tuple[str, str], int]


# Notes: what a person or a metric wants to know. Nothing depends on them.


class RunChanged(Struct, frozen=True):
    """The run's state changed."""

    state: str
    reason: str


class RoundOpened(Struct, frozen=True):
    """An attempt began."""

    round_num: int
    attempt: int


class PhaseEnded(Struct, frozen=True):
    """A phase of a round took so long."""

    round_num: int
    phase: str
    duration_s: float


class RoundEnded(Struct, frozen=True):
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


class AgentSpoke(Struct, frozen=True):
    """An agent accepted, made progress or refused (`state` says which)."""

    agent_id: str
    state: str
    fraction: float = 0.0
    reason: str = ""
    detail: str = ""


class UpdateSettled(Struct, frozen=True):
    """An update met its fate: accepted, rejected, late or duplicate."""

    agent_id: str
    outcome: str
    reason: str = ""
    detail: str = ""


class UpdateReceived(Struct, frozen=True):
    """A header came."""

    agent_id: str


class CandidateJudged(Struct, frozen=True):
    """The held-out gate refused a candidate; these agents are left out of the next attempt."""

    round_num: int
    attempt: int
    reason: str
    left_out: tuple[str, ...] = ()


class AgentQuarantined(Struct, frozen=True):
    """An agent takes no part until this round is over."""

    agent_id: str
    last_round: int
    detail: str


class AgentReleased(Struct, frozen=True):
    """Its quarantine is over."""

    agent_id: str


class MessageStale(Struct, frozen=True):
    """A message or a frame of another run, epoch, round or attempt was dropped; `kind` is control or update."""

    kind: str


Note = (
    RunChanged
    | RoundOpened
    | PhaseEnded
    | RoundEnded
    | AgentSpoke
    | UpdateSettled
    | UpdateReceived
    | CandidateJudged
    | AgentQuarantined
    | AgentReleased
    | MessageStale
)
NOTES = get_args(Note)

Save = SaveRun | SaveAttempt | SaveUpdate | SaveVersion | SaveEvaluation | SaveStrike | SaveTallies
SAVES = get_args(Save)

Computation = PrepareModel | EvaluateModel | AggregateUpdates | DiscardModel
"""What others do for the driver."""

Command = (
    PrepareModel
    | PublishModel
    | CallRoll
    | Send
    | ForgetFrames
    | AggregateUpdates
    | EvaluateModel
    | DiscardModel
    | Save
    | Note
)
