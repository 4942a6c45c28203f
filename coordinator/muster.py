"""The muster: which agents of the fleet could take part in a run's round now, and why others cannot. Pure."""

from __future__ import annotations

from coordinator.cohort import Fleet
from coordinator.quarantine import Quarantine
from coordinator.run_config import RunConfig

_NUM_NAMED = 3
"""Of so many agents that are here and cannot take part, a status line gives the reason."""


class Muster:
    """The muster of one run.

    Args:
        config: what the run is.
        fleet: all agents that were heard of; kept up to date by others.
        quarantine: who is in it; likewise.
    """

    def __init__(self, config: RunConfig, fleet: Fleet, quarantine: Quarantine) -> None:
        self._config = config
        self._fleet = fleet
        self._quarantine = quarantine

    def available(self, attempt: int) -> frozenset[str]:
        """The agents that could take part in this attempt at the round at hand.

        Those in quarantine cannot; but where an earlier attempt came to nothing, and too few others are there, they can: a
        quarantine must not end a run.
        """
        there = self._there()
        free = there.difference(self._quarantine.held)
        needed = max(self._config.round.minimum, self._config.round.quorum)
        return there if attempt > 1 and len(free) < needed else free

    def misfits(self, attempt: int) -> str:
        """Who is here and cannot take part: without it, a wait for agents that are there has no reason."""
        kept_out = self._there() - self.available(attempt)
        misfits = self._fleet.misfits(self._config.task)
        held = {agent_id: last for agent_id, last in sorted(self._quarantine.held.items()) if agent_id in kept_out}
        misfits |= {agent_id: f"is quarantined until round {last} is over" for agent_id, last in held.items()}
        said = [f"; {agent_id} {misfit}" for agent_id, misfit in list(misfits.items())[:_NUM_NAMED]]
        more = len(misfits) - len(said)
        return "".join(said) + (f"; and {more} more" if more else "")

    def _there(self) -> frozenset[str]:
        available = self._fleet.available(self._config.task, self._config.labels)
        return available.intersection(self._config.round.visit_order or available)
