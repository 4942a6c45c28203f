"""The shortest way to a task: a model, data and a loss, named one by one.

    task = SimpleTask(model=Net, train_data=load_train, test_data=load_test, loss=nn.CrossEntropyLoss())

Whoever needs more subclasses `midge.tasks.torch_task.TorchTask`, of which this is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

from midge.tasks.base import DataSpec, TrainSpec
from midge.tasks.sharing import Examples, share
from midge.tasks.torch_task import Optimizer, TorchTask
from midge.tasks.user_code import DataFunction

Source: TypeAlias = Examples | Callable[..., Examples]
"""Examples, or a function that loads them: only where they are needed, and from as much of the `DataSpec` as it asks for."""


class SimpleTask(TorchTask):
    """A task put together from what a user has.

    Args:
        model: a class, or a function without parameters, that makes the model.
        train_data: what agents train on: a data set, inputs and targets as two tensors, or a function that gives either. A
            function runs on agents alone: the coordinator needs no training data. The agent's `--classes`, `--partition` and
            the like apply, unless the function takes `spec` or `part` and deals for itself.
        test_data: what the coordinator evaluates each version on, likewise; None: agents evaluate, on their own data.
        loss: the mean loss of a batch, of outputs and targets: cross-entropy unless given.
        optimizer: such as `torch.optim.Adam`: called with the parameters and `lr`. SGD with the run's momentum unless given.
        name: what messages call the task; the model's name unless given.

    Raises:
        TaskError: a function has a parameter that nobody can fill.
    """

    def __init__(
        self,
        *,
        model: Callable[[], nn.Module],
        train_data: Source,
        test_data: Source | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        optimizer: Callable[..., Optimizer] | None = None,
        name: str = "",
    ) -> None:
        self.name = name or getattr(model, "__name__", "simple")  # type: ignore[misc]
        self._model_maker = model
        self._train_data = DataFunction.of(train_data, "train_data")
        self._test_data = None if test_data is None else DataFunction.of(test_data, "test_data")
        self._loss = loss
        self._optimizer = optimizer

    def build_model(self) -> nn.Module:
        """See `TorchTask.build_model`."""
        return self._model_maker()

    def load_data(self, spec: DataSpec) -> Examples:
        """See `TorchTask.load_data`."""
        data: Examples = self._train_data(spec)
        return data if self._train_data.deals else share(data, spec)

    def test_data(self) -> Examples | None:
        """See `TorchTask.test_data`."""
        return self.load_test_data(DataSpec())

    def load_test_data(self, spec: DataSpec) -> Examples | None:
        """The test data, from where `spec` says."""
        return None if self._test_data is None else self._test_data(spec)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See `TorchTask.loss`."""
        return super().loss(outputs, targets) if self._loss is None else self._loss(outputs, targets)

    def make_optimizer(self, model: nn.Module, spec: TrainSpec) -> Optimizer:
        """See `TorchTask.make_optimizer`."""
        if self._optimizer is None:
            return super().make_optimizer(model, spec)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return self._optimizer(parameters, lr=spec.learning_rate)
