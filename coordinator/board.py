"""The board: what a person or a page wants to see of the coordinator now. Written by the observer, read by anyone."""

from __future__ import annotations

import threading
from typing import Any

import msgspec

from midge.wire.messages import Evaluation

_NUM_EVENTS = 50
HISTORY = 1000
"""Rounds that are remembered here; the database has them all."""


class AgentView(msgspec.Struct):
    """What one agent is doing."""

    agent_id: str
    presence: str = "silent"
    """As the fleet has it: online, offline, or silent where it was not heard since the coordinator started."""
    activity: str = "idle"
    fraction: float = 0.0
    detail: str = ""


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
    is_connected: bool = False
    broker_problem: str = ""
    best_round: int | None = None
    best_value: float | None = None
    agents: dict[str, AgentView] = {}
    history: dict[int, RoundView] = {}
    events: list[str] = []

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
        return copied
