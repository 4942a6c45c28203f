"""A class of the shape of Flower's `NumPyClient`, as a task. It stays as it is, and Flower need not be installed.

    from client import FlowerClient
    task = numpy_client_task(FlowerClient)

Such a class has `get_parameters(config)`, which gives the model as a list of NumPy arrays; `fit(parameters, config)`, which
trains from such a list and returns `(parameters, num_examples, metrics)`; `evaluate(parameters, config)`, which returns
`(loss, num_examples, metrics)`; and perhaps `set_parameters(parameters)`, which only the class itself calls.
(https://flower.ai/docs/framework/ref-api/flwr.client.NumPyClient.html)

**What travels.** The arrays get names in their order, `parameters.0`, `parameters.1` and so on, or those that are given.
float32 travels as it is; float64 and float16 arrive in their own type, but with the values of float32. Integers and booleans
keep type and value, and are combined by the rule for counters: all of them together may have 16384 elements. Arrays of one
element without a dimension stay such. Strings, complex numbers and unsigned ones of more than 8 bits do not travel.

**The dictionary** that `fit` and `evaluate` get holds the round's configuration: `server_round` and `round_num` (from 1; 0
where a coordinator evaluates), `local_epochs`, `batch_size`, `learning_rate`, `momentum`, `seed`, and the run's
`task_options`. Metrics that are numbers travel; all else in them stays on the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midge.tasks.base import DataSpec, Score, State, TaskError, Trained, TrainSpec
from midge.tasks.inspection import labels_of
from midge.tasks.user_code import DataFunction, number, numbers_of, round_config, seeded

_SIZED = ("trainloader", "train_loader", "trainset", "train_set", "train_dataset", "train_data", "x_train", "X_train")
"""Where a client is likely to keep what it trains on; only for saying how many examples there are, and of what."""


@dataclass(frozen=True)
class ClientData:
    """A client, which holds its data itself."""

    client: Any

    def __len__(self) -> int:
        """How many examples it has, where one of the usual attributes tells; else 1, as only `fit` will say."""
        return 1 if self._examples is None else len(self._examples)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Of what it trains on; None where they cannot be read."""
        return None if self._examples is None else labels_of(self._examples)

    @property
    def _examples(self) -> Any | None:
        for name in _SIZED:
            held: Any = getattr(self.client, name, None)
            held = getattr(held, "dataset", held) if hasattr(held, "batch_sampler") else held
            if hasattr(held, "__len__") and len(held) > 0:
                return held
        return None


class NumpyClientTask:
    """A task of such a class; made by `numpy_client_task`. Implements `midge.tasks.base.Task`."""

    def __init__(
        self,
        make: DataFunction,
        name: str,
        names: Sequence[str] | None,
        initial_parameters: Callable[[], Sequence[Any]] | None,
        make_tester: DataFunction | None,
    ) -> None:
        self.name = name
        self._make = make
        self._names = names
        self._initial_parameters = initial_parameters
        self._make_tester = make_tester
        self._spec = TrainSpec()

    def initial_state(self, seed: int) -> State:
        """What a client's `get_parameters` gives, or `initial_parameters`, after every global generator was seeded."""
        with seeded(seed):
            if self._initial_parameters is not None:
                return self._named(self._initial_parameters(), "initial_parameters")
            client = self._make_client(self._make, DataSpec())
            return self._named(_parameters_of(client), "get_parameters")

    def model_state(self, data: ClientData) -> State:
        """What the agent's own client has now."""
        if hasattr(data.client, "get_parameters"):
            return self._named(_parameters_of(data.client), "get_parameters")
        return self.initial_state(0)

    def load_data(self, spec: DataSpec) -> ClientData:
        """The agent's client.

        Raises:
            TaskError: the operator gave a share, which nobody can take: the client has its data to itself.
        """
        if not self._make.deals and spec.is_share:
            raise TaskError(
                f"task {self.name}: the agent was started with classes, a partition or a share, and the client loads its data "
                "by itself: let a function make it from the DataSpec, as numpy_client_task(lambda spec: ...), or leave them out"
            )
        with seeded(spec.seed):
            return ClientData(self._make_client(self._make, spec))

    def num_examples(self, data: ClientData) -> int:
        """How many the client has, as far as can be seen."""
        return len(data)

    def test_data(self) -> ClientData | None:
        """See `load_test_data`."""
        return self.load_test_data(DataSpec())

    def load_test_data(self, spec: DataSpec) -> ClientData | None:
        """The client that evaluates on the coordinator; None where agents do."""
        if self._make_tester is None:
            return None
        client = self._make_client(self._make_tester, spec)
        if not hasattr(client, "evaluate"):
            raise TaskError(f"task {self.name}: test_client is a {type(client).__name__}, which has no evaluate")
        return ClientData(client)

    def begin_round(self, spec: TrainSpec) -> None:
        """The dictionary that `evaluate` gets is this round's."""
        self._spec = spec

    def train(self, state: State, data: ClientData, spec: TrainSpec, progress: Callable[[float], None]) -> Trained:
        """Let the client fit.

        Raises:
            TaskError: what it returned is not `(parameters, num_examples, metrics)`, or has not the model's shapes.
        """
        progress(0.0)
        with seeded(spec.seed):
            result = data.client.fit(_as_list(state), round_config(spec))
        parameters, num_examples, metrics = self._three(result, "fit", "(parameters, num_examples, metrics)")
        return Trained(state=self._like(state, parameters), num_examples=num_examples, metrics=metrics)

    def evaluate(self, state: State, data: ClientData) -> Score:
        """Let the client evaluate; no examples where it cannot.

        Raises:
            TaskError: what it returned is not `(loss, num_examples, metrics)`.
        """
        if not hasattr(data.client, "evaluate"):
            return Score(num_examples=0, loss=float("nan"))
        with seeded(0):
            result = data.client.evaluate(_as_list(state), round_config(self._spec))
        loss, num_examples, metrics = self._three(result, "evaluate", "(loss, num_examples, metrics)")
        value = number(loss)
        if value is None:
            raise TaskError(
                f"task {self.name}: evaluate returned a {type(loss).__name__} as its loss: expected a number"
            )
        return Score(num_examples=num_examples, loss=value, metrics=metrics)

    def _make_client(self, make: DataFunction, spec: DataSpec) -> Any:
        client = make(spec)
        lacking = [name for name in ("get_parameters", "fit") if not callable(getattr(client, name, None))]
        if self._initial_parameters is not None:
            lacking = [name for name in lacking if name != "get_parameters"]
        if lacking:
            raise TaskError(
                f"task {self.name}: a {type(client).__name__} has no {' and no '.join(lacking)}: it is no client"
            )
        return client

    def _named(self, parameters: Any, source: str) -> dict[str, NDArray[Any]]:
        arrays = self._arrays(parameters, source)
        names = [f"parameters.{index}" for index in range(len(arrays))] if self._names is None else self._names
        if len(names) != len(arrays):
            raise TaskError(f"task {self.name}: {len(names)} names for {len(arrays)} arrays: expected as many")
        return dict(zip(names, arrays, strict=True))

    def _arrays(self, parameters: Any, source: str) -> list[NDArray[Any]]:
        """Copies, which the client cannot change later."""
        if not isinstance(parameters, list | tuple):
            raise TaskError(
                f"task {self.name}: {source} gave a {type(parameters).__name__}: expected a list of NumPy arrays"
            )
        return [np.array(array) for array in parameters]

    def _three(self, result: Any, method: str, expected: str) -> tuple[Any, int, dict[str, float]]:
        if not isinstance(result, tuple | list) or len(result) != 3:
            seen = f"{len(result)} values" if isinstance(result, tuple | list) else f"a {type(result).__name__}"
            raise TaskError(f"task {self.name}: {method} returned {seen}: expected {expected}")
        first, num_examples, metrics = result
        count = number(num_examples)
        if count is None or count != int(count):
            raise TaskError(
                f"task {self.name}: {method} returned {num_examples!r} as its num_examples: expected a whole number"
            )
        if not isinstance(metrics, Mapping) and metrics is not None:
            raise TaskError(
                f"task {self.name}: {method} returned a {type(metrics).__name__} as its metrics: expected a dict"
            )
        return first, int(count), numbers_of(metrics or {})

    def _like(self, state: State, parameters: Any) -> dict[str, NDArray[Any]]:
        """What `fit` returned, under the names and in the types of `state`: arithmetic easily makes float64 of float32."""
        arrays = self._arrays(parameters, "fit")
        if len(arrays) != len(state):
            raise TaskError(
                f"task {self.name}: fit returned {len(arrays)} arrays: expected {len(state)}, as it was given"
            )
        result = {}
        for (name, given), array in zip(state.items(), arrays, strict=True):
            if array.shape != given.shape or not np.can_cast(array.dtype, given.dtype, "same_kind"):
                raise TaskError(
                    f"task {self.name}: fit returned {name} as {array.shape} {array.dtype}: expected {given.shape} "
                    f"{given.dtype}, as it was given"
                )
            result[name] = array.astype(given.dtype, copy=False)
        return result


def numpy_client_task(
    client: Any,
    *,
    name: str = "",
    names: Sequence[str] | None = None,
    initial_parameters: Callable[[], Sequence[Any]] | None = None,
    test_client: Any = None,
) -> NumpyClientTask:
    """A task of a class of the shape of Flower's `NumPyClient`.

    Args:
        client: the class, if it needs no arguments; a function that makes one, and may ask for its part of the data by name
            (`spec`, `partition_id`, ...: see `user_code.DataFunction`); or a client.
        name: what messages call the task; the class's name unless given.
        names: of the arrays, in order: with those of a state dictionary an exported model loads into its network.
        initial_parameters: gives the arrays of round 0; for a client that cannot be made on the coordinator, for want of data.
        test_client: as `client`: it evaluates each version on the coordinator. None: agents evaluate, on their own data.

    Raises:
        TaskError: the class or the function needs arguments that nobody can give.
    """
    maker = _maker(client, "client")
    tester = None if test_client is None else _maker(test_client, "test_client")
    shown = name or getattr(client, "__name__", type(client).__name__)
    return NumpyClientTask(maker, "client" if shown == "<lambda>" else shown, names, initial_parameters, tester)


def _maker(client: Any, what: str) -> DataFunction:
    if isinstance(client, type) or not hasattr(client, "fit"):
        if not callable(client):
            raise TaskError(
                f"{what} is a {type(client).__name__}: expected a class with fit and evaluate, or what makes one"
            )
        return DataFunction(client, getattr(client, "__name__", what))
    return DataFunction(lambda: client, what)


def _parameters_of(client: Any) -> Any:
    """What `get_parameters` gives; early versions of Flower handed it no dictionary."""
    takes_config = bool(inspect.signature(client.get_parameters).parameters)
    return client.get_parameters(round_config(TrainSpec())) if takes_config else client.get_parameters()


def _as_list(state: State) -> list[NDArray[Any]]:
    """Arrays of the client's own, which it may write to."""
    return [np.array(array) for array in state.values()]
