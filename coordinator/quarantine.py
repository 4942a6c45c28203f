"""Quarantine: an agent whose updates are rejected again and again is not invited for some rounds. Pure.

A *strike* is an update that was rejected for its content, or left out since the candidate that it went into was refused
(held_out.py). `after` strikes within `window` rounds put an agent into quarantine: for the rest of that round and for `rounds`
rounds after it. Then it is released by itself, and begins without strikes.

Where an agent stands follows from its strikes alone. They are stored, so a restart changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from msgspec import Struct

CONTENT_REASONS = frozenset({"layout", "num_frames", "num_examples", "counters", "not_finite", "norm", "digest"})
"""Reasons of rejections that are about what an update is, and not about when it came or who sent it."""
HELD_OUT = "held_out"
"""The reason of a strike for an update that was left out."""


class Strike(Struct, frozen=True):
    """An agent's update was rejected for its content, or left out."""

    round_num: int
    attempt: int
    agent_id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class QuarantineConfig:
    """When, and for how long.

    Attributes:
        after: strikes; 0: there is no quarantine.
        window: rounds that they lie in.
        rounds: rounds after the present one that the agent takes no part in.
    """

    after: int = 3
    window: int = 20
    rounds: int = 10


class Quarantine:
    """Who is in quarantine.

    Args:
        config: when, and for how long.
        strikes: so far, in order.
    """

    def __init__(self, config: QuarantineConfig, strikes: Iterable[Strike] = ()) -> None:
        self._config = config
        self._strikes: dict[str, deque[Strike]] = {}
        self._last_round: dict[str, int] = {}
        for strike in strikes:
            self.release(strike.round_num)
            self.add(strike)

    def add(self, strike: Strike) -> bool:
        """Take a strike; whether it puts its agent into quarantine."""
        config, agent_id = self._config, strike.agent_id
        if not config.after or agent_id in self._last_round:
            return False
        strikes = self._strikes.setdefault(agent_id, deque(maxlen=config.after))
        strikes.append(strike)
        if len(strikes) < config.after or strikes[0].round_num <= strike.round_num - config.window:
            return False
        self._last_round[agent_id] = strike.round_num + config.rounds
        return True

    def release(self, round_num: int) -> list[str]:
        """This round comes: the agents that are released for it, in order of their ids."""
        released = sorted(agent_id for agent_id, last in self._last_round.items() if last < round_num)
        for agent_id in released:
            del self._last_round[agent_id], self._strikes[agent_id]
        faded = [
            agent_id
            for agent_id, all_ in self._strikes.items()
            if all_[-1].round_num <= round_num - self._config.window
        ]
        for agent_id in faded:
            if agent_id not in self._last_round:
                del self._strikes[agent_id]
        return released

    @property
    def held(self) -> dict[str, int]:
        """Each agent in quarantine, with the last round of it."""
        return dict(self._last_round)

    def why(self, agent_id: str) -> str:
        """Why an agent is in quarantine, and until when, in words."""
        strikes = self._strikes[agent_id]
        reasons = ", ".join(sorted({strike.reason for strike in strikes}))
        return (
            f"quarantined until round {self._last_round[agent_id]} is over: {len(strikes)} updates rejected or left out within "
            f"{self._config.window} rounds ({reasons})"
        )
