"""Fail points: named places at which a test has the process killed, frozen or held up, to see that it comes back.

    MIDGE_FAIL_POINT=coordinator.saved.version:2        killed the second time that a version has been saved
    MIDGE_FAIL_POINT=agent.frame.sent:3:stop            frozen (SIGSTOP) once the third frame was sent
    MIDGE_FAIL_POINT=coordinator.aggregation.block:1:hang   the thread that gets there stays there

The environment alone sets one, as the process starts: nothing that comes over a network, and no file, can. Where none is set,
passing a point costs a call and a look at a variable. `POINTS` has them all, with what is so when each is passed.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping

from midge.log import log_event

_log = logging.getLogger("midge.failpoints")
VARIABLE = "MIDGE_FAIL_POINT"

_TRANSITIONS = {
    "run": "where the run stands",
    "version": "a version, so the commit of a round",
    "attempt-selecting": "an attempt that waits for agents",
    "attempt-collecting": "an attempt that has invited them",
    "attempt-aggregating": "an attempt that has enough updates",
    "attempt-committed": "an attempt that made a version",
    "attempt-abandoned": "an attempt that failed",
    "update": "an accepted update",
    "evaluation": "a score",
    "tallies": "counts of updates",
}

POINTS: Mapping[str, str] = {
    "coordinator.epoch.raised": "the epoch is raised, and nobody knows",
    "coordinator.run.created": "a new run is in the database, and nothing else of it",
    "coordinator.model.prepared": "the initial model is stored, and no version says so",
    **{f"coordinator.saving.{name}": f"about to store {what}" for name, what in _TRANSITIONS.items()},
    **{f"coordinator.saved.{name}": f"stored, and not acted on: {what}" for name, what in _TRANSITIONS.items()},
    "coordinator.transaction.written": "all of a transaction is written, and not committed",
    "coordinator.frame.published": "one frame of a model is published",
    "coordinator.head.published": "the head of a model is published",
    "coordinator.frame.stored": "one frame of an update is in the spool",
    "coordinator.spool.synced": "the frames of an accepted update are durable, and the update is not recorded",
    "coordinator.sent.invitation": "an invitation is sent",
    "coordinator.sent.credit": "an acknowledgement is sent",
    "coordinator.sent.receipt": "a receipt is sent",
    "coordinator.sent.cancel": "a cancellation is sent",
    "coordinator.aggregation.block": "one block of the next model is averaged",
    "coordinator.model.written": "the next model is in its temporary file, not synced",
    "coordinator.model.synced": "it is synced, not renamed",
    "coordinator.model.renamed": "it has its name, and no version says so",
    "agent.invitation.written": "the invitation is in the journal, and not yet accepted",
    "agent.frame.fetched": "one frame of the model is on disk",
    "agent.training.begins": "the model is whole; the worker is not yet asked",
    "agent.training.progressed": "the worker is at it",
    "agent.training.ended": "the update is in the journal, and none of it sent",
    "agent.header.sent": "the update's header is sent",
    "agent.frame.sent": "one frame of the update is sent",
    "agent.frames.sent": "its last frame is sent; the receipt is awaited",
    "agent.receipt.heard": "the receipt is here, and the update still in the journal",
    "agent.work.erased": "the update is erased",
    "worker.update.written": "the worker has written the update, and not said so",
}
"""Every point, by its process (the first word), and what is so when it is passed."""


class FailPointError(Exception):
    """`MIDGE_FAIL_POINT` is not understood; the message says what is."""


class _Armed:
    """The point that is set in this process."""

    def __init__(self, name: str, nth: int, action: Callable[[], None]) -> None:
        self._name = name
        self._nth = nth
        self._action = action
        self._count = itertools.count(1)

    def passed(self, name: str) -> None:
        if name == self._name and next(self._count) == self._nth:
            self._action()


_armed: _Armed | None = None


def arm(process: str) -> None:
    """Set the point that the environment names, if it is one of this process, and say so in the log.

    Args:
        process: the first word of its points.

    Raises:
        FailPointError: there is no such point, or it is not said as it must be.
    """
    global _armed  # noqa: PLW0603  one process has one
    text = os.environ.get(VARIABLE, "")
    name, _, rest = text.partition(":")
    nth, _, action = rest.partition(":")
    _armed = None
    if not text:
        return
    if name not in POINTS:
        raise FailPointError(f"{VARIABLE}={text}: there is no point {name}; docs/faults.md lists those there are")
    if not (nth or "1").isdecimal() or int(nth or 1) < 1 or (action or "kill") not in _ACTIONS:
        raise FailPointError(f"{VARIABLE}={text}: expected NAME[:NTH[:{'|'.join(_ACTIONS)}]], NTH from 1")
    if name.partition(".")[0] == process:
        _armed = _Armed(name, int(nth or 1), _ACTIONS[action or "kill"])
        log_event(_log, logging.WARNING, "fail point set", point=text)


def is_armed() -> bool:
    """Whether a point is set: to be asked where it takes time to say which point one is at."""
    return _armed is not None


def fail_point(name: str) -> None:
    """Pass a point."""
    if _armed is not None:
        _armed.passed(name)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _hang() -> None:
    while True:
        time.sleep(3600.0)


_ACTIONS: Mapping[str, Callable[[], None]] = {"kill": _kill, "stop": _stop, "hang": _hang}
