"""The evaluating process: the only one of the coordinator that holds torch. What goes wrong in a task ends here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from coordinator import evaluator_messages as msg
from coordinator.disk import survivable
from coordinator.model_import import fit_state, read_state
from coordinator.models import ModelError, ModelStore
from midge.tasks.base import DataSpec, State, Task, TaskError, test_data_of
from midge.tasks.flatten import layout_of
from midge.tasks.process import serve
from midge.tasks.registry import find_task
from midge.tasks.scores import to_evaluation
from midge.wire.errors import LayoutError

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(msg.Request).decode


class EvaluationWorker:
    """Holds the task and its test data between requests."""

    def __init__(self) -> None:
        self._setup: msg.SetUp | None = None
        self._task: Task | None = None
        self._test_data: Any = None

    def handle(self, payload: bytes, reply: Callable[[bytes], None]) -> None:
        """Serve one request."""
        request = _decode(payload)
        if isinstance(request, msg.SetUp):
            self._setup = request
            return
        try:
            reply(_encode(self._make(request) if isinstance(request, msg.MakeModel) else self._evaluate(request)))
        except TaskError as error:
            reply(_encode(msg.Failed(request=request.request, reason=str(error)[:500])))
        except Exception as error:  # noqa: BLE001  a user's task may raise anything
            ours = isinstance(error, LayoutError | ModelError)
            reason = str(error) if ours else f"{type(error).__name__}: {error}"
            reply(_encode(msg.Failed(request=request.request, reason=reason[:500])))

    def _make(self, request: msg.MakeModel) -> msg.Made | msg.Failed:
        task, models = self._load()
        state = task.initial_state(request.seed)
        if request.file:
            path = Path(request.file)
            try:
                state = fit_state(read_state(path), layout_of(state))
            except LayoutError as error:
                assert self._setup is not None
                raise LayoutError(f"{path.name} does not fit task {self._setup.task}: it {error}") from None
        try:
            base = request.base_digest
            digest = _checked_base(models, base, state) if base else models.save_state(state)
        except OSError as error:
            number = (error.errno or 0) if survivable(error) else 0
            verb = "read" if request.base_digest else "stored"
            return msg.Failed(request=request.request, reason=f"the model cannot be {verb}: {error}", errno=number)
        return msg.Made(request=request.request, digest=digest)

    def _evaluate(self, request: msg.Evaluate) -> msg.Evaluated:
        task, models = self._load()
        if self._test_data is None:
            self._test_data = test_data_of(task, self._data_spec())
        if self._test_data is None:
            return msg.Evaluated(request=request.request, score=None)
        with models.open(request.digest) as model:
            score = task.evaluate(model.state(), self._test_data)
        evaluation = to_evaluation(score)
        if evaluation is None:
            seen = f"loss is {score.loss} over {score.num_examples} examples"
            raise ValueError(f"{seen}: the model diverged (lower learning_rate), or there are no test data")
        return msg.Evaluated(request=request.request, score=evaluation)

    def _data_spec(self) -> DataSpec:
        assert self._setup is not None, "a request before set-up"
        return DataSpec(
            data_dir=Path(self._setup.data_dir) if self._setup.data_dir else None, download=self._setup.download
        )

    def _load(self) -> tuple[Task, ModelStore]:
        assert self._setup is not None, "a request before set-up"
        if self._task is None:
            self._task = find_task(self._setup.task)
        return self._task, ModelStore(Path(self._setup.models_dir))


def _checked_base(models: ModelStore, digest: str, state: State) -> str:
    """The digest of a base model that has the layout of the task's own.

    Raises:
        LayoutError: it has another one.
        ModelError: it is not in the store, or its file is damaged.
    """
    models.verify(digest)
    with models.open(digest) as base:
        difference = layout_of(state).difference(base.layout)
    if difference:
        raise LayoutError(f"base_model does not fit: it {difference}; push a model of this task and version")
    return digest


def main() -> None:
    """Entry point of the process."""
    serve(EvaluationWorker().handle, lambda _: False)


if __name__ == "__main__":
    main()
