"""What a task is: the model, this device's data, how to train and how to evaluate.

A task speaks in state dictionaries of NumPy arrays, so that nothing but the task itself need know torch. The built-in ones
are examples to read; yours is named as `package.module:object`, or by its file, on both sides, and nothing else changes.
With a torch model, start from `simple`, `loops`, `numpy_client` or `torch_task`, which need less: docs/tasks.md.

Whatever is about skew or partition belongs to `load_data`: `DataSpec` says what this agent was started with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from midge.tasks.errors import TaskError as TaskError  # noqa: PLC0414  where everybody looks for it

State: TypeAlias = Mapping[str, NDArray[Any]]
"""A model as named arrays, in the order of its state dictionary: floating-point parameters and buffers, and integer ones."""


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Which data an agent has, as its operator said.

    Attributes:
        data_dir: where the data lie on this device; None for the task's own place.
        classes: labels that this agent owns; empty for all.
        sel_prob: share of the examples with those labels that it has, 0 to 1.
        def_prob: share of the examples with other labels that it has, 0 to 1.
        partition: "" for all data, or "iid", "contiguous", "shards:2", "dirichlet:0.3", "quantity:0.5": how the data
            are dealt among `num_parts`, see `midge.tasks.partition`.
        part: which part is this agent's, 0 to num_parts - 1.
        num_parts: how many parts there are.
        seed: of every random choice in this.
        download: whether the task may fetch data that are not there.
    """

    data_dir: Path | None = None
    classes: tuple[int, ...] = ()
    sel_prob: float = 1.0
    def_prob: float = 0.0
    partition: str = ""
    part: int = 0
    num_parts: int = 1
    seed: int = 0
    download: bool = False

    @property
    def is_share(self) -> bool:
        """Whether it leaves out any of the data."""
        return bool(self.classes or self.partition or self.num_parts > 1 or self.sel_prob < 1)


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """What a training is told: the round's configuration.

    Attributes:
        local_epochs: passes over the agent's data, at least 1.
        batch_size: examples in a batch; 0 for all of them at once.
        learning_rate: step size.
        momentum: of the local optimiser, 0 to below 1.
        proximal_mu: weight of the term `mu / 2 * ||w - w_global||^2` that is added to the loss, where w_global is the state to
            train from; 0 for none. A task that adds it has an attribute `supports_proximal = True`; the agent refuses to train
            any other with one.
        seed: of every random choice; from (run seed, round, agent), so the same round trained again gives the same bits.
        round_num: of which round, from 1; 0 where there are no rounds.
        extra: what the task alone knows.
        max_steps: end after so many gradient steps, in the midst of an epoch too; 0 for no such limit. Only comparisons
            ask for it. A task that cannot ignores it, and leaves `Trained.num_steps` at 0.
    """

    local_epochs: int = 1
    batch_size: int = 0
    learning_rate: float = 0.1
    momentum: float = 0.0
    proximal_mu: float = 0.0
    seed: int = 0
    round_num: int = 0
    extra: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    max_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What came of a training: the whole state after it, the examples it used, and metrics of the training itself.

    `num_steps` is how many gradient steps it made, where the task counts them; else 0.
    """

    state: State
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    num_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Score:
    """How a model does on some data: means over `num_examples` examples."""

    num_examples: int
    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)


class Task(Protocol):
    """What is learned."""

    @property
    def name(self) -> str:
        """What messages and tables call it."""

    def initial_state(self, seed: int) -> State:
        """The model of round 0. Fixes names, shapes, element types and their order for the whole run."""

    def load_data(self, spec: DataSpec) -> Any:
        """This device's examples, in any form that `train` and `evaluate` take; called once and kept.

        Raises:
            TaskError: the data are missing, empty or unreadable; the message says where they should be.
        """

    def num_examples(self, data: Any) -> int:
        """How many examples `load_data` gave."""

    def test_data(self) -> Any | None:
        """Data for evaluating on the coordinator; None where the coordinator has none."""

    def train(self, state: State, data: Any, spec: TrainSpec, progress: Callable[[float], None]) -> Trained:
        """Train from `state` (not to be changed) on `data`; call `progress` with the fraction done now and then."""

    def evaluate(self, state: State, data: Any) -> Score:
        """How `state` does on `data`."""


@runtime_checkable
class FollowsRounds(Protocol):
    """A task that is told of a round's configuration before it evaluates, and not only when it trains."""

    def begin_round(self, spec: TrainSpec) -> None:
        """The evaluation and the training that follow are of this round."""


@runtime_checkable
class ShowsModel(Protocol):
    """A task that can tell its model's names, shapes and types for less than `initial_state` costs."""

    def model_state(self, data: Any) -> State:
        """Any state of this device's model, whatever its values."""


@runtime_checkable
class ReadsTestData(Protocol):
    """A task whose test data lie on the coordinator's disk, where its operator said."""

    def load_test_data(self, spec: DataSpec) -> Any | None:
        """Data for evaluating on the coordinator, as `test_data`; of `spec`, `data_dir` and `download` count."""


def test_data_of(task: Task, spec: DataSpec) -> Any | None:
    """The task's test data, from where `spec` says if it can be told; None where there are none."""
    return task.load_test_data(spec) if isinstance(task, ReadsTestData) else task.test_data()


def seed_of(run_seed: int, round_num: int, agent_id: str) -> int:
    """The seed of one agent's training in one round: the same round trained again gives the same bits."""
    entropy = [run_seed, round_num, *agent_id.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
