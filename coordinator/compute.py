"""Computations off the loop: aggregation in a thread, models and evaluation in a process. Results come back as events."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from coordinator import run_events as ev
from coordinator.aggregate import AggregationError, CountedUpdate, aggregate
from coordinator.disk import survivable
from coordinator.evaluator import Evaluator, EvaluatorSpoke, Made
from coordinator.models import ModelError, ModelStore
from coordinator.spool import Spool
from coordinator.strategies import Strategy
from midge.log import log_event
from midge.wire.frames import Framing, content_tag

_log = logging.getLogger("coordinator")


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
        self._generation = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="aggregate")
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
            self._pool.submit(self._aggregate, command, self._generation)
        else:
            self._evaluator.ask(command, now)

    def take(self, computed: Computed) -> ev.Event | None:
        """What came of an aggregation; None where it was asked for before `reset`.

        Raises:
            OSError: the disk failed: nothing is wrong with the updates.
        """
        if computed.generation != self._generation:
            return None
        if isinstance(computed.event, OSError):
            raise computed.event
        return computed.event

    def reset(self) -> None:
        """Forget all that was asked for: whoever asked is gone."""
        self._generation += 1
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
        return self._evaluator.deadline()

    def tick(self, now: float) -> ev.Event | None:
        """Give up what takes too long."""
        return self._evaluator.tick(now)

    def later(self, work: Callable[[], None]) -> None:
        """Do this between aggregations: what takes time and nobody waits for."""
        self._pool.submit(_logging_errors, work)

    def stop(self) -> None:
        """End it all."""
        self._evaluator.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _aggregate(self, command: ev.AggregateUpdates, generation: int) -> None:
        if generation == self._generation:
            self._put(Computed(self._try_aggregate(command), generation))

    def _try_aggregate(self, command: ev.AggregateUpdates) -> ev.UpdatesAggregated | ev.AggregationBroke | OSError:
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
                )
        except (AggregationError, ModelError) as error:
            return ev.AggregationBroke(str(error))
        except OSError as error:
            return error if survivable(error) else ev.AggregationBroke(f"the disk failed: {error}")
        except Exception as error:  # noqa: BLE001  a strategy may raise anything; the round is abandoned, the run decides
            return ev.AggregationBroke(f"{type(error).__name__}: {error}")
        return ev.UpdatesAggregated(made.digest, made.delta_norm, made.server_state)


def _logging_errors(work: Callable[[], None]) -> None:
    try:
        work()
    except Exception as error:  # noqa: BLE001  nobody waits for it
        log_event(_log, logging.WARNING, "house-keeping failed", error=error)
