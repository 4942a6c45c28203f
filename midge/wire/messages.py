"""Messages: small JSON documents, one frozen struct each, tagged by `type`.

Unknown fields are ignored, so that a newer peer may add some. Limits are checked while decoding: what `decode` returns is
within them. Durations travel, times do not: no two clocks need agree.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec

from midge.wire.errors import FrameError, MessageError
from midge.wire.frames import MAX_FRAMES, Framing
from midge.wire.identifiers import PATTERN
from midge.wire.layout import MAX_COUNTERS, MAX_TENSORS, TensorSpec, layout_of

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
"""Above the largest head (`MAX_CANONICAL_BYTES` of layout, and its counters); all other messages are far smaller."""
MAX_RANGES = 64
"""A credit lists at most this many ranges of missing frames; the last one then reaches to the last missing frame."""
MAX_EPOCH_JUMP = 1_000_000
"""An epoch grows by one at a start. What is so far above another is no epoch, and going above it would be for ever."""
_MAX_NUMBER = 1e300

Identifier = Annotated[str, msgspec.Meta(pattern=PATTERN)]
Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
ShortText = Annotated[str, msgspec.Meta(max_length=200)]
Detail = Annotated[str, msgspec.Meta(max_length=500)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Small = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Finite = Annotated[float, msgspec.Meta(ge=-_MAX_NUMBER, le=_MAX_NUMBER)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Metrics = Annotated[dict[Annotated[str, msgspec.Meta(max_length=64)], Finite], msgspec.Meta(max_length=64)]
Labels = Annotated[
    dict[Annotated[str, msgspec.Meta(max_length=64)], Annotated[str, msgspec.Meta(max_length=64)]],
    msgspec.Meta(max_length=16),
]
Counters = Annotated[
    tuple[Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)], ...], msgspec.Meta(max_length=MAX_COUNTERS)
]
Scalar = (
    bool | Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)] | float | Annotated[str, msgspec.Meta(max_length=200)]
)
Parameters = Annotated[dict[Annotated[str, msgspec.Meta(max_length=64)], Scalar], msgspec.Meta(max_length=64)]
Range = tuple[Small, Small]
"""First and past-the-last index."""

RefusalReason = Literal[
    "busy", "battery", "metered", "hours", "memory", "task", "data", "layout", "protocol", "fetch", "worker", "disk"
]
"""Why an agent takes no part in a round."""

RejectReason = Literal[
    "identity",
    "model_digest",
    "layout",
    "num_frames",
    "num_examples",
    "not_finite",
    "norm",
    "digest",
    "counters",
]
"""Which gate an update failed."""

CancelReason = Literal["superseded", "closed", "abandoned", "run_ended", "late", "quarantined"]
"""Why the coordinator no longer wants an agent's work."""


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    pass


class CoordinatorStatus(_Message, frozen=True, kw_only=True, tag="coordinator"):
    """The coordinator's presence. `epoch` grows at every start and fences an older coordinator."""

    online: bool
    epoch: Count
    instance: ShortText
    """Differs between two coordinators that were given the same epoch."""
    protocol: Small
    version: ShortText


class RollCall(_Message, frozen=True, kw_only=True, tag="rollcall"):
    """Every agent answers with its presence, after a random delay of up to `spread_s` seconds."""

    epoch: Count
    spread_s: Seconds = 0.0


class Head(_Message, frozen=True, kw_only=True, tag="head"):
    """The current version of a run's model, and all that it takes to pull and to check it."""

    run_id: Identifier
    epoch: Count
    round_num: Small
    """The version's number: the round that made it, 0 for the initial model."""
    slot: Annotated[int, msgspec.Meta(ge=0, le=1)]
    model_digest: Digest
    layout: Annotated[tuple[TensorSpec, ...], msgspec.Meta(max_length=MAX_TENSORS)]
    frame_elements: Annotated[int, msgspec.Meta(ge=1, le=2**24)]
    codec: ShortText
    counters: Counters
    task: ShortText

    def __post_init__(self) -> None:
        """Hold together what no field can say alone: an agent makes room on disk for what a head says."""
        layout = layout_of(self.layout)
        layout.check_counters(self.counters)
        num_frames = Framing(layout.num_elements, self.frame_elements).num_frames
        if num_frames > MAX_FRAMES:
            raise FrameError(f"{layout.num_elements} elements in {num_frames} frames, expected at most {MAX_FRAMES}")


class Presence(_Message, frozen=True, kw_only=True, tag="presence"):
    """An agent's presence: its birth message, and with `online` false its will or its farewell."""

    online: bool
    incarnation: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{1,32}\Z")]
    """New at each start of the agent: the will of an earlier start is told from this one's."""
    protocol: Small = 0
    version: ShortText = ""
    task: ShortText = ""
    labels: Labels = {}
    epoch: Count = 0
    """The highest epoch that the agent has seen: a coordinator that lost its state directory must go above it."""
    packet_limit_bytes: Count = 0
    """The largest packet that the agent's connection carries; 0 where it knows of no limit."""


class TrainingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent is told to do in a round."""

    local_epochs: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 1
    batch_size: Small = 0
    """Examples in a batch; 0 for all of them at once."""
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=1e6)] = 0.1
    momentum: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    proximal_mu: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0.0
    """Weight of `mu / 2 * ||w - w_global||^2` in the loss; 0 for none."""
    evaluate_every: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 1
    """Evaluate the version on the agent's own data, before training from it, where its number is a multiple of this."""
    extra: Parameters = {}
    """What the task alone knows."""


class _RoundMessage(_Message, frozen=True, kw_only=True):
    """What belongs to one attempt at one round. What does not match the receiver's is stale: counted, never an error."""

    run_id: Identifier
    epoch: Count
    round_num: Small
    attempt: Small


class Invitation(_RoundMessage, frozen=True, kw_only=True, tag="invitation"):
    """Train on the current version, please."""

    model_digest: Digest
    task: ShortText
    training: TrainingConfig
    seed: Count
    """The run's seed; an agent's own comes from (seed, round, agent)."""
    credit: Small
    """How many frames may be on their way, unacknowledged, at once."""
    deadline_s: Seconds
    """How long the round will still wait."""


class Credit(_RoundMessage, frozen=True, kw_only=True, tag="credit"):
    """An acknowledgement: what the coordinator still lacks of an update, and how many frames may be on their way."""

    missing: Annotated[tuple[Range, ...], msgspec.Meta(max_length=MAX_RANGES)]
    credit: Small
    need_header: bool = False


class Receipt(_RoundMessage, frozen=True, kw_only=True, tag="receipt"):
    """The end of an update: accepted for good, or rejected with the gate that it failed."""

    update_digest: Digest
    accepted: bool
    reason: RejectReason | None = None
    detail: Detail = ""


class Cancel(_RoundMessage, frozen=True, kw_only=True, tag="cancel"):
    """Stop: the coordinator no longer wants this work."""

    reason: CancelReason


class Acceptance(_RoundMessage, frozen=True, kw_only=True, tag="acceptance"):
    """The invitation is written down and taken."""


class Refusal(_RoundMessage, frozen=True, kw_only=True, tag="refusal"):
    """The agent takes no part in this round, or no longer."""

    reason: RefusalReason
    detail: Detail = ""


class Progress(_RoundMessage, frozen=True, kw_only=True, tag="progress"):
    """Where the agent is. Telemetry: sent at QoS 0, and nothing depends on it."""

    phase: Literal["fetching", "training", "uploading"]
    fraction: Annotated[float, msgspec.Meta(ge=0, le=1)]


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """How a model does on some data."""

    num_examples: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    loss: Finite
    """Mean over the examples."""
    metrics: Metrics = {}
    """Means over the examples, such as `accuracy`, a fraction from 0 to 1."""


class UpdateHeader(_RoundMessage, frozen=True, kw_only=True, tag="update"):
    """What an update is; its elements follow in frames."""

    model_digest: Digest
    """The version that it was trained on."""
    layout_digest: Digest
    update_digest: Digest
    num_frames: Annotated[int, msgspec.Meta(ge=1, le=MAX_FRAMES)]
    num_examples: Count
    counters: Counters
    training_s: Seconds = 0.0
    metrics: Metrics = {}
    """Of the training itself, such as its mean `loss`."""
    evaluation: Evaluation | None = None
    """Of the version that it was trained on, on this agent's data, before training."""


ToAgent = Invitation | Credit | Receipt | Cancel
ToCoordinator = Acceptance | Refusal | Progress | UpdateHeader
Message = ToAgent | ToCoordinator | CoordinatorStatus | RollCall | Head | Presence

M = TypeVar("M", bound=Message)

_decoders: dict[type, msgspec.json.Decoder[Any]] = {kind: msgspec.json.Decoder(kind) for kind in get_args(Message)}
_to_agent: msgspec.json.Decoder[ToAgent] = msgspec.json.Decoder(ToAgent)
_to_coordinator: msgspec.json.Decoder[ToCoordinator] = msgspec.json.Decoder(ToCoordinator)
_encoder = msgspec.json.Encoder()


def encode(message: Message) -> bytes:
    """A message as it travels."""
    return _encoder.encode(message)


def decode(payload: bytes | memoryview, kind: type[M]) -> M:
    """The message in `payload`, which must be of this kind.

    Raises:
        MessageError: it is not, or a field is missing or outside its limits; the message says which. So do the others.
    """
    message: M = _decode(payload, _decoders[kind])
    return message


def decode_to_agent(payload: bytes | memoryview) -> ToAgent:
    """The message in `payload`, of any kind that a coordinator tells an agent."""
    return _decode(payload, _to_agent)


def decode_to_coordinator(payload: bytes | memoryview) -> ToCoordinator:
    """The message in `payload`, of any kind that an agent tells the coordinator."""
    return _decode(payload, _to_coordinator)


K = TypeVar("K")


def _decode(payload: bytes | memoryview, decoder: msgspec.json.Decoder[K]) -> K:
    if len(payload) > MAX_MESSAGE_BYTES:
        raise MessageError(f"message of {len(payload)} bytes: expected at most {MAX_MESSAGE_BYTES}")
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MessageError(f"message of {len(payload)} bytes starting {bytes(payload[:60])!r}: {error}") from None
