"""One attempt at one round: who is invited, whom it still waits for, and when it ends.

Purpose: draw a cohort, wait for its updates within bounds, and come to exactly one end. It holds ids and counts; it must
not know of topics, tensors, disks or clocks (`now` is handed in, monotonic seconds).

States
    SELECTING    fewer agents are there than the least cohort; waits for more until the selection deadline
    COLLECTING   the cohort is invited; waits for updates until enough came, nobody is left to wait for, or the deadline
    AGGREGATING  the accepted updates are being averaged
    CHECKING     what they came to is being compared with the version before it; only where that is asked for
    COMMITTED    the new version is stored (final)
    ABANDONED    the attempt failed, for the reason that it carries (final)

Events               SELECTING  COLLECTING  AGGREGATING  CHECKING  COMMITTED  ABANDONED
    FleetChanged     legal      legal       ignored      ignored   ignored    ignored
    AgentAccepted    ignored    legal       ignored      ignored   ignored    ignored
    AgentRefused     ignored    legal       ignored      ignored   ignored    ignored
    AgentLost        ignored    legal       ignored      ignored   ignored    ignored
    AgentReturned    ignored    legal       ignored      ignored   ignored    ignored
    UpdateAccepted   illegal    legal       illegal      illegal   illegal    illegal
    UpdateRejected   illegal    legal       illegal      illegal   illegal    illegal
    Aggregated       illegal    illegal     legal        illegal   illegal    illegal
    AggregationFailed  illegal  illegal     legal        illegal   illegal    illegal
    CandidatePassed  illegal    illegal     illegal      legal     illegal    illegal
    CandidateRefused illegal    illegal     illegal      legal     illegal    illegal
    CloseRequested   legal      legal       ignored      ignored   ignored    ignored
    TimePassed       legal      legal       legal        legal     legal      legal

What is ignored is late or double: normal on MQTT. What is illegal is our own bug, since the driver decides when to send it: it
raises. An event of an agent that is not in the cohort is ignored in every state.

Members of the cohort: INVITED -> ACCEPTED -> REPORTED, or REFUSED, REJECTED (its update failed a gate) or LOST (offline,
or silent since the invitation; what is reserved for it is released). A lost member that comes back is invited again. For
one that refused, was rejected or lost, the next agent of the draw is invited. A member that is LEFT_OUT takes no part in this
attempt, nor in later ones at this round: a candidate that its update went into was refused.

The draw is random by the run's seed; or, where agents are visited in turn, it is a fixed order that each round begins one
place later, so that whoever is not there is passed over.
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.durations import in_words
from coordinator.round_events import (
    Abandon,
    AgentAccepted,
    AgentLost,
    AgentRefused,
    AgentReturned,
    Aggregate,
    Aggregated,
    AggregationFailed,
    CandidatePassed,
    CandidateRefused,
    Check,
    CloseRequested,
    Command,
    Commit,
    Dismiss,
    Event,
    FleetChanged,
    Invite,
    Release,
    TimePassed,
    UpdateAccepted,
    UpdateRejected,
)
from coordinator.waits import Wait

_FIRST_RESEND_S = 2.0
_RETURN_GRACE_S = 30.0
"""How long a round without quorum waits for lost members, when nobody else is left to wait for."""


class RoundState(enum.StrEnum):
    """Where an attempt stands."""

    SELECTING = "selecting"
    COLLECTING = "collecting"
    AGGREGATING = "aggregating"
    CHECKING = "checking"
    COMMITTED = "committed"
    ABANDONED = "abandoned"


class MemberState(enum.StrEnum):
    """Where a member of the cohort stands."""

    INVITED = "invited"
    ACCEPTED = "accepted"
    REPORTED = "reported"
    REFUSED = "refused"
    REJECTED = "rejected"
    LOST = "lost"
    LEFT_OUT = "left_out"


WAITING = (MemberState.INVITED, MemberState.ACCEPTED)
_SAID = {
    MemberState.ACCEPTED: "took the invitation",
    MemberState.REJECTED: "sent an update that was rejected",
    MemberState.LEFT_OUT: "is left out",
}
"""What a person would misread, in other words: "accepted" and "rejected" are said of updates, too."""


@dataclass(frozen=True, kw_only=True)
class RoundConfig:
    """What bounds an attempt.

    Attributes:
        target: agents whose updates are wanted; 0 for every agent that is there.
        minimum: the least agents to begin with.
        quorum: the least updates to aggregate.
        over_select: invited agents over `target`, where the fleet allows.
        selection_deadline_s: wait for `minimum` agents at most this long.
        acceptance_deadline_s: an invited agent that says nothing for so long is lost.
        report_deadline_s: wait for updates at most this long after the first invitation.
        in_turn: agents are visited one after the other: `target`, `minimum` and `quorum` are 1 then.
        is_checked: whether what was aggregated is compared with the version before it.
        visit_order: the order; agents that are not in it are never visited. Empty: all, in order of their ids.
    """

    target: int = 0
    minimum: int = 1
    quorum: int = 1
    over_select: float = 1.3
    selection_deadline_s: float = 60.0
    acceptance_deadline_s: float = 20.0
    report_deadline_s: float = 600.0
    in_turn: bool = False
    is_checked: bool = False
    visit_order: tuple[str, ...] = ()


_OURS = (UpdateAccepted, UpdateRejected, Aggregated, AggregationFailed, CandidatePassed, CandidateRefused)
_PEER = (FleetChanged, AgentAccepted, AgentRefused, AgentLost, AgentReturned, CloseRequested, TimePassed)
LEGAL: Mapping[RoundState, tuple[type, ...]] = {
    RoundState.SELECTING: (FleetChanged, CloseRequested, TimePassed),
    RoundState.COLLECTING: (*_PEER, UpdateAccepted, UpdateRejected),
    RoundState.AGGREGATING: (Aggregated, AggregationFailed, TimePassed),
    RoundState.CHECKING: (CandidatePassed, CandidateRefused, TimePassed),
    RoundState.COMMITTED: (TimePassed,),
    RoundState.ABANDONED: (TimePassed,),
}


class IllegalEventError(Exception):
    """Our own bug: an event that cannot come in this state. Prints what was legal, and the story so far."""


def draw_order(agent_ids: Iterable[str], seed: int, round_num: int) -> list[str]:
    """Agents in the order in which this round would invite them.

    Each agent's rank is a hash of (seed, round, agent), so the draw is uniform, can be drawn again by anyone who knows
    the seed, and the order of two agents does not depend on who else is there.
    """

    def rank(agent_id: str) -> bytes:
        return hashlib.sha256(f"{seed}/{round_num}/{agent_id}".encode()).digest()

    return sorted(agent_ids, key=rank)


def visiting_order(agent_ids: Iterable[str], visit_order: Sequence[str], round_num: int) -> list[str]:
    """Agents in the order in which this round would visit them: the one whose turn it is, then those that follow.

    Round r begins at position (r - 1) mod n of the n agents in `visit_order`, or of `agent_ids` in alphabetical order where
    that is empty. Of `visit_order`, only those in `agent_ids` are given.
    """
    there = set(agent_ids)
    order = list(visit_order) or sorted(there)
    first = (round_num - 1) % len(order) if order else 0
    return [agent_id for agent_id in (*order[first:], *order[:first]) if agent_id in there]


@dataclass
class _Member:
    state: MemberState
    invited_at: float = 0.0
    resend_at: float = math.inf
    resend_s: float = _FIRST_RESEND_S
    left_at: float = -math.inf
    """Since when it is not waited for."""
    reason: str = ""


@dataclass
class Round:
    """The machine. `step` takes an event and the time and returns commands; `deadline` says when to call it at the latest.

    Args:
        config: the bounds.
        round_num: from 1.
        attempt: from 1.
        seed: the run's.
        now: monotonic seconds.
        failures: how often an agent was invited to earlier attempts at this round and did not report.
        left_out: agents that this attempt does without.
    """

    config: RoundConfig
    round_num: int
    attempt: int
    seed: int
    now: float
    state: RoundState = RoundState.SELECTING
    reason: str = ""
    digest: str = ""
    failures: Mapping[str, int] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    _available: frozenset[str] = frozenset()
    _members: dict[str, _Member] = field(default_factory=dict)
    _num_invited_first: int = 0
    _ends_at: float = 0.0
    _wake_at: float = 0.0
    """When time alone changes something: before that, there is nothing to settle."""
    _story: deque[str] = field(default_factory=lambda: deque(maxlen=40))

    def __post_init__(self) -> None:
        self._ends_at = self._wake_at = self.now + self.config.selection_deadline_s
        for agent_id in self.left_out:
            self._members[agent_id] = _Member(MemberState.LEFT_OUT)

    @classmethod
    def restore(
        cls,
        config: RoundConfig,
        *,
        round_num: int,
        attempt: int,
        seed: int,
        now: float,
        state: RoundState,
        members: Mapping[str, MemberState],
    ) -> Round:
        """The machine as it was persisted. Deadlines begin anew: no clock outlives a process.

        What was being checked is aggregated again, to the same bits.

        Members that were still awaited are invited again by `resume`, which must come first.
        """
        left_out = tuple(agent_id for agent_id, one in members.items() if one is MemberState.LEFT_OUT)
        self = cls(config, round_num, attempt, seed, now, left_out=left_out)
        self.state = RoundState.AGGREGATING if state is RoundState.CHECKING else state
        for agent_id, member_state in members.items():
            resend_at = now if member_state in WAITING else math.inf
            self._members[agent_id] = _Member(member_state, invited_at=now, resend_at=resend_at, left_at=now)
        self._num_invited_first = self._num_to_invite(len(self._invited))
        if state is RoundState.COLLECTING:
            self._ends_at = now + config.report_deadline_s
        self._wake_at = self._next_wake()
        return self

    def step(self, event: Event, now: float) -> list[Command]:
        """Take one event at `now` and return what is to be done.

        Raises:
            IllegalEventError: the driver sent an event that cannot come in this state.
        """
        self.now = max(now, self.now)
        commands = self._settle() if self.now >= self._wake_at else []
        if isinstance(event, TimePassed):
            return commands
        self._story.append(f"{self.state} {event}")
        if type(event) in LEGAL[self.state]:
            commands += self._apply(event)
            commands += self._settle()
        elif isinstance(event, _OURS):
            raise IllegalEventError(
                f"round {self.round_num}, attempt {self.attempt}: got {event} in state {self.state}; legal here: "
                f"{', '.join(kind.__name__ for kind in LEGAL[self.state])}. The story: {'; '.join(self._story)}"
            )
        return commands

    def resume(self) -> list[Command]:
        """What a restored attempt must do first."""
        if self.state is RoundState.AGGREGATING:
            return [Aggregate(self.reported)]
        return self._settle()

    def deadline(self) -> float:
        """When time alone changes something; infinity where it never does."""
        return self._wake_at

    @property
    def members(self) -> dict[str, MemberState]:
        """The cohort and where each stands."""
        return {agent_id: member.state for agent_id, member in self._members.items()}

    @property
    def reported(self) -> tuple[str, ...]:
        """Agents whose updates are accepted, in order of their ids."""
        return tuple(sorted(a for a, member in self._members.items() if member.state is MemberState.REPORTED))

    @property
    def awaited(self) -> tuple[str, ...]:
        """Agents that the round still waits for, in order of their ids."""
        return tuple(sorted(a for a, member in self._members.items() if member.state in WAITING))

    @property
    def ends_at(self) -> float:
        """When the wait for updates ends, monotonic seconds."""
        return self._ends_at

    def state_of(self, agent_id: str) -> MemberState | None:
        """Where a member of the cohort stands; None for any other agent."""
        member = self._members.get(agent_id)
        return None if member is None else member.state

    def is_open_to(self, agent_id: str) -> bool:
        """Whether an update of this agent could still count."""
        return self.state is RoundState.COLLECTING and self.state_of(agent_id) in (*WAITING, MemberState.LOST)

    def status(self, now: float) -> str:
        """One line: what is missing, and until when."""
        match self.state:
            case RoundState.SELECTING:
                left = in_words(self.deadline() - now)
                return f"waiting for agents: {self._num_there} of {self.config.minimum} are there (gives up in {left})"
            case RoundState.COLLECTING:
                left = in_words(min(self._ends_at, math.inf if self._num_awaited else self._grace_ends_at()) - now)
                return f"{len(self.reported)} of {self._wanted} updates, {self._waiting_for()} (at most {left})"
            case RoundState.AGGREGATING:
                return f"averaging {len(self.reported)} updates"
            case RoundState.CHECKING:
                return "comparing the candidate with the version before it"
            case RoundState.COMMITTED:
                return f"committed {self.digest[:12]} from {len(self.reported)} updates"
            case RoundState.ABANDONED:
                return f"abandoned: {self.reason}"

    def wait(self) -> Wait | None:
        """What it waits for; None once it has ended."""
        match self.state:
            case RoundState.SELECTING:
                return Wait("agents", max(0, self.config.minimum - len(self._available)), self._ends_at)
            case RoundState.COLLECTING:
                until = min(self._ends_at, math.inf if self._num_awaited else self._grace_ends_at())
                return Wait("updates", max(0, self._wanted - self._num_reported), until)
            case RoundState.AGGREGATING:
                return Wait("aggregation")
            case _:
                return None

    def _waiting_for(self) -> str:
        awaited = self.awaited
        if awaited:
            return f"waiting for {_listed(awaited)}"
        lost = sorted(agent_id for agent_id, member in self._members.items() if member.state is MemberState.LOST)
        return f"{_listed(lost)} {'are' if len(lost) > 1 else 'is'} lost; waiting for one to return"

    def check(self) -> None:
        """Assert the invariants that hold between any two steps."""
        if self.state in (RoundState.AGGREGATING, RoundState.CHECKING, RoundState.COMMITTED):
            assert self._num_reported >= self.config.quorum, "I5: fewer updates than the quorum"
        if self.state is RoundState.COMMITTED:
            assert self.digest, "a committed round without a digest"
        if self.state is RoundState.ABANDONED:
            assert self.reason, "an abandoned round without a reason"
        if self.state is RoundState.COLLECTING:
            assert self._members, "collecting from nobody"
            assert self._num_awaited or self.now < self._grace_ends_at(), "waiting for nobody"

    # What time does.

    def _settle(self) -> list[Command]:
        """Apply whatever the passing of time, or the counts, decide by now. Runs before and after each event."""
        commands: list[Command] = []
        if self.state is RoundState.SELECTING and self.now >= self._ends_at:
            commands = self._abandon(
                f"{self._num_there} of {self.config.minimum} agents were there after "
                f"{self.config.selection_deadline_s:g} s; start more agents or lower min_agents"
            )
        elif self.state is RoundState.COLLECTING:
            commands = self._settle_members() + self._settle_end()
        self._wake_at = self._next_wake()
        return commands

    def _next_wake(self) -> float:
        if self.state is RoundState.SELECTING:
            return self._ends_at
        if self.state is not RoundState.COLLECTING:
            return math.inf
        next_resend = min((member.resend_at for member in self._members.values()), default=math.inf)
        return min(self._ends_at, next_resend, math.inf if self._num_awaited else self._grace_ends_at())

    def _settle_members(self) -> list[Command]:
        again: list[str] = []
        lost: list[str] = []
        for agent_id, member in self._members.items():
            if self.now < member.resend_at:
                continue
            silent_at = member.invited_at + self.config.acceptance_deadline_s
            if min(self.now, self._ends_at) >= silent_at:
                self._fail(member, MemberState.LOST, "silent", silent_at)
                lost.append(agent_id)
            else:
                again.append(agent_id)
                member.resend_at = min(self.now + member.resend_s, silent_at)
                member.resend_s *= 2
        commands: list[Command] = [Release(tuple(lost))] if lost else []
        if self.now >= self._ends_at:
            return commands
        return [*commands, *([Invite(tuple(again))] if again else []), *self._replace()]

    def _settle_end(self) -> list[Command]:
        num_reported, num_awaited = self._num_reported, self._num_awaited
        if self.config.target and num_reported >= max(self.config.target, self.config.quorum):
            return self._close()
        if num_reported >= self.config.quorum and (not num_awaited or self.now >= self._ends_at):
            return self._close()
        if not num_awaited and self._grace_ends_at() <= min(self.now, self._ends_at):
            return self._abandon(self._shortfall("with nobody left to wait for"))
        if self.now >= self._ends_at:
            return self._abandon(self._shortfall(f"after {self.config.report_deadline_s:g} s"))
        return []

    @property
    def _num_reported(self) -> int:
        return [member.state for member in self._members.values()].count(MemberState.REPORTED)

    @property
    def _num_awaited(self) -> int:
        states = [member.state for member in self._members.values()]
        return sum(map(states.count, WAITING))

    def _grace_ends_at(self) -> float:
        """Until when lost members may come back once nobody is waited for; minus infinity where none is lost."""
        if all(member.state is not MemberState.LOST for member in self._members.values()):
            return -math.inf
        return max(member.left_at for member in self._members.values()) + _RETURN_GRACE_S

    # What events do.

    def _apply(self, event: Event) -> list[Command]:
        match event:
            case FleetChanged(available):
                self._available = available
                if self.state is RoundState.SELECTING and self._has_enough:
                    return self._select()
            case Aggregated(digest):
                self.state = RoundState.CHECKING if self.config.is_checked else RoundState.COMMITTED
                self.digest = digest
                return [Check(digest) if self.config.is_checked else Commit(digest)]
            case CandidatePassed():
                self.state = RoundState.COMMITTED
                return [Commit(self.digest)]
            case CandidateRefused(reason, left_out):
                for agent_id in left_out:
                    self._fail(self._members[agent_id], MemberState.LEFT_OUT, "", self.now)
                return self._abandon(reason)
            case AggregationFailed(reason):
                return self._abandon(reason)
            case CloseRequested():
                return self._close_early()
            case TimePassed():
                pass
            case _:
                if event.agent_id in self._members:
                    return self._apply_to_member(self._members[event.agent_id], event)
        return []

    def _apply_to_member(self, member: _Member, event: Event) -> list[Command]:
        done = member.state not in (*WAITING, MemberState.LOST)
        match event:
            case UpdateAccepted():
                member.state = MemberState.REPORTED
                member.resend_at = math.inf
                member.left_at = self.now
            case UpdateRejected(_, reason):
                self._fail(member, MemberState.REJECTED, reason, self.now)
            case AgentAccepted() if not done:
                member.state = MemberState.ACCEPTED
                member.resend_at = math.inf
                member.reason = ""
            case AgentRefused(_, reason) if not done:
                self._fail(member, MemberState.REFUSED, reason, self.now)
            case AgentLost(agent_id) if member.state in WAITING:
                self._fail(member, MemberState.LOST, "offline", self.now)
                return [Release((agent_id,)), *self._replace()]
            case AgentReturned(agent_id) if member.state in (*WAITING, MemberState.LOST):
                self._invite(agent_id)
                return [Invite((agent_id,))]
            case _:
                return []
        return self._replace()

    def _select(self) -> list[Command]:
        chosen = self._draw(self._eligible)[: self._num_to_invite(len(self._eligible))]
        self.state = RoundState.COLLECTING
        self._ends_at = self.now + self.config.report_deadline_s
        self._num_invited_first = len(chosen)
        for agent_id in chosen:
            self._invite(agent_id)
        return [Invite(tuple(chosen))]

    def _draw(self, agent_ids: Collection[str]) -> list[str]:
        """The draw, those that failed earlier attempts last: a silent agent must not stall one attempt after another."""
        if self.config.in_turn:  # the members keep their places, so that those who follow them follow
            turns = visiting_order({*agent_ids, *self._members}, self.config.visit_order, self.round_num)
            order = [agent_id for agent_id in turns if agent_id in agent_ids]
        else:
            order = draw_order(agent_ids, self.seed, self.round_num)
        return sorted(order, key=lambda agent_id: self.failures.get(agent_id, 0))

    def _num_to_invite(self, num_available: int) -> int:
        """How many of so many agents take part at once."""
        if not self.config.target:
            return num_available
        wanted = math.ceil(self.config.target * self.config.over_select - 1e-9)
        return min(num_available, max(wanted, self.config.minimum, self.config.quorum))

    def _invite(self, agent_id: str) -> None:
        resend_s = min(_FIRST_RESEND_S, self.config.acceptance_deadline_s)
        self._members[agent_id] = _Member(MemberState.INVITED, self.now, self.now + resend_s, resend_s * 2)

    def _fail(self, member: _Member, state: MemberState, reason: str, at: float) -> None:
        member.state = state
        member.reason = reason
        member.resend_at = math.inf
        member.left_at = at

    def _replace(self) -> list[Command]:
        """Invite the next agents of the draw for those that will not report, up to the number first invited."""
        if not self.config.target:
            return []
        short = self._num_invited_first - self._num_awaited - self._num_reported
        if short <= 0:
            return []
        spare = self._available - self._members.keys()
        if not spare:
            return []
        chosen = self._draw(spare)[:short]
        for agent_id in chosen:
            self._invite(agent_id)
        return [Invite(tuple(chosen))]

    def _close_early(self) -> list[Command]:
        if len(self.reported) >= self.config.quorum and self.state is RoundState.COLLECTING:
            return self._close()
        return self._abandon(self._shortfall("when the operator closed it"))

    def _close(self) -> list[Command]:
        self.state = RoundState.AGGREGATING
        return [*self._dismiss(), Aggregate(self.reported)]

    def _abandon(self, reason: str) -> list[Command]:
        dismiss = self._dismiss()
        self.state = RoundState.ABANDONED
        self.reason = reason
        return [*dismiss, Abandon(reason)]

    def _dismiss(self) -> list[Command]:
        pending = (*WAITING, MemberState.LOST)
        waiting = tuple(sorted(a for a, member in self._members.items() if member.state in pending))
        return [Dismiss(waiting)] if waiting else []

    @property
    def _eligible(self) -> frozenset[str]:
        """Agents that are there, and that this attempt need not do without."""
        return self._available.difference(self.left_out)

    @property
    def _num_there(self) -> int:
        """Those that are left out had reported: for the least cohort they count as there."""
        return len(self._available.union(self.left_out))

    @property
    def _has_enough(self) -> bool:
        return self._num_there >= self.config.minimum and len(self._eligible) >= min(
            self.config.quorum, self.config.minimum
        )

    @property
    def _invited(self) -> list[str]:
        return [agent_id for agent_id, member in self._members.items() if member.state is not MemberState.LEFT_OUT]

    @property
    def _wanted(self) -> int:
        return self.config.target or len(self._invited)

    def _shortfall(self, when: str) -> str:
        why = [
            f"{agent_id} {_SAID.get(member.state, member.state)}" + (f" ({member.reason})" if member.reason else "")
            for agent_id, member in sorted(self._members.items())
            if member.state is not MemberState.REPORTED
        ]
        updates = f"{len(self.reported)} update{'' if len(self.reported) == 1 else 's'}"
        return f"{updates}, quorum is {self.config.quorum}, {when}: " + (", ".join(why[:8]) or "none invited")


def _listed(agent_ids: Sequence[str]) -> str:
    return ", ".join(agent_ids[:5]) + (", ..." if len(agent_ids) > 5 else "")
