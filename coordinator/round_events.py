"""What goes into the machine of a round, and what comes out of it."""

from __future__ import annotations

from msgspec import Struct

# Events, in the past tense.


class FleetChanged(Struct, frozen=True):
    """These agents could take part now."""

    available: frozenset[str]

    def __str__(self) -> str:
        return f"FleetChanged({len(self.available)} agents)"


class AgentAccepted(Struct, frozen=True):
    """An agent took its invitation."""

    agent_id: str


class AgentRefused(Struct, frozen=True):
    """An agent takes no part, or no longer."""

    agent_id: str
    reason: str


class AgentLost(Struct, frozen=True):
    """An agent went offline."""

    agent_id: str


class AgentReturned(Struct, frozen=True):
    """An agent came online, or started anew: it may not know of its invitation."""

    agent_id: str


class UpdateAccepted(Struct, frozen=True):
    """An agent's update is complete, passed every gate and is stored."""

    agent_id: str


class UpdateRejected(Struct, frozen=True):
    """An agent's update failed a gate."""

    agent_id: str
    reason: str


class Aggregated(Struct, frozen=True):
    """The new version is stored under this digest."""

    digest: str


class AggregationFailed(Struct, frozen=True):
    """No new version could be made."""

    reason: str


class CandidatePassed(Struct, frozen=True):
    """The new version is no worse than the held-out gate allows."""


class CandidateRefused(Struct, frozen=True):
    """It is; the next attempt is to do without these agents' updates."""

    reason: str
    left_out: tuple[str, ...] = ()


class CloseRequested(Struct, frozen=True):
    """The operator wants the round to end with what has come."""


class TimePassed(Struct, frozen=True):
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
    | CandidatePassed
    | CandidateRefused
    | CloseRequested
    | TimePassed
)


# Commands, in the imperative.


class Invite(Struct, frozen=True):
    """Invite these agents, for the first time or again."""

    agent_ids: tuple[str, ...]


class Release(Struct, frozen=True):
    """These agents are lost: what is reserved for them can go to others, until they are heard again."""

    agent_ids: tuple[str, ...]


class Dismiss(Struct, frozen=True):
    """Tell these agents that their work is not wanted any more."""

    agent_ids: tuple[str, ...]


class Aggregate(Struct, frozen=True):
    """Average these agents' updates; `Aggregated` or `AggregationFailed` follows."""

    agent_ids: tuple[str, ...]


class Check(Struct, frozen=True):
    """Compare this candidate with its parent; `CandidatePassed` or `CandidateRefused` follows."""

    digest: str


class Commit(Struct, frozen=True):
    """Make this version the current one."""

    digest: str


class Abandon(Struct, frozen=True):
    """Give this attempt up."""

    reason: str


Command = Invite | Release | Dismiss | Aggregate | Check | Commit | Abandon
