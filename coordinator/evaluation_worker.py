"""The evaluating process: the only one of the coordinator that holds torch. What goes wrong in a task ends here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from coordinator import evaluator_messages as msg
from coordinator.models import ModelStore
from midge.tasks.base import DataSpec, Task, TaskError, test_data_of
from midge.tasks.process import serve
from midge.tasks.registry import find_task
from midge.tasks.scores import to_evaluation

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
            reply(_encode(msg.Failed(request=request.request, reason=f"{type(error).__name__}: {error}"[:500])))

    def _make(self, request: msg.MakeModel) -> msg.Made:
        task, models = self._load()
        return msg.Made(request=request.request, digest=models.save_state(task.initial_state(request.seed)))

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


def main() -> None:
    """Entry point of the process."""
    serve(EvaluationWorker().handle, lambda _: False)


if __name__ == "__main__":
    main()
