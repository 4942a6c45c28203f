"""The trainer: starts the worker for the first training, feeds it, ends it after a quiet time, and survives its death.

Whatever happens to the worker, an exception, a kill, a lack of memory, becomes one failed training with its reason, unless the
update was on disk by then; the next training starts a new one. At the agent's start a worker may check the data; it goes on to
train if that is wanted soon, and else is ended. Only one training runs at a time. A cancelled one may still run for a
moment, since a task lets go when it reports progress; if it has not after `_PATIENCE_S`, the worker is ended: it works for
nothing, and another may wait.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from edge_agent import agent_events as ev
from edge_agent import worker_messages as msg
from edge_agent.journal import read_update
from midge.tasks.process import Child
from midge.wire.messages import Head, Invitation

_PATIENCE_S = 10.0
_AFTER_CHECK_S = 10.0
"""A worker that has looked at the data waits so long for a training: where agents and coordinator start together, the first
invitation comes a few seconds later, and to load torch and the data again would take longer than that."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(msg.Reply).decode


class TrainerLike(Protocol):
    """What the driver needs of a trainer; tests bring their own."""

    def train(self, invitation: Invitation, head: Head, now: float) -> None:
        """Begin to train; one of the agent's training events follows."""

    def cancel(self, now: float) -> None:
        """Nothing more is wanted of the training under way."""


class WorkerReplied(msgspec.Struct, frozen=True):
    """The worker said something."""

    generation: int
    reply: msg.Reply


class WorkerExited(msgspec.Struct, frozen=True):
    """The worker is gone, unasked."""

    generation: int
    reason: str


class Trainer:
    """The trainer.

    Args:
        setup: what each worker is told first.
        directory: the journal's, where model and update lie.
        put: takes `WorkerReplied` and `WorkerExited` into the driver's queue; called from other threads.
        num_threads: of each worker.
        idle_s: a worker with nothing to do is ended after this time.
    """

    def __init__(
        self,
        setup: msg.SetUp,
        directory: Path,
        put: Callable[[WorkerReplied | WorkerExited], None],
        *,
        num_threads: int = 1,
        idle_s: float = 120.0,
    ) -> None:
        self._setup = setup
        self._directory = directory
        self._put = put
        self._num_threads = num_threads
        self._idle_s = idle_s
        self._child: Child | None = None
        self._generation = 0
        self._request = 0
        self._running: int | None = None
        self._training: msg.TrainModel | None = None
        self._wanted: int | None = None
        self._waiting: msg.TrainModel | None = None
        self._give_up_at = math.inf
        self._idle_at = math.inf

    @property
    def pid(self) -> int | None:
        """Of the worker; None where there is none."""
        return self._child.pid if self._child is not None else None

    def check_data(self) -> None:
        """Load the data once, before any training; a `DataChecked` from the worker follows, or its exit."""
        self._start()
        if self._child is not None:
            self._child.send(_encode(msg.CheckData()))

    def train(self, invitation: Invitation, head: Head, now: float) -> None:
        """Begin to train, as soon as a cancelled training has let go."""
        self._request += 1
        self._wanted = self._request
        request = msg.TrainModel(
            request=self._request,
            run_id=invitation.run_id,
            round_num=invitation.round_num,
            training=invitation.training,
            run_seed=invitation.seed,
            head=head,
            model_path=str(self._directory / "model.bin"),
            update_path=str(self._directory / "update.bin"),
        )
        self._idle_at = math.inf
        if self._running is None:
            self._begin(request)
        else:
            self._waiting = request
            self._give_up_at = min(self._give_up_at, now + _PATIENCE_S)

    def cancel(self, now: float) -> None:
        """Nothing more is wanted of the training under way."""
        self._wanted = None
        self._waiting = None
        if self._running is not None and self._child is not None:
            self._child.send(_encode(msg.CancelTraining(request=self._running)))
            self._give_up_at = min(self._give_up_at, now + _PATIENCE_S)

    def handle(self, event: WorkerReplied | WorkerExited, now: float) -> ev.Event | None:
        """What the agent is to know of this; None where it is of no interest any more."""
        if event.generation != self._generation:
            return None
        if isinstance(event, WorkerExited):
            self._child = None
            return self._ended(
                self._left_behind() or ev.TrainingFailed(ev.Objection("worker", event.reason[:500])), now
            )
        reply = event.reply
        if isinstance(reply, msg.DataChecked):
            if self._running is None and reply.summary is None:
                self.stop()  # the next training looks at the data anew
            elif self._running is None:
                self._idle_at = now + min(self._idle_s, _AFTER_CHECK_S)
            return None
        if reply.request != self._running:
            return None
        match reply:
            case msg.Progressed(fraction=fraction):
                return ev.TrainingProgressed(fraction) if reply.request == self._wanted else None
            case msg.Finished():
                return self._ended(self._read_update(), now)
            case msg.Failed(reason=reason, detail=detail):
                return self._ended(ev.TrainingFailed(ev.Objection(reason, detail)), now)
            case msg.Cancelled():
                return self._ended(None, now)

    def deadline(self) -> float:
        """When `tick` has something to do."""
        return min(self._give_up_at if self._running is not None else math.inf, self._idle_at)

    def tick(self, now: float) -> None:
        """End a worker that has been quiet, or that does not let go of a cancelled training."""
        if now >= self._idle_at and self._running is None:
            self.stop()
        if now >= self._give_up_at and self._running is not None:
            waiting = self._waiting
            self.stop()
            if waiting is not None:
                self._begin(waiting)

    def stop(self) -> None:
        """End the worker."""
        if self._child is not None:
            self._generation += 1
            self._child.stop()
            self._child = None
        self._running = self._waiting = None
        self._idle_at = self._give_up_at = math.inf

    def _begin(self, request: msg.TrainModel) -> None:
        self._waiting = None
        self._give_up_at = math.inf
        self._running = request.request
        self._training = request
        with contextlib.suppress(
            OSError
        ):  # what lies there is of another training, or damaged: it must not pass for this one's
            os.truncate(request.update_path, 0)
        if self._child is None:
            self._start()
        if self._child is not None:
            self._child.send(_encode(request))

    def _start(self) -> None:
        self._generation += 1
        generation = self._generation
        threads = str(self._num_threads)
        try:
            self._child = Child(
                "edge_agent.worker",
                [],
                lambda reply: self._put(WorkerReplied(generation, _decode(reply))),
                lambda reason: self._put(WorkerExited(generation, reason)),
                {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
            )
        except OSError as error:  # it is a training that failed, as if the worker had died at once
            self._put(WorkerExited(generation, f"the process cannot be started: {error}"))
            return
        self._child.send(_encode(self._setup))

    def _ended(self, event: ev.Event | None, now: float) -> ev.Event | None:
        """The training under way is over; begin the one that waits for it."""
        wanted = self._running is not None and self._running == self._wanted
        self._running = None
        self._give_up_at = math.inf
        if self._waiting is not None:
            self._begin(self._waiting)
        elif self._child is not None:
            self._idle_at = now + self._idle_s
        return event if wanted else None

    def _left_behind(self) -> ev.TrainingFinished | None:
        """The update of the training under way, where the worker had written it before it died: that is never done again."""
        asked = self._training
        try:
            update = read_update(self._directory / "update.bin")
        except OSError:
            return None
        if update is None or asked is None:
            return None
        is_of_it = (update.run_id, update.round_num, update.model_digest) == (
            asked.run_id,
            asked.round_num,
            asked.head.model_digest,
        )
        return ev.TrainingFinished(update) if is_of_it else None

    def _read_update(self) -> ev.Event:
        try:
            update = read_update(self._directory / "update.bin")
        except OSError as error:
            return ev.TrainingFailed(ev.Objection("disk", f"the worker's update cannot be read: {error.strerror}"))
        if update is None:
            return ev.TrainingFailed(ev.Objection("disk", "the worker's update is not whole on disk"))
        return ev.TrainingFinished(update)
