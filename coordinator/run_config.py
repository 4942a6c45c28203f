"""What a run is, as its machines see it: what was asked for, and what is on disk of it."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coordinator import run_events as ev
from coordinator.held_out import HeldOutGate
from coordinator.quarantine import QuarantineConfig, Strike
from coordinator.round import MemberState, RoundConfig, RoundState
from midge.wire.frames import Framing
from midge.wire.layout import Layout
from midge.wire.messages import Evaluation, TrainingConfig


class RunState(enum.StrEnum):
    """Where a run stands."""

    PREPARING = "preparing"
    WAITING = "waiting"
    PUBLISHING = "publishing"
    IN_ROUND = "in_round"
    FINISHING = "finishing"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"


FINAL = (RunState.DONE, RunState.FAILED, RunState.STOPPED)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run is. Every bound is in seconds or a count; docs/configuration.md explains each."""

    run_id: str
    task: str
    rounds: int
    seed: int = 0
    round: RoundConfig = field(default_factory=RoundConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    labels: Mapping[str, str] = field(default_factory=dict)
    min_agents: int = 0
    """Agents to wait for before the first round; 0 for as many as a round needs."""
    start_agents: int = 0
    """The same, where it is to be more than that."""
    start_deadline_s: float = 3600.0
    max_attempts: int = 5
    max_examples: int = 10_000_000
    norm_bound: float = 0.0
    held_out: HeldOutGate = field(default_factory=HeldOutGate)
    quarantine: QuarantineConfig = field(default_factory=QuarantineConfig)
    evaluate: bool = True
    best_metric: str = "accuracy"
    best_is_max: bool = True

    @property
    def num_to_start(self) -> int:
        """How many agents must be there before the first round."""
        return max(self.start_agents, self.min_agents or self.round.minimum)


@dataclass(frozen=True, slots=True)
class Version:
    """A version of the model, and the digest of what the strategy remembers with it; None where it remembers nothing."""

    round_num: int
    digest: str
    server_state: str | None = None


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """What a run needs to go on where it was.

    Attributes:
        version: the last one that was committed.
        layout: of its model.
        framing: how the run cuts it.
        attempt: of the round after it; 0 where none was begun.
        round_state: of that attempt.
        members: of that attempt.
        accepted: updates of that round that count already, of any attempt.
        unevaluated: versions whose evaluation is still owed, at most two.
        best: (round, value) so far.
        tallies: of updates so far.
        score: of the version on test data, where it is known.
        strikes: against agents, in order.
    """

    version: Version
    layout: Layout
    framing: Framing
    attempt: int = 0
    round_state: RoundState = RoundState.ABANDONED
    members: Mapping[str, MemberState] = field(default_factory=dict)
    accepted: Sequence[ev.AcceptedUpdate] = ()
    unevaluated: Sequence[Version] = ()
    best: tuple[int, float] | None = None
    tallies: Mapping[tuple[str, str], int] = field(default_factory=dict)
    score: Evaluation | None = None
    strikes: Sequence[Strike] = ()
