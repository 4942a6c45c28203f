"""Topics: the only file that builds or parses one.

All of them live below `midge/1/<federation>/` and have at most 7 slashes, which is what the narrowest broker allows:

    coordinator                         the coordinator's presence (retained, and its will)
    rollcall                            the coordinator asks every agent to say that it is there
    model/<run>/head                    which version of the model is current (retained)
    model/<run>/<slot>/<frame>          one frame of it (retained); two slots alternate
    agent/<id>/presence                 an agent's presence (retained, and its will)
    agent/<id>/inbox                    coordinator -> agent
    agent/<id>/outbox                   agent -> coordinator
    agent/<id>/update/<shard>/<frame>   one frame of the agent's update
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from midge.wire.errors import TopicError
from midge.wire.identifiers import check_identifier, is_identifier

ROOT = "midge/1"
NUM_SLOTS = 2
"""Versions of the model alternate between this many slots, so that pulling the last one is never torn."""

_MAX_TOPIC_LENGTH = 512
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class CoordinatorTopic:
    """The coordinator's presence."""


@dataclass(frozen=True, slots=True)
class RollCallTopic:
    """The coordinator calls the roll."""


@dataclass(frozen=True, slots=True)
class HeadTopic:
    """Which version of a run's model is current."""

    run_id: str


@dataclass(frozen=True, slots=True)
class ModelFrameTopic:
    """One frame of a run's model."""

    run_id: str
    slot: int
    index: int


@dataclass(frozen=True, slots=True)
class PresenceTopic:
    """An agent's presence."""

    agent_id: str


@dataclass(frozen=True, slots=True)
class InboxTopic:
    """What the coordinator tells one agent."""

    agent_id: str


@dataclass(frozen=True, slots=True)
class OutboxTopic:
    """What one agent tells the coordinator."""

    agent_id: str


@dataclass(frozen=True, slots=True)
class UpdateFrameTopic:
    """One frame of one agent's update."""

    agent_id: str
    shard: int
    index: int


Topic = (
    CoordinatorTopic
    | RollCallTopic
    | HeadTopic
    | ModelFrameTopic
    | PresenceTopic
    | InboxTopic
    | OutboxTopic
    | UpdateFrameTopic
)


class Topics:
    """The topics of one federation.

    Args:
        federation: its identifier.

    Raises:
        TopicError: `federation` is not an identifier. Every method that takes an identifier raises it likewise.
    """

    def __init__(self, federation: str) -> None:
        self.federation = check_identifier("federation", federation)
        self.prefix = f"{ROOT}/{federation}"
        self.coordinator = f"{self.prefix}/coordinator"
        self.rollcall = f"{self.prefix}/rollcall"
        self.all_presences = f"{self.prefix}/agent/+/presence"
        self.all_outboxes = f"{self.prefix}/agent/+/outbox"
        self.all_update_frames = f"{self.prefix}/agent/+/update/+/+"

    def __repr__(self) -> str:
        return f"Topics({self.federation!r})"

    def head(self, run_id: str) -> str:
        """Where the head of `run_id`'s model is retained."""
        return f"{self.prefix}/model/{check_identifier('run', run_id)}/head"

    def model_frame(self, run_id: str, slot: int, index: int) -> str:
        """Where frame `index` of the version in `slot` is retained."""
        return f"{self.prefix}/model/{check_identifier('run', run_id)}/{slot:d}/{index:d}"

    def presence(self, agent_id: str) -> str:
        """Where an agent's presence is retained."""
        return f"{self._agent(agent_id)}/presence"

    def inbox(self, agent_id: str) -> str:
        """Where an agent listens."""
        return f"{self._agent(agent_id)}/inbox"

    def outbox(self, agent_id: str) -> str:
        """Where an agent speaks."""
        return f"{self._agent(agent_id)}/outbox"

    def update_frame(self, agent_id: str, shard: int, index: int) -> str:
        """Where an agent publishes frame `index` of its update."""
        return f"{self._agent(agent_id)}/update/{shard:d}/{index:d}"

    def parse(self, topic: str) -> Topic:
        """The typed form of `topic`.

        Raises:
            TopicError: it is none of this federation's topics.
        """
        return _parse(self.prefix, self.federation, topic)

    def _agent(self, agent_id: str) -> str:
        return f"{self.prefix}/agent/{check_identifier('agent', agent_id)}"


@functools.lru_cache(maxsize=8192)
def _parse(prefix: str, federation: str, topic: str) -> Topic:
    if len(topic) <= _MAX_TOPIC_LENGTH and topic.startswith(prefix + "/"):
        match topic[len(prefix) + 1 :].split("/"):
            case ["agent", agent_id, "outbox"] if is_identifier(agent_id):
                return OutboxTopic(agent_id)
            case ["agent", agent_id, "update", shard, index] if (
                is_identifier(agent_id) and _NUMBER.fullmatch(shard) and _NUMBER.fullmatch(index)
            ):
                return UpdateFrameTopic(agent_id, int(shard), int(index))
            case ["agent", agent_id, "inbox"] if is_identifier(agent_id):
                return InboxTopic(agent_id)
            case ["agent", agent_id, "presence"] if is_identifier(agent_id):
                return PresenceTopic(agent_id)
            case ["model", run_id, "head"] if is_identifier(run_id):
                return HeadTopic(run_id)
            case ["model", run_id, slot, index] if (
                is_identifier(run_id) and _NUMBER.fullmatch(slot) and _NUMBER.fullmatch(index)
            ):
                if int(slot) < NUM_SLOTS:
                    return ModelFrameTopic(run_id, int(slot), int(index))
            case ["coordinator"]:
                return CoordinatorTopic()
            case ["rollcall"]:
                return RollCallTopic()
    shown = topic if len(topic) <= 120 else topic[:117] + "..."
    raise TopicError(f"topic {shown!r}: not one of federation {federation!r} (expected {prefix}/...)")
