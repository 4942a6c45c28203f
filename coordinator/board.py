"""The board: what a person or a page wants to see of the coordinator now. Written by the observer, read by anyone."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import msgspec

from coordinator.run_events import AcceptedUpdate
from midge.wire.messages import Evaluation

_NUM_EVENTS = 50
HISTORY = 1000
"""Rounds that are remembered here; the database has them all."""
AGENT_ROUNDS = 20
"""Rounds that are remembered here of each agent."""
SCORED_AGENTS = 100
"""Agents whose rounds are remembered here: the first that report."""


class AgentView(msgspec.Struct):
    """What one agent is doing."""

    agent_id: str
    presence: str = "silent"
    """As the fleet has it: online, offline, or silent where it was not heard since the coordinator started."""
    activity: str = "idle"
    fraction: float = 0.0
    detail: str = ""
    quarantined_until: int = 0
    """Last round of its quarantine; 0: it is in none."""
    quarantine: str = ""
    """Why, in words."""


class RoundView(msgspec.Struct):
    """A committed version, 0 for the initial model."""

    round_num: int
    duration_s: float = 0.0
    num_updates: int = 0
    num_examples: int = 0
    delta_norm: float = 0.0
    attempts: int = 0
    central: Evaluation | None = None
    federated: Evaluation | None = None

    @property
    def score(self) -> Evaluation | None:
        """The central score where there is one, else the agents' own."""
        return self.central or self.federated


class AgentRound(msgspec.Struct):
    """What an agent's update said of one round.

    Attributes:
        round_num: the round.
        num_examples: that it trained on.
        norm: L2 norm of its delta.
        training_s: how long it trained.
        training_loss: its mean loss over the last local epoch, where the task tells.
        evaluation: of version `round_num - 1`, which it trained from, on its own data, before it trained.
    """

    round_num: int
    num_examples: int
    norm: float
    training_s: float
    training_loss: float | None = None
    evaluation: Evaluation | None = None


class Board(msgspec.Struct):
    """The whole of it."""

    federation: str
    broker: str
    run_id: str = ""
    task: str = ""
    rounds: int = 0
    state: str = "idle"
    status: str = "no run"
    reason: str = ""
    round_num: int = 0
    attempt: int = 0
    waiting_for: str = ""
    num_missing: int = 0
    waiting_since: str = ""
    """When that wait began, and when it ends at the latest, in UTC; empty where it has no end of its own."""
    waiting_until: str = ""
    is_connected: bool = False
    broker_problem: str = ""
    best_round: int | None = None
    best_value: float | None = None
    agents: dict[str, AgentView] = {}
    history: dict[int, RoundView] = {}
    agent_rounds: dict[str, dict[int, AgentRound]] = {}
    events: list[str] = []

    def add_update(self, round_num: int, update: AcceptedUpdate) -> None:
        """Remember what an accepted update says of its agent, where there is room."""
        rounds = self.agent_rounds.get(update.agent_id)
        if rounds is None:
            if len(self.agent_rounds) >= SCORED_AGENTS:
                return
            rounds = self.agent_rounds[update.agent_id] = {}
        rounds[round_num] = AgentRound(
            round_num,
            update.num_examples,
            update.norm,
            update.training_s,
            update.metrics.get("loss"),
            update.evaluation,
        )
        while len(rounds) > AGENT_ROUNDS:
            rounds.pop(next(iter(rounds)))

    def add_event(self, text: str) -> None:
        """Note something that a person should read."""
        self.events.append(text)
        del self.events[:-_NUM_EVENTS]

    def round_view(self, round_num: int) -> RoundView:
        """The entry of a version, made where there is none."""
        if round_num not in self.history:
            self.history[round_num] = RoundView(round_num)
            while len(self.history) > HISTORY:
                self.history.pop(next(iter(self.history)))
        return self.history[round_num]


class Shared:
    """The board with its lock: the coordinator's loop writes it, HTTP and the screen read copies."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.lock = threading.Lock()

    def snapshot(self) -> dict[str, Any]:
        """A copy in JSON's types."""
        with self.lock:
            copied: dict[str, Any] = msgspec.to_builtins(self.board)
        copied["history"] = list(copied["history"].values())
        copied["agents"] = [copied["agents"][agent_id] for agent_id in sorted(copied["agents"])]
        rounds = copied["agent_rounds"]
        copied["agent_rounds"] = {agent_id: list(rounds[agent_id].values()) for agent_id in sorted(rounds)}
        return copied


def from_snapshot(snapshot: Mapping[str, Any]) -> Board:
    """The board that a snapshot was made of.

    Raises:
        msgspec.ValidationError: it is none: of another version of Midge, say.
    """
    fields = {
        **snapshot,
        "history": {view["round_num"]: view for view in snapshot.get("history", ())},
        "agents": {view["agent_id"]: view for view in snapshot.get("agents", ())},
        "agent_rounds": {
            agent_id: {view["round_num"]: view for view in views}
            for agent_id, views in snapshot.get("agent_rounds", {}).items()
        },
    }
    return msgspec.convert(fields, Board)
