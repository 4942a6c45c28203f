"""A training loop that a user has already, as a task: their functions stay as they are.

    from train_mine import Net, load_data, test, train
    task = LoopTask(net=Net, load_data=load_data, train=train, test=test)

`train(net, loader, ...)` and `test(net, loader, ...)` get the network and a loader by position. Whatever else they take, they
take by name: `epochs`, `device`, `lr` and so on, see `_known`. So what a round tells reaches them if they have a parameter
for it, and only then: a learning rate that is written into the loop stays what it is, whatever the run's configuration says.

Before each call every global generator is seeded, and a generator of the loader's own too: the same round trained again on the
same data gives the same bits, if the loop itself draws from nothing else and runs on one thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, TensorDataset

from midge.tasks.base import DataSpec, Score, State, TaskError, Trained, TrainSpec
from midge.tasks.inspection import labels_of
from midge.tasks.sharing import share
from midge.tasks.torch_task import EVALUATION_BATCH, Paced, load_state, state_of
from midge.tasks.user_code import DataFunction, named_parameters, number, numbers_of, round_config, seeded

_EPOCHS = ("epochs", "num_epochs", "local_epochs", "n_epochs")
_RATES = ("lr", "learning_rate")
_ROUNDS = ("round_num", "server_round")


@dataclass(frozen=True)
class LoopData:
    """What a user's `load_data` gave, this agent's share of it.

    Attributes:
        train: a loader, or a data set that gets one.
        test: what the agent evaluates on, likewise; the training data where there is nothing else.
    """

    train: Any
    test: Any

    def __len__(self) -> int:
        """How many examples there are to train on."""
        return num_examples_of(self.train)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Of the training data; None where they cannot be read."""
        data = self.train.dataset if isinstance(self.train, DataLoader) else self.train
        return labels_of(data) if hasattr(data, "__getitem__") else None


class LoopTask:
    """A task of a user's own functions. Implements `midge.tasks.base.Task`.

    Args:
        net: a class, or a function without parameters, that makes the network; or the network itself, whose weights then do not
            depend on the run's seed.
        load_data: gives a training and a test loader, a data set for each, or one of them alone. It is called on agents. It may
            ask for its part by name (`spec`, `part`, `partition_id`, ...: see `user_code.DataFunction`); if it does not, the
            agent's `--classes`, `--partition` and the like are applied to the training data that it gives.
        train: `train(net, loader, ...)`. May return nothing, a loss, a list of them, a loss and an accuracy, or a
            dictionary of metrics.
        test: `test(net, loader, ...)`. Returns a loss, a loss and an accuracy, or a dictionary with a `loss`.
        test_data: what the coordinator evaluates each version on with `test`: a function that gives a loader or a data set, or
            either of these. None: agents evaluate, each on its own test data.
        device: where the network is, and what `device` stands for.
        name: what messages call the task; the network's name unless given.

    Raises:
        TaskError: a function has a parameter that nobody can fill.
    """

    def __init__(
        self,
        *,
        net: Callable[[], nn.Module] | nn.Module,
        load_data: Callable[..., Any],
        train: Callable[..., Any],
        test: Callable[..., Any],
        test_data: Any = None,
        device: str = "cpu",
        name: str = "",
    ) -> None:
        self.name = name or getattr(net, "__name__", type(net).__name__)
        self._net = net
        self._own_net: nn.Module | None = None
        self._load_data = DataFunction(load_data, "load_data")
        self._train = train
        self._test = test
        self._device = torch.device(device)
        known = set(_known(TrainSpec(), self._device))
        self._train_names = named_parameters(train, known, "train", first=2)
        self._test_names = named_parameters(test, known, "test", first=2)
        self._test_data = None if test_data is None else DataFunction.of(test_data, "test_data")
        self._spec = TrainSpec()

    def initial_state(self, seed: int) -> State:
        """The state of a network made right after every global generator was seeded with `seed`."""
        with seeded(seed):
            return state_of(self._net if isinstance(self._net, nn.Module) else self._net())

    def model_state(self, data: LoopData) -> State:  # noqa: ARG002  the network does not depend on it
        """The state of the network that is kept."""
        return state_of(self._kept_net())

    def load_data(self, spec: DataSpec) -> LoopData:
        """What the user's function gives, or the share of its training data that `spec` says."""
        with seeded(spec.seed):
            given = self._load_data(spec)
        train, test = _two(given)
        if not self._load_data.deals and spec.is_share:
            train = _share_of(train, spec)
        return LoopData(train, train if test is None else test)

    def num_examples(self, data: LoopData) -> int:
        """How many examples there are to train on."""
        return len(data)

    def test_data(self) -> LoopData | None:
        """See `load_test_data`."""
        return self.load_test_data(DataSpec())

    def load_test_data(self, spec: DataSpec) -> LoopData | None:
        """What the coordinator evaluates on; None where agents do."""
        if self._test_data is None:
            return None
        data = _as_source(self._test_data(spec))
        return LoopData(data, data)

    def begin_round(self, spec: TrainSpec) -> None:
        """What `test` may ask for is this round's."""
        self._spec = spec

    def train(self, state: State, data: LoopData, spec: TrainSpec, progress: Callable[[float], None]) -> Trained:
        """Let the user's function train. Its batches are counted as the network sees them, for the progress."""
        net = self._loaded(state).train()
        loader = _training_loader(data.train, spec)
        given = _known(spec, self._device)
        with seeded(spec.seed), _counting(net, _num_batches(loader) * spec.local_epochs, progress):
            result = self._train(net, loader, **{name: given[name] for name in self._train_names})
        net.zero_grad()  # a warm network at rest needs no gradients
        trained = result if isinstance(result, nn.Module) else net
        progress(1.0)
        return Trained(state=state_of(trained), num_examples=len(data), metrics=_training_metrics(result))

    def evaluate(self, state: State, data: LoopData) -> Score:
        """Let the user's function test.

        Raises:
            TaskError: what it returned holds no loss.
        """
        net = self._loaded(state).eval()
        loader = data.test if not _is_data_set(data.test) else DataLoader(data.test, batch_size=EVALUATION_BATCH)
        given = _known(self._spec, self._device)
        with seeded(0):
            result = self._test(net, loader, **{name: given[name] for name in self._test_names})
        metrics = _test_metrics(result)
        loss = metrics.pop("loss", None)
        if loss is None:
            raise TaskError(
                f"task {self.name}: test returned {_shown(result)}: expected a loss, a loss and an accuracy, or a dictionary "
                "with the key 'loss'"
            )
        return Score(num_examples=num_examples_of(data.test), loss=loss, metrics=metrics)

    def _loaded(self, state: State) -> nn.Module:
        load_state(self._kept_net(), state)
        return self._kept_net()

    def _kept_net(self) -> nn.Module:
        if self._own_net is None:
            with seeded(0):
                self._own_net = self._net if isinstance(self._net, nn.Module) else self._net()
            self._own_net.to(self._device)
        return self._own_net


def num_examples_of(data: Any) -> int:
    """How many examples a data set or a loader has.

    Raises:
        TaskError: none, or they cannot be counted.
    """
    counted = data
    if not _is_data_set(data):  # of a loader: what it draws, which may be less than its data set
        counted = next((each for each in _drawn_from(data) if hasattr(each, "__len__")), data)
    if not hasattr(counted, "__len__"):
        raise TaskError(
            f"the examples of a {type(counted).__name__} cannot be counted: expected a data set with a length"
        )
    num_examples = len(cast("Sized", counted))
    if num_examples < 1:
        raise TaskError("no examples: look at what load_data reads, and at the agent's part of it")
    return num_examples


def _drawn_from(loader: Any) -> tuple[Any, Any]:
    return getattr(loader, "sampler", None), getattr(loader, "dataset", None)


def _known(spec: TrainSpec, device: torch.device) -> dict[str, Any]:
    """Everything that a user's function may ask for, by name."""
    return {
        **dict.fromkeys(_EPOCHS, spec.local_epochs),
        **dict.fromkeys(_RATES, spec.learning_rate),
        **dict.fromkeys(_ROUNDS, spec.round_num),
        "batch_size": spec.batch_size,
        "momentum": spec.momentum,
        "seed": spec.seed,
        "device": device,
        "config": round_config(spec),
    }


def _two(given: Any) -> tuple[Any, Any]:
    """Training and test data of what `load_data` gave; of more than two the rest is ignored, of one the second is None."""
    if isinstance(given, tuple | list) and not _is_pair(given):
        sources = [_as_source(each) for each in given[:2]]
        if not sources:
            raise TaskError("load_data returned nothing: expected a training and a test loader, or a data set for each")
        return (sources[0], sources[1]) if len(sources) > 1 else (sources[0], None)
    return _as_source(given), None


def _as_source(data: Any) -> Any:
    """A loader or a data set."""
    if _is_pair(data):
        return TensorDataset(*(torch.as_tensor(one) for one in data))
    if data is None or not (hasattr(data, "__iter__") or _is_data_set(data)):
        raise TaskError(f"load_data gave a {type(data).__name__}: expected a loader or a data set with a length")
    return data


def _is_pair(data: Any) -> bool:
    return isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(x, Tensor | np.ndarray) for x in data)


def _is_data_set(data: Any) -> bool:
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _share_of(data: Any, spec: DataSpec) -> Any:
    """The agent's share of a data set, or a loader like the user's own of the share of its data set."""
    if _is_data_set(data):
        return share(data, spec)
    if not isinstance(data, DataLoader) or not isinstance(data.sampler, RandomSampler | SequentialSampler):
        drawn_by = f" with a {type(data.sampler).__name__}" if isinstance(data, DataLoader) else ""
        raise TaskError(
            f"load_data gave a {type(data).__name__}{drawn_by}, of which no share can be taken: return the data set, or let "
            "load_data take the DataSpec as `spec`, and deal for itself with midge.tasks.partition.select"
        )
    examples = share(data.dataset, spec)
    return DataLoader(
        cast("Dataset[Any]", examples),
        batch_size=data.batch_size,
        shuffle=isinstance(data.sampler, RandomSampler),
        num_workers=data.num_workers,
        collate_fn=data.collate_fn,
        pin_memory=data.pin_memory,
        drop_last=data.drop_last or _leaves_one(num_examples_of(examples), data.batch_size or 1),
        worker_init_fn=data.worker_init_fn,
    )


def _training_loader(data: Any, spec: TrainSpec) -> Any:
    """A loader of a data set with the round's batch size; the user's own loader as it is, its generator seeded anew."""
    if _is_data_set(data):
        num_examples = num_examples_of(data)
        size = min(spec.batch_size or num_examples, num_examples)
        order = torch.Generator().manual_seed(spec.seed)
        drop_last = _leaves_one(num_examples, size)
        return DataLoader(data, batch_size=size, shuffle=True, generator=order, drop_last=drop_last)
    for holder in (data, getattr(data, "sampler", None)):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(spec.seed)
    return data


def _leaves_one(num_examples: int, batch_size: int) -> bool:
    """Whether one example is left over, of which batch normalisation has no variance, so that torch would raise."""
    return batch_size > 1 and num_examples > batch_size and num_examples % batch_size == 1


def _num_batches(loader: Any) -> int:
    return len(loader) if hasattr(loader, "__len__") else 0


@contextlib.contextmanager
def _counting(net: nn.Module, num_batches: int, progress: Callable[[float], None]) -> Iterator[None]:
    """Report progress as the network is called: once a batch, in any loop. A cancelled training ends there."""
    tell = Paced(progress)
    num_seen = 0

    def count(*_: object) -> None:
        nonlocal num_seen
        num_seen += 1
        tell(min(num_seen / num_batches, 0.99) if num_batches else 0.0)

    hook = net.register_forward_pre_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _training_metrics(result: Any) -> dict[str, float]:
    """What `train` returned, as far as it says anything."""
    if result is None or isinstance(result, nn.Module):
        return {}
    if isinstance(result, Mapping):
        return numbers_of(result)
    if isinstance(result, list):  # a loss an epoch
        return numbers_of({"loss": result[-1]}) if result else {}
    return _test_metrics(result)


def _test_metrics(result: Any) -> dict[str, float]:
    """What `test` returned: a loss among it, or not."""
    if isinstance(result, Mapping):
        return numbers_of(result)
    if isinstance(result, tuple | list):
        return numbers_of(dict(zip(("loss", "accuracy"), result, strict=False)))
    loss = number(result)
    return {} if loss is None else {"loss": loss}


def _shown(result: Any) -> str:
    if isinstance(result, Mapping):
        return f"a dictionary with {', '.join(sorted(map(repr, result))) or 'nothing'}"
    return "nothing" if result is None else f"a {type(result).__name__}"
