"""What experiment trackers (TensorBoard, MLflow) are told of a run: which values, under which names, at which step.

    central/loss, central/accuracy, ...      of a version, on the coordinator's test data      step: the version
    federated/loss, federated/accuracy, ...  of a version, over all agents' own data           step: the version
    agent/<id>/loss, agent/<id>/accuracy     of a version, on one agent's own data             step: the version
    agent/<id>/training_loss, agent/<id>/update_norm, agent/<id>/training_s                    step: the round
    round/duration_s, round/updates, round/examples, round/delta_norm, round/attempts          step: the round

A tracker may be slow, far away or broken, and nothing may wait for it: values go into a bounded queue, which a thread of its
own empties. What does not fit is dropped; what fails is said once. A step that a name has already is never written again: so a
run that goes on after a restart continues its curves, and what the earlier process could no longer write is added.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from coordinator import run_events as ev
from coordinator.store import Store
from midge.log import log_event
from midge.wire.messages import Evaluation

_log = logging.getLogger("coordinator")
_MAX_WAITING = 10_000
"""Steps that wait at most."""
_MAX_NAMES = 2_000
"""Names of values at most: an agent's task may make up others each round."""
_UPDATE_ROUNDS = 100
"""Rounds whose updates are told again after a restart, where they are missing."""
_STOP_S = 10.0
_UNFIT = re.compile(r"[^A-Za-z0-9_\-. /]")

Values = Mapping[str, float]


class TrackerError(Exception):
    """A tracker cannot be used as it is set; the message says why and what to do."""


class Tracker(Protocol):
    """Where values go. All methods are called from one thread, and may raise anything."""

    name: str

    def open(self, run_id: str, task: str, definition: Mapping[str, object]) -> Mapping[str, int]:
        """Begin a run, or go on with it; the last step that it has of each name."""

    def log(self, step: int, values: Values) -> None:
        """Write values."""

    def close(self, state: str) -> None:
        """The run is over, or this process is: `state` is the run's."""


def version_values(save: ev.SaveVersion) -> tuple[int, Values]:
    """What a committed version tells; nothing for the initial one."""
    if save.round_num == 0:
        return 0, {}
    return save.round_num, {
        "round/duration_s": save.duration_s,
        "round/updates": float(save.num_updates),
        "round/examples": float(save.num_examples),
        "round/delta_norm": save.delta_norm,
        "round/attempts": float(save.attempts),
    }


def score_values(source: str, score: Evaluation) -> Values:
    """What an evaluation tells."""
    return {f"{source}/{_UNFIT.sub('_', name)}": value for name, value in {"loss": score.loss, **score.metrics}.items()}


def update_values(round_num: int, update: ev.AcceptedUpdate) -> list[tuple[int, Values]]:
    """What an agent's update tells: of the version that it was trained from, and of its training."""
    stem = f"agent/{update.agent_id}"
    trained = {f"{stem}/update_norm": update.norm, f"{stem}/training_s": update.training_s}
    if "loss" in update.metrics:
        trained[f"{stem}/training_loss"] = update.metrics["loss"]
    told: list[tuple[int, Values]] = [(round_num, trained)]
    if update.evaluation is not None:
        scores = {"loss": update.evaluation.loss, **update.evaluation.metrics}
        told.append(
            (round_num - 1, {f"{stem}/{name}": scores[name] for name in ("loss", "accuracy") if name in scores})
        )
    return told


def history(store: Store, run_id: str, max_agents: int) -> list[tuple[int, Values]]:
    """All that the database knows of a run, in order."""
    told: list[tuple[int, Values]] = []
    versions = store.versions(run_id)
    agents: dict[str, None] = {}
    for version in versions:
        number = version["round_num"]
        fields = ("num_updates", "num_examples", "delta_norm", "duration_s", "attempts")
        saved = ev.SaveVersion(number, version["digest"], version["parent"], **{key: version[key] for key in fields})
        told.append(version_values(saved))
        told += [(number, score_values(key, version[key])) for key in ("central", "federated") if version[key]]
        if number > len(versions) - _UPDATE_ROUNDS:
            for update in store.updates(run_id, number):
                if update.agent_id in agents or len(agents) < max_agents:
                    agents[update.agent_id] = None
                    told += update_values(number, update)
    return told


class Teller:
    """Tells one tracker, from a thread of its own. No method waits but `stop`, and that for a bounded time.

    Args:
        tracker: where values go.
        run_id: the run.
        task: what it learns.
        definition: what defines it.
        known: of a run that goes on, what happened before.
    """

    def __init__(
        self,
        tracker: Tracker,
        run_id: str,
        task: str,
        definition: Mapping[str, object],
        known: Iterable[tuple[int, Values]] = (),
    ) -> None:
        self._tracker = tracker
        self._run = (run_id, task, definition)
        self._last: dict[str, int] = {}
        self._waiting: deque[tuple[int, Values]] = deque()
        self._known = list(known)
        self._num_dropped = 0
        self._has_failed = False
        self._state = ""
        self._is_ending = False
        self._ready = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=f"tell {tracker.name}", daemon=True)
        self._thread.start()

    def tell(self, step: int, values: Values) -> None:
        """Write values, later."""
        with self._ready:
            if len(self._waiting) >= _MAX_WAITING:
                self._num_dropped += 1
                if self._num_dropped == 1:
                    self._warn(f"it is so slow that {_MAX_WAITING} steps wait: what comes now is dropped")
                return
            self._waiting.append((step, values))
            self._ready.notify()

    def end(self, state: str) -> None:
        """The run is over: write what waits, and tell how it ended."""
        with self._ready:
            if not self._is_ending:
                self._state, self._is_ending = state, True
            self._ready.notify()

    def stop(self, state: str, timeout_s: float = _STOP_S) -> None:
        """This process is over: what is not written in time is not written by it."""
        self.end(state)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._warn(f"{len(self._waiting)} steps were not written after {timeout_s:g} s")

    def _work(self) -> None:
        is_open = self._try(self._open)
        while self._take_one() and is_open:
            pass
        if is_open:
            self._try(lambda: self._tracker.close(self._state))

    def _open(self) -> None:
        self._last = dict(self._tracker.open(*self._run))
        for step, values in self._known:
            self._log(step, values)
        self._known = []

    def _take_one(self) -> bool:
        """Write the next step; false once there is no more to come."""
        with self._ready:
            while not self._waiting and not self._is_ending:
                self._ready.wait()
            if not self._waiting:
                return False
            step, values = self._waiting.popleft()
        self._try(lambda: self._log(step, values))
        return True

    def _log(self, step: int, values: Values) -> None:
        new = {
            name: value
            for name, value in values.items()
            if step > self._last.get(name, -1) and (name in self._last or len(self._last) < _MAX_NAMES)
        }
        if new:
            self._tracker.log(step, new)
            self._last.update(dict.fromkeys(new, step))

    def _try(self, work: Callable[[], None]) -> bool:
        """Do it; what goes wrong is said once, as the next steps will most likely go wrong too."""
        try:
            work()
        except Exception as error:  # noqa: BLE001  a tracker is somebody else's code, and may raise anything
            if not self._has_failed:
                self._warn(f"{type(error).__name__}: {error}"[:500])
            self._has_failed = True
            return False
        return True

    def _warn(self, reason: str) -> None:
        log_event(_log, logging.WARNING, "tracker failed", tracker=self._tracker.name, reason=reason)


class Tracking:
    """Tells all trackers of a run what is persisted.

    Args:
        tellers: one for each tracker.
        max_agents: agents that are told of each by itself: the first that report.
        known: what is told of a run that goes on; its agents keep their places.
    """

    def __init__(self, tellers: Sequence[Teller], max_agents: int, known: Iterable[tuple[int, Values]] = ()) -> None:
        self._tellers = tellers
        self._max_agents = max_agents
        self._agents = {name.split("/")[1] for _, values in known for name in values if name.startswith("agent/")}

    def saved(self, save: ev.Save) -> None:
        """This was persisted."""
        match save:
            case ev.SaveVersion():
                self._tell(*version_values(save))
            case ev.SaveEvaluation(round_num, source, score):
                self._tell(round_num, score_values(source, score))
            case ev.SaveUpdate(round_num, update):
                if update.agent_id in self._agents or len(self._agents) < self._max_agents:
                    self._agents.add(update.agent_id)
                    for step, values in update_values(round_num, update):
                        self._tell(step, values)
            case _:
                pass

    def end(self, state: str) -> None:
        """The run is over. Waits for nothing."""
        for teller in self._tellers:
            teller.end(state)

    def stop(self, state: str, timeout_s: float = _STOP_S) -> None:
        """This process is over: all trackers together have so long."""
        for teller in self._tellers:
            teller.end(state)
        deadline = time.monotonic() + timeout_s
        for teller in self._tellers:
            teller.stop(state, max(0.0, deadline - time.monotonic()))

    def _tell(self, step: int, values: Values) -> None:
        for teller in self._tellers if values else ():
            teller.tell(step, values)
