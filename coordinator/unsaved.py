"""What of a run has changed since it was last saved. Pure."""

from __future__ import annotations

from coordinator import run_events as ev
from coordinator.round import MemberState, Round, RoundState

_SeenAttempt = tuple[int, int, RoundState, dict[str, MemberState]]
_SeenRun = tuple[str, str, int, tuple[int, float] | None]


class Unsaved:
    """Remembers what was saved last, and saves what differs."""

    def __init__(self) -> None:
        self._attempt: _SeenAttempt | None = None
        self._essence: tuple[object, ...] | None = None
        self._run: _SeenRun | None = None

    def attempt(self, machine: Round) -> list[ev.Command]:
        """Where an attempt stands, if that has changed."""
        seen = (machine.round_num, machine.attempt, machine.state, machine.members)
        if seen == self._attempt:
            return []
        essence = _essence(seen)
        can_wait = essence == self._essence
        self._attempt, self._essence = seen, essence
        return [ev.SaveAttempt(*seen[:3], machine.reason, seen[3], can_wait)]

    def run(self, state: str, reason: str, round_num: int, best: tuple[int, float] | None) -> list[ev.Command]:
        """Where the run stands, if that has changed."""
        seen = (state, reason, round_num, best)
        if seen == self._run:
            return []
        self._run = seen
        return [ev.SaveRun(state, reason, round_num, *(best or (None, None)))]


def _essence(seen: _SeenAttempt) -> tuple[object, ...]:
    """What a restart needs of an attempt: who took the invitation already does not matter, all of them get it again."""
    *head, members = seen
    taken = MemberState.INVITED
    return (*head, {agent: taken if state is MemberState.ACCEPTED else state for agent, state in members.items()})
