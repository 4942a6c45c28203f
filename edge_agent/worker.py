"""The worker: the only process of an agent that holds torch and the data. The supervisor starts it and feeds it.

For each round it evaluates the global model on its own data, where that is due, trains from it, and writes the update to disk.
It may be killed at any time: an update that is not whole on disk does not exist.
"""

from __future__ import annotations

import hashlib
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_agent import worker_messages as msg
from edge_agent.agent_events import FinishedUpdate
from edge_agent.journal import write_update
from midge import failpoints
from midge.failpoints import fail_point
from midge.tasks.base import DataSpec, FollowsRounds, Score, ShowsModel, Task, TaskError, Trained, TrainSpec, seed_of
from midge.tasks.flatten import difference, layout_of, state_to_vector, vector_to_state
from midge.tasks.inspection import summarize
from midge.tasks.process import serve
from midge.tasks.registry import find_task
from midge.tasks.scores import fitting, to_evaluation
from midge.wire.codecs import FLOAT32, encode_float32
from midge.wire.errors import LayoutError
from midge.wire.frames import HEADER_BYTES, Framing, content_tag, encode_frame, run_tag, update_digest
from midge.wire.layout import Layout

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(msg.Request).decode


_MAX_READ = 2000
"""A check reads examples for their labels, where nothing else tells these, of data sets up to this size."""


class _CancelledError(Exception):
    """The training is not wanted any more."""


class _DataError(Exception):
    """This device's data cannot be used; says why."""


class Worker:
    """Holds the task and its data between rounds."""

    def __init__(self) -> None:
        self._setup: msg.SetUp | None = None
        self._task: Task | None = None
        self._data: Any = None
        self._fitting_layouts: set[str] = set()
        self._cancelled = -1

    def interrupt(self, payload: bytes) -> bool:
        """Note a cancellation the moment it comes, while a training runs."""
        request = _decode(payload)
        if not isinstance(request, msg.CancelTraining):
            return False
        self._cancelled = max(self._cancelled, request.request)
        return True

    def handle(self, payload: bytes, reply: Callable[[bytes], None]) -> None:
        """Serve one request."""
        request = _decode(payload)
        if isinstance(request, msg.SetUp):
            self._setup = request
            _limit(request)
        elif isinstance(request, msg.CheckData):
            reply(_encode(self._check()))
        elif isinstance(request, msg.TrainModel):
            reply(_encode(self._answer(request, lambda report: reply(_encode(report)))))

    def _check(self) -> msg.DataChecked:
        try:
            task, data = self._load()
            return msg.DataChecked(summary=summarize(task, data, max_read=_MAX_READ))
        except MemoryError:
            return msg.DataChecked(reason="memory", detail="out of memory while loading the data")
        except TaskError as error:
            return msg.DataChecked(reason="task" if self._task is None else "data", detail=str(error)[:500])
        except _DataError as error:
            return msg.DataChecked(detail=str(error)[:500])
        except Exception as error:  # noqa: BLE001  a user's data set may raise anything while it is read
            return msg.DataChecked(detail=_described(error))

    def _answer(self, request: msg.TrainModel, report: Callable[[msg.Progressed], None]) -> msg.Reply:
        number = request.request
        try:
            self._train(request, report)
        except _CancelledError:
            return msg.Cancelled(request=number)
        except _DataError as error:
            return msg.Failed(request=number, reason="data", detail=str(error)[:500])
        except MemoryError:
            return msg.Failed(request=number, reason="memory", detail="out of memory while training")
        except LayoutError as error:
            return msg.Failed(request=number, reason="layout", detail=str(error)[:500])
        except TaskError as error:
            return msg.Failed(request=number, reason="task", detail=str(error)[:500])
        except Exception as error:  # noqa: BLE001  a user's task may raise anything; the agent lives on
            is_of_disk = isinstance(error, OSError) and error.errno is not None
            return msg.Failed(request=number, reason="disk" if is_of_disk else "worker", detail=_described(error))
        return msg.Finished(request=number)

    def _train(self, request: msg.TrainModel, report: Callable[[msg.Progressed], None]) -> None:
        task, data = self._load()
        assert self._setup is not None
        layout = Layout(request.head.layout)
        self._check_layout(task, data, layout, request)
        elements = np.memmap(request.model_path, dtype="<f4", mode="r", shape=(layout.num_elements,))
        state = vector_to_state(np.asarray(elements), request.head.counters, layout)

        def progress(fraction: float) -> None:
            if self._cancelled >= request.request:
                raise _CancelledError
            report(msg.Progressed(request=request.request, fraction=min(1.0, max(0.0, float(fraction)))))

        if request.training.proximal_mu and not getattr(task, "supports_proximal", False):
            raise TaskError(
                f"task {task.name} knows no proximal term (fedprox, mu {request.training.proximal_mu:g}): add "
                "TrainSpec.proximal_mu to its loss and set supports_proximal = True on it, or choose another strategy"
            )
        progress(0.0)
        began = time.monotonic()
        spec = TrainSpec(
            local_epochs=request.training.local_epochs,
            batch_size=request.training.batch_size,
            learning_rate=request.training.learning_rate,
            momentum=request.training.momentum,
            proximal_mu=request.training.proximal_mu,
            seed=seed_of(request.run_seed, request.round_num, self._setup.agent_id),
            round_num=request.round_num,
            extra=request.training.extra,
        )
        if isinstance(task, FollowsRounds):
            task.begin_round(spec)
        is_due = request.head.round_num % request.training.evaluate_every == 0
        score = task.evaluate(state, data) if is_due else None
        trained = task.train(state, data, spec, progress)
        _write_update(request, layout, trained, score, time.monotonic() - began)
        fail_point("worker.update.written")

    def _check_layout(self, task: Task, data: Any, layout: Layout, request: msg.TrainModel) -> None:
        """Compare the run's model with the task's own, once for each layout.

        Raises:
            LayoutError: they differ; the message names the tensor and both shapes.
        """
        if layout.digest in self._fitting_layouts:
            return
        try:
            own = layout_of(task.model_state(data) if isinstance(task, ShowsModel) else task.initial_state(0))
        except Exception:  # noqa: BLE001  where to begin may be what the coordinator's machine alone has, weights on disk say
            own = layout
        wrong = difference(own, layout)
        if wrong:
            raise LayoutError(
                f"round {request.round_num}: this agent's model {wrong}: it is not the run's; give agent and coordinator the "
                f"same version of task {request.head.task}"
            )
        self._fitting_layouts.add(layout.digest)

    def _load(self) -> tuple[Task, Any]:
        assert self._setup is not None, "a request before set-up"
        if self._task is None:
            task = find_task(self._setup.task)
            options = msgspec.structs.asdict(self._setup.data)
            options["data_dir"] = Path(options["data_dir"]) if options["data_dir"] else None
            self._data = _loaded(task, DataSpec(**options))
            self._task = task
        return self._task, self._data


def _loaded(task: Task, spec: DataSpec) -> Any:
    """The task's data, at least one example.

    Raises:
        _DataError: they are missing, empty, or something is wrong with them: whatever the task raised.
    """
    try:
        data = task.load_data(spec)
        num_examples = task.num_examples(data)
    except TaskError as error:
        raise _DataError(str(error)) from error
    except MemoryError:
        raise
    except Exception as error:
        raise _DataError(f"task {task.name}: loading its data failed: {_described(error)}") from error
    if num_examples < 1:
        raise _DataError(f"task {task.name}: no examples; look at what load_data reads and at the partition")
    return data


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _write_update(
    request: msg.TrainModel, layout: Layout, trained: Trained, score: Score | None, training_s: float
) -> None:
    if trained.num_examples < 1:
        raise TaskError(f"{request.run_id}: training used {trained.num_examples} examples, expected at least 1")
    vector, counters = state_to_vector(trained.state, layout)
    framing = Framing(layout.num_elements, request.head.frame_elements)
    spans = [framing.span(index) for index in range(framing.num_frames)]
    bodies = [encode_float32(vector[start:stop]) for start, stop in spans]
    digest = update_digest(hashlib.sha256(body).digest() for body in bodies)
    frames = (
        encode_frame(
            codec=FLOAT32,
            run_tag=run_tag(request.run_id),
            round_num=request.round_num,
            index=index,
            num_elements=stop - start,
            content_tag=content_tag(digest),
            body=body,
        )
        for index, ((start, stop), body) in enumerate(zip(spans, bodies, strict=True))
    )
    update = FinishedUpdate(
        run_id=request.run_id,
        round_num=request.round_num,
        model_digest=request.head.model_digest,
        layout_digest=layout.digest,
        update_digest=digest,
        num_frames=framing.num_frames,
        frames_bytes=sum(HEADER_BYTES + len(body) for body in bodies),
        num_examples=int(trained.num_examples),
        counters=counters,
        training_s=training_s,
        metrics=fitting(trained.metrics),
        evaluation=None if score is None else to_evaluation(score),
    )
    write_update(Path(request.update_path), frames, update)


def _limit(setup: msg.SetUp) -> None:
    if setup.max_memory_mb:
        limit_bytes = setup.max_memory_mb * 1024 * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def main() -> None:
    """Entry point of the process."""
    failpoints.arm("worker")
    worker = Worker()
    serve(worker.handle, worker.interrupt)


if __name__ == "__main__":
    main()
