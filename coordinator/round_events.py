"""What goes into the machine of a round, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass

# Events, in the past tense.


@dataclass(frozen=True, slots=True)
class FleetChanged:
    """These agents could take part now."""

    available: frozenset[str]

    def __str__(self) -> str:
        return f"FleetChanged({len(self.available)} agents)"


@dataclass(frozen=True, slots=True)
class AgentAccepted:
    """An agent took its invitation."""

    agent_id: str


@dataclass(frozen=True, slots=True)
class AgentRefused:
    """An agent takes no part, or no longer."""

    agent_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class AgentLost:
    """An agent went offline."""

    agent_id: str


@dataclass(frozen=True, slots=True)
class AgentReturned:
    """An agent came online, or started anew: it may not know of its invitation."""

    agent_id: str


@dataclass(frozen=True, slots=True)
class UpdateAccepted:
    """An agent's update is complete, passed every gate and is stored."""

    agent_id: str


@dataclass(frozen=True, slots=True)
class UpdateRejected:
    """An agent's update failed a gate."""

    agent_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Aggregated:
    """The new version is stored under this digest."""

    digest: str


@dataclass(frozen=True, slots=True)
class AggregationFailed:
    """No new version could be made."""

    reason: str


@dataclass(frozen=True, slots=True)
class CloseRequested:
    """The operator wants the round to end with what has come."""


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Nothing but time."""


Event = (
    FleetChanged
    | AgentAccepted
    | AgentRefused
    | AgentLost
    | AgentReturned
    | UpdateAccepted
    | UpdateRejected
    | Aggregated
    | AggregationFailed
    | CloseRequested
    | TimePassed
)


# Commands, in the imperative.


@dataclass(frozen=True, slots=True)
class Invite:
    """Invite these agents, for the first time or again."""

    agent_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """These agents are lost: what is reserved for them can go to others, until they are heard again."""

    agent_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Dismiss:
    """Tell these agents that their work is not wanted any more."""

    agent_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Aggregate:
    """Average these agents' updates; `Aggregated` or `AggregationFailed` follows."""

    agent_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Commit:
    """Make this version the current one."""

    digest: str


@dataclass(frozen=True, slots=True)
class Abandon:
    """Give this attempt up."""

    reason: str


Command = Invite | Release | Dismiss | Aggregate | Commit | Abandon
