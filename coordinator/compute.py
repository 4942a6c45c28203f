"""Computations off the loop: aggregation in a thread, models and evaluation in a process. Results come back as events."""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Callable

import msgspec

from coordinator import run_events as ev
from coordinator.aggregate import AggregationError, CountedUpdate, aggregate
from coordinator.disk import survivable
from coordinator.evaluator import Evaluator, EvaluatorSpoke, Made
from coordinator.models import ModelError, ModelStore
from coordinator.spool import Spool
from coordinator.strategies import Strategy
from coordinator.waits import WaitReason
from midge.log import log_event
from midge.wire.frames import Framing, content_tag

_log = logging.getLogger("coordinator")
_STOP_S = 3.0
"""What is under way when all is to end has so long. An aggregation lets go at the next block."""
_SHOWN = 5
"""Agents that a line of the log names."""


class Computed(msgspec.Struct, frozen=True):
    """Put into the driver's queue: what an aggregation came to, an error where the disk failed. `Compute.take` unpacks it."""

    event: ev.UpdatesAggregated | ev.AggregationBroke | OSError
    generation: int = 0


class Compute:
    """Does what the run asks for.

    Args:
        run_id: of the run.
        task: reference of the task.
        spool: where updates are.
        models: where models are.
        strategy: of the run.
        put: takes `Computed` and `EvaluatorSpoke` into the driver's queue; called from other threads.
        num_threads: that aggregate.
        max_step_ratio: see `coordinator.aggregate.aggregate`.
        aggregation_deadline_s: the longest aggregation.
        evaluation_deadline_s: the longest evaluation.
        data_dir: where the data lie that are evaluated on; empty for the task's own place.
        download: whether the task may fetch them.
        base_digest: of the model that the run begins from; empty: the task's own.
    """

    def __init__(
        self,
        run_id: str,
        task: str,
        spool: Spool,
        models: ModelStore,
        strategy: Strategy,
        put: Callable[[Computed | EvaluatorSpoke], None],
        *,
        num_threads: int = 1,
        max_step_ratio: float = 0.0,
        aggregation_deadline_s: float = math.inf,
        evaluation_deadline_s: float = 600.0,
        data_dir: str = "",
        download: bool = False,
        base_digest: str = "",
    ) -> None:
        self.framing: Framing | None = None
        self._run_id = run_id
        self._spool = spool
        self._models = models
        self._strategy = strategy
        self._put = put
        self._num_threads = num_threads
        self._max_step_ratio = max_step_ratio
        self._deadline_s = aggregation_deadline_s
        self._aggregate_by = math.inf
        self._generation = 0
        self._line = _Line()
        self._evaluator = Evaluator(
            task,
            models.path,
            put,
            deadline_s=evaluation_deadline_s,
            data_dir=data_dir,
            download=download,
            base_digest=base_digest,
        )

    def ask(self, command: ev.PrepareModel | ev.EvaluateModel | ev.AggregateUpdates, now: float) -> None:
        """Begin; an event follows, in any case."""
        if isinstance(command, ev.AggregateUpdates):
            generation = self._generation
            self._aggregate_by = now + self._deadline_s
            self._line.add(lambda: self._aggregate(command, generation))
        else:
            self._evaluator.ask(command, now)

    def take(self, computed: Computed) -> ev.Event | None:
        """What came of an aggregation; None where it was asked for before `reset`.

        Raises:
            OSError: the disk failed: nothing is wrong with the updates.
        """
        if computed.generation != self._generation:
            return None
        self._aggregate_by = math.inf
        if isinstance(computed.event, OSError):
            raise computed.event
        return computed.event

    def reset(self) -> None:
        """Forget all that was asked for: whoever asked is gone."""
        self._generation += 1
        self._aggregate_by = math.inf
        self._evaluator.reset()

    def handle(self, event: EvaluatorSpoke, now: float) -> ev.Event | Made | None:
        """What came of an evaluation or of the first model."""
        return self._evaluator.handle(event, now)

    @property
    def last_evaluation_s(self) -> float:
        """How long the last evaluation took."""
        return self._evaluator.last_duration_s

    def deadline(self) -> float:
        """When `tick` has something to do."""
        return min(self._evaluator.deadline(), self._aggregate_by)

    def ends_by(self, reason: WaitReason) -> float:
        """When what is waited for is given up; infinity where it is none of what is done here."""
        if reason == "aggregation":
            return self._aggregate_by
        return self._evaluator.deadline() if reason in ("evaluation", "model") else math.inf

    def tick(self, now: float) -> ev.Event | None:
        """Give up what takes too long."""
        if now < self._aggregate_by:
            return self._evaluator.tick(now)
        self._generation += 1
        self._aggregate_by = math.inf
        return ev.AggregationBroke(f"averaging was not done after {self._deadline_s:g} s (aggregation_deadline_s)")

    def later(self, work: Callable[[], None]) -> None:
        """Do this between aggregations: what takes time and nobody waits for."""
        self._line.add(lambda: _logging_errors(work))

    def stop(self, timeout_s: float = _STOP_S) -> None:
        """End it all: an aggregation gives up at its next block, what was to be done later is done now, for so long."""
        self._generation += 1
        self._evaluator.stop()
        if not self._line.stop(timeout_s):
            log_event(_log, logging.WARNING, "a computation did not end in time", run=self._run_id, after_s=timeout_s)

    def _aggregate(self, command: ev.AggregateUpdates, generation: int) -> None:
        if generation == self._generation:
            self._put(Computed(self._try_aggregate(command, generation), generation))

    def _try_aggregate(
        self, command: ev.AggregateUpdates, generation: int
    ) -> ev.UpdatesAggregated | ev.AggregationBroke | OSError:
        try:
            assert self.framing is not None
            counted = [
                CountedUpdate(u.agent_id, content_tag(u.update_digest), u.num_examples, u.counters)
                for u in command.updates
            ]
            spool = self._spool.round(self._run_id, command.round_num)
            with self._models.open(command.base_digest) as base:
                made = aggregate(
                    base,
                    spool,
                    counted,
                    self._strategy,
                    self.framing,
                    self._models,
                    self._num_threads,
                    round_num=command.round_num,
                    server_state=command.server_state,
                    max_step_ratio=self._max_step_ratio,
                    is_wanted=lambda: generation == self._generation,
                )
        except (AggregationError, ModelError) as error:
            return ev.AggregationBroke(str(error))
        except OSError as error:
            return error if survivable(error) else ev.AggregationBroke(f"the disk failed: {error}")
        except Exception as error:  # noqa: BLE001  a strategy may raise anything; the round is abandoned, the run decides
            return ev.AggregationBroke(f"{type(error).__name__}: {error}")
        if made.held_back:
            shown = ", ".join(made.held_back[:_SHOWN]) + (", ..." if len(made.held_back) > _SHOWN else "")
            log_event(
                _log,
                logging.INFO,
                "updates held back",
                run=self._run_id,
                round=command.round_num,
                num_updates=len(made.held_back),
                strategy=self._strategy.name,
                agents=shown,
            )
        return ev.UpdatesAggregated(made.digest, made.delta_norm, made.server_state)


class _Line:
    """Does one thing after the other, on a thread that does not keep the process from ending."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="aggregate", daemon=True)
        self._thread.start()

    def add(self, work: Callable[[], None]) -> None:
        """Do this next; it must not raise."""
        self._work.put(work)

    def stop(self, timeout_s: float) -> bool:
        """Do what was asked for before; whether that was done in time. What is not begun by then is not begun."""
        self._work.put(None)
        self._thread.join(timeout_s)
        self._is_over = True
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (work := self._work.get()) is not None and not self._is_over:
            work()


def _logging_errors(work: Callable[[], None]) -> None:
    try:
        work()
    except Exception as error:  # noqa: BLE001  nobody waits for it
        log_event(_log, logging.WARNING, "house-keeping failed", error=error)
