"""What an operator may ask of a running coordinator, and the token without which nobody may.

The token is made anew at each start. It lies in the state directory's `service.json`, which its owner alone can read, so
whoever can use it could stop the process as well. It is never logged, and no answer holds it.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable
from concurrent.futures import Future
from typing import Literal

import msgspec

from coordinator import run_events as ev
from coordinator.round import Round, RoundState
from coordinator.run import Run, RunState

_OPEN = (RoundState.SELECTING, RoundState.COLLECTING)


class Closed(msgspec.Struct, frozen=True, kw_only=True):
    """What came of closing a round.

    Attributes:
        outcome: "closed": its updates are being averaged; "abandoned": they were too few, and the attempt is given up;
            "nothing": no round was open; "failed": the disk failed as it was to be saved, so it may yet turn out to be open.
        round_num: that was closed, or 0.
        num_updates: that count; of an abandoned attempt, too, and they will count in the next one.
        text: all of it, for a person.
    """

    outcome: Literal["closed", "abandoned", "nothing", "failed"]
    round_num: int = 0
    num_updates: int = 0
    text: str


class Asked:
    """Put into the coordinator's queue by an operator's wish: to stop, or to close the round.

    Args:
        event: what is wished.
        answer: resolved at the end of the turn in which the wish was carried out, once all of it is on disk, or cannot be put
            there.
    """

    def __init__(self, event: ev.StopAsked | ev.CloseAsked, answer: Future[Closed] | None = None) -> None:
        self.event = event
        self.answer = answer


class Control:
    """The operator's side: any thread may ask.

    Args:
        put: takes `Asked` into the coordinator's queue.
    """

    def __init__(self, put: Callable[[Asked], None]) -> None:
        self.token = secrets.token_urlsafe(32)
        self._put = put

    def allows(self, authorization: str) -> bool:
        """Whether an `Authorization` header carries the token."""
        scheme, _, given = authorization.partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.token.encode())

    def close_round(self) -> Future[Closed]:
        """Close the current round with what has come."""
        answer: Future[Closed] = Future()
        self._put(Asked(ev.CloseAsked(), answer))
        return answer


class Closing:
    """Tells what a `CloseAsked` did, from the run before and after it.

    Args:
        run: before the event; None where there is none.
        why_none: why there is no run at the moment.
    """

    def __init__(self, run: Run | None, why_none: str = "there is no run") -> None:
        self._run = run
        self._why_none = why_none
        self._machine: Round | None = None
        if run is not None and run.attempt is not None and run.attempt.round.state in _OPEN:
            self._machine = run.attempt.round

    def result(self) -> Closed:
        """After the event."""
        run, machine = self._run, self._machine
        if run is None:
            return Closed(outcome="nothing", text=f"nothing to close: {self._why_none}")
        if machine is None or machine.state in _OPEN:
            return Closed(outcome="nothing", text=f"nothing to close: {run.status()}")
        num_updates = len(machine.reported)
        counted = f"{num_updates} update{'' if num_updates == 1 else 's'}"
        if machine.state is RoundState.ABANDONED:
            then = f"; the run failed: {run.reason}" if run.state is RunState.FAILED else f"; {run.status()}"
            text = f"abandoned attempt {machine.attempt} at round {machine.round_num}: {machine.reason}{then}"
            return Closed(outcome="abandoned", round_num=machine.round_num, num_updates=num_updates, text=text)
        text = f"closed round {machine.round_num} with {counted}"
        return Closed(outcome="closed", round_num=machine.round_num, num_updates=num_updates, text=text)


def unsaved(closed: Closed, reason: str) -> Closed:
    """What came of closing a round where the disk failed before that was known to be stored."""
    if closed.outcome == "nothing":
        return closed
    text = f"not known to be {closed.outcome}: the disk failed as that was to be saved ({reason})"
    text += "; look, and close it again, later"
    return Closed(outcome="failed", round_num=closed.round_num, num_updates=closed.num_updates, text=text)
