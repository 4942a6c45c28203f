"""The evaluator: has a process of its own make the first model and evaluate each version on the task's test data.

So torch never lives in the process that talks to the agents, and a task that crashes, hangs or fills the memory costs one
evaluation, not the run.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec

from coordinator import evaluator_messages as msg
from coordinator import run_events as ev
from midge.tasks.process import Child

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(msg.Reply).decode


class EvaluatorSpoke(msgspec.Struct, frozen=True):
    """Put into the driver's queue: a reply, or with `reply` None the end of the process and its reason."""

    generation: int
    reply: msg.Reply | None
    reason: str = ""


class Made(msgspec.Struct, frozen=True):
    """The model of round 0 is stored under this digest."""

    digest: str


class Evaluator:
    """The evaluator. One request is under way at a time; others wait.

    Args:
        task: reference of the task.
        models_dir: where the models lie.
        put: takes `EvaluatorSpoke` into the driver's queue; called from another thread.
        num_threads: of the process.
        deadline_s: the longest evaluation.
        data_dir: where the test data lie; empty for the task's own place.
        download: whether the task may fetch them.
        base_digest: of the model to begin from; empty: the task's own.
    """

    def __init__(
        self,
        task: str,
        models_dir: Path,
        put: Callable[[EvaluatorSpoke], None],
        *,
        num_threads: int = 1,
        deadline_s: float = 600.0,
        data_dir: str = "",
        download: bool = False,
        base_digest: str = "",
    ) -> None:
        self._base_digest = base_digest
        self._setup = msg.SetUp(task=task, models_dir=str(models_dir), data_dir=data_dir, download=download)
        self._put = put
        self._num_threads = num_threads
        self._deadline_s = deadline_s
        self._child: Child | None = None
        self._generation = 0
        self._request = 0
        self._waiting: deque[tuple[ev.EvaluateModel | ev.PrepareModel, msg.Evaluate | msg.MakeModel]] = deque()
        self._running: ev.EvaluateModel | ev.PrepareModel | None = None
        self._began_at = 0.0
        self._ends_at = math.inf
        self.last_duration_s = 0.0
        """How long the last request took that was answered, without its wait for others."""

    def ask(self, command: ev.EvaluateModel | ev.PrepareModel, now: float) -> None:
        """Do this; what came of it is returned by `handle` or `tick`."""
        self._request += 1
        request: msg.Evaluate | msg.MakeModel
        if isinstance(command, ev.PrepareModel):
            request = msg.MakeModel(request=self._request, seed=command.seed, base_digest=self._base_digest)
        else:
            request = msg.Evaluate(request=self._request, digest=command.digest)
        self._waiting.append((command, request))
        self._next(now)

    def handle(self, event: EvaluatorSpoke, now: float) -> ev.Event | Made | None:
        """What came of the request under way; None where the event is of a process that was ended.

        Raises:
            OSError: the first model was made, and could not be stored.
        """
        if event.generation != self._generation:
            return None
        if event.reply is None:
            self._child = None  # also where it was idle: the next request needs another
        if self._running is None:
            return None
        command, self._running = self._running, None
        self.last_duration_s = now - self._began_at
        self._ends_at = math.inf
        if isinstance(event.reply, msg.Failed) and event.reply.errno:
            raise OSError(event.reply.errno, os.strerror(event.reply.errno))
        result = _result(command, event)
        self._next(now)
        return result

    def reset(self) -> None:
        """Forget all requests, and end the process: an answer to one of them must not be taken for another's."""
        self.stop()
        self._generation += 1
        self._waiting.clear()
        self._running = None

    def deadline(self) -> float:
        """When `tick` has something to do."""
        return self._ends_at

    def tick(self, now: float) -> ev.Event | None:
        """Give up an evaluation that takes too long."""
        if now < self._ends_at or self._running is None:
            return None
        command, self._running = self._running, None
        self.stop()
        reason = f"not done after {self._deadline_s:g} s (evaluation_deadline_s)"
        result = _result(command, EvaluatorSpoke(self._generation, None, reason))
        self._next(now)
        return result if not isinstance(result, Made) else None

    def stop(self) -> None:
        """End the process."""
        self._ends_at = math.inf
        if self._child is not None:
            self._generation += 1
            self._child.stop()
            self._child = None

    def _next(self, now: float) -> None:
        if self._running is not None or not self._waiting:
            return
        self._running, request = self._waiting.popleft()
        self._began_at = now
        self._ends_at = now + self._deadline_s
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
                "coordinator.evaluation_worker",
                [],
                lambda reply: self._put(EvaluatorSpoke(generation, _decode(reply))),
                lambda reason: self._put(EvaluatorSpoke(generation, None, reason)),
                {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
            )
        except OSError as error:  # the request fails, as if the process had died at once
            self._put(EvaluatorSpoke(generation, None, f"the process cannot be started: {error}"))
            return
        self._child.send(_encode(self._setup))


def _result(command: ev.EvaluateModel | ev.PrepareModel, event: EvaluatorSpoke) -> ev.Event | Made:
    reply = event.reply
    if isinstance(command, ev.PrepareModel):
        if isinstance(reply, msg.Made):
            return Made(reply.digest)
        reason = reply.reason if isinstance(reply, msg.Failed) else event.reason
        return ev.PreparationFailed(f"the task could not make its model: {reason}")
    if isinstance(reply, msg.Evaluated):
        return ev.ModelEvaluated(command.round_num, reply.score)
    reason = reply.reason if isinstance(reply, msg.Failed) else event.reason
    return ev.ModelEvaluated(command.round_num, None, reason or "no answer")
