"""Tasks with a torch model: subclass `TorchTask`, give it a model and data, and it trains.

    class Thermostat(TorchTask):
        name = "thermostat"

        def build_model(self) -> nn.Module:
            return nn.Linear(8, 3)

        def load_data(self, spec: DataSpec) -> Data:
            inputs, labels = read_my_sensor(spec.data_dir)
            mine = select(labels.numpy(), spec)
            return inputs[mine], labels[mine]

**What a training is**, so that it can be repeated elsewhere bit for bit (on one thread): a generator is seeded with
`TrainSpec.seed`; each epoch takes one `torch.randperm(num_examples, generator=generator)` and cuts it into batches, the
last of which may be smaller; each batch is one step of SGD, `v = momentum · v + gradient; w = w - learning_rate · v`,
with v zero at the start of every training. With a proximal term, each parameter's gradient is
`gradient + mu · (w - w_global)`, that of `loss + mu / 2 · ||w - w_global||²`; the metric `loss` is without it. torch's
global generator, which dropout draws from, starts from the same seed. `TrainSpec.max_steps`
cuts the last epoch short.

**What travels** is every entry of the state dictionary, as arrays. Integer buffers keep their type. bfloat16, which NumPy
does not have, becomes float32 and is rounded back on loading.

The model is built once and kept between calls: it must keep nothing outside its state dictionary.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sized
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset

from midge.tasks.base import DataSpec, Score, State, TaskError, Trained, TrainSpec

Data: TypeAlias = tuple[Tensor, Tensor] | Dataset[Any]
"""Inputs and targets as two tensors of equal length (fastest), or a data set with a length, of (input, target)."""

EVALUATION_BATCH = 256
"""Examples evaluated at once. Of convolutions, 1024 take 1.6 times as long: their activations leave the processor's caches."""
PROGRESS_INTERVAL_S = 0.2

_NUMPY_TYPES = frozenset(
    (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
)


class Optimizer(Protocol):
    """What training asks of an optimiser; those of `torch.optim` have it."""

    def zero_grad(self) -> None:
        """Drop the gradients of the batch before."""

    def step(self) -> Any:
        """Apply the gradients of this batch."""


class Sgd:
    """Gradient descent with momentum: the arithmetic of `torch.optim.SGD`, to the bit.

    torch's own imports its compiler at the first step, which nothing here uses: 80 MB and a second on a
    desktop, several on a small device.
    """

    def __init__(self, parameters: list[nn.Parameter], learning_rate: float, momentum: float) -> None:
        self._parameters = parameters
        self._learning_rate = learning_rate
        self._momentum = momentum
        self._velocity: dict[int, Tensor] = {}

    def zero_grad(self) -> None:
        """Drop the gradients of the batch before."""
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Apply the gradients of this batch. A parameter without one stays as it is."""
        for index, parameter in enumerate(self._parameters):
            direction = parameter.grad
            if direction is None:
                continue
            if self._momentum:
                velocity = self._velocity.get(index)
                if velocity is None:
                    velocity = self._velocity[index] = direction.clone()
                else:
                    velocity.mul_(self._momentum).add_(direction)
                direction = velocity
            parameter.add_(direction, alpha=-self._learning_rate)


class _Proximal:
    """The gradient of `mu / 2 * ||w - w_global||^2`, where w_global are the parameters when it is made."""

    def __init__(self, model: nn.Module, mu: float) -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad] if mu else []
        self._mu = mu
        self._pairs = [(parameter, parameter.detach().clone()) for parameter in parameters]

    @torch.no_grad()
    def add(self) -> None:
        """Add it to the gradients of this batch. A parameter without one stays as it is."""
        for parameter, start in self._pairs:
            if parameter.grad is not None:
                parameter.grad.add_((parameter - start).mul_(self._mu))


class TorchTask(ABC):
    """A task with a torch model, trained on the CPU. Implements `midge.tasks.base.Task`."""

    name: ClassVar[str]
    """What messages and tables call it; the class's name unless given."""
    supports_proximal: ClassVar[bool] = True
    """Whether `train` adds the proximal term that `TrainSpec.proximal_mu` asks for; one that overrides it says so anew."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not hasattr(cls, "name"):
            cls.name = cls.__name__

    @abstractmethod
    def build_model(self) -> nn.Module:
        """A new model, with random weights from torch's global generator."""

    @abstractmethod
    def load_data(self, spec: DataSpec) -> Data:
        """This device's examples; `midge.tasks.partition.select` does what `spec` says about skew.

        Raises:
            TaskError: the data are missing, empty or unreadable; say where they should be.
        """

    def test_data(self) -> Data | None:
        """Data for evaluating on the coordinator; none unless overridden."""
        return None

    def prepare(self, inputs: Tensor, *, training: bool) -> Tensor:  # noqa: ARG002  for those who override it
        """What the model sees of a batch of inputs: these, unless overridden. Normalise here, and augment if `training`.

        In training, torch's global generator starts from the training's seed.
        """
        return inputs

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch: cross-entropy unless overridden."""
        return functional.cross_entropy(outputs, targets)

    def make_optimizer(self, model: nn.Module, spec: TrainSpec) -> Optimizer:
        """The optimiser of one training, new each time: SGD unless overridden."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return Sgd(parameters, spec.learning_rate, spec.momentum)

    def initial_state(self, seed: int) -> State:
        """The state of a model built right after `torch.manual_seed(seed)`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return state_of(self.build_model())

    def model_state(self, data: Data) -> State:  # noqa: ARG002  the model does not depend on it
        """The state of the model that is kept."""
        return state_of(self._model)

    def num_examples(self, data: Data) -> int:
        """How many examples there are.

        Raises:
            TaskError: none, or not as many inputs as targets.
        """
        if isinstance(data, tuple) and len(data[0]) != len(data[1]):
            raise TaskError(f"task {self.name}: {len(data[0])} inputs and {len(data[1])} targets: expected as many")
        num_examples = len(data[1]) if isinstance(data, tuple) else len(cast("Sized", data))
        if num_examples < 1:
            raise TaskError(f"task {self.name}: no examples; look at what load_data reads and at the partition")
        return num_examples

    def train(self, state: State, data: Data, spec: TrainSpec, progress: Callable[[float], None]) -> Trained:
        """Train from `state` on `data`, as the head of this file says. The metric `loss` is the last epoch's mean.

        Raises:
            TaskError: `state` does not fit the model, there are no examples, or the loss is no longer finite.
        """
        num_examples = self.num_examples(data)
        model = self._loaded(state).train()
        optimizer = self.make_optimizer(model, spec)
        proximal = _Proximal(model, spec.proximal_mu)
        tell = Paced(progress)
        order = torch.Generator().manual_seed(spec.seed)
        loss, num_steps = 0.0, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            for epoch in range(spec.local_epochs):
                batches = _draw_batches(num_examples, spec.batch_size, order, join_lone=_has_batch_norm(model))
                if spec.max_steps:
                    batches = batches[: spec.max_steps - num_steps]
                if not batches:
                    break
                num_steps += len(batches)
                num_drawn = sum(map(len, batches))
                loss = 0.0
                for num_done, (inputs, targets) in enumerate(_take(data, batches), start=1):
                    optimizer.zero_grad()
                    batch_loss = self.loss(model(self.prepare(inputs, training=True)), targets)
                    torch.autograd.backward(batch_loss)
                    proximal.add()
                    optimizer.step()
                    loss += batch_loss.item() * len(targets) / num_drawn
                    tell((epoch + num_done / len(batches)) / spec.local_epochs)
                self._check_finite(loss, epoch, spec)
        optimizer.zero_grad()  # a warm model at rest needs no gradients
        progress(1.0)
        return Trained(state=state_of(model), num_examples=num_examples, metrics={"loss": loss}, num_steps=num_steps)

    def evaluate(self, state: State, data: Data) -> Score:
        """Mean loss, and `accuracy` where targets are classes (integers, with one output a class in dimension 1).

        Raises:
            TaskError: `state` does not fit the model, or there are no examples.
        """
        num_examples = self.num_examples(data)
        loss, hits, is_classification = 0.0, 0.0, True
        for outputs, targets in self._outputs(state, data):
            share = len(targets) / num_examples
            loss += self.loss(outputs, targets).item() * share
            is_classification = is_classification and _are_classes(outputs, targets)
            if is_classification:
                # Counted, and divided once: equal numbers of hits are equal accuracies to the bit, and no later tie is a best.
                hits += (outputs.argmax(dim=1) == targets).sum().item() / (targets.numel() // len(targets))
        metrics = {"accuracy": hits / num_examples} if is_classification else {}
        return Score(num_examples=num_examples, loss=loss, metrics=metrics)

    def accuracy_by_label(self, state: State, data: Data) -> dict[int, float]:
        """The accuracy, 0 to 1, over the examples of each label that occurs, in order of label.

        Raises:
            TaskError: the targets are no classes, one an example. Also as `evaluate`.
        """
        self.num_examples(data)
        all_targets, all_hits = [], []
        for outputs, targets in self._outputs(state, data):
            if targets.ndim != 1 or not _are_classes(outputs, targets):
                raise TaskError(
                    f"task {self.name}: outputs {tuple(outputs.shape)} for targets {tuple(targets.shape)} {targets.dtype}: "
                    "accuracy by label needs one integer label an example"
                )
            all_targets.append(targets)
            all_hits.append(outputs.argmax(dim=1) == targets)
        labels, hits = torch.cat(all_targets), torch.cat(all_hits).double()
        return {label: hits[labels == label].mean().item() for label in sorted(set(labels.tolist()))}

    @cached_property
    def _model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            return self.build_model()

    def _loaded(self, state: State) -> nn.Module:
        load_state(self._model, state)
        return self._model

    @torch.no_grad()
    def _outputs(self, state: State, data: Data) -> Iterator[tuple[Tensor, Tensor]]:
        model = self._loaded(state).eval()
        for inputs, targets in _in_order(data, EVALUATION_BATCH):
            yield model(self.prepare(inputs, training=False)), targets

    def _check_finite(self, loss: float, epoch: int, spec: TrainSpec) -> None:
        if not math.isfinite(loss):
            raise TaskError(
                f"task {self.name}: the loss is {loss} in epoch {epoch + 1} of {spec.local_epochs}: training diverged. "
                f"Lower the learning rate ({spec.learning_rate:g}) or look for non-finite inputs."
            )


def state_of(model: nn.Module) -> dict[str, NDArray[Any]]:
    """A model's state dictionary as arrays of their own, in its order.

    Raises:
        TaskError: an entry is no tensor, or of a type that does not travel.
    """
    state = {}
    for name, entry in model.state_dict().items():
        if not isinstance(entry, Tensor):
            raise TaskError(
                f"entry {name} of the state dictionary is of type {type(entry).__name__}: expected a tensor"
            )
        tensor = entry.detach()
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.float()
        if tensor.dtype not in _NUMPY_TYPES:
            raise TaskError(
                f"entry {name} of the state dictionary is of {tensor.dtype}: expected floating point, an integer type or "
                "bool; register a buffer that need not travel with persistent=False"
            )
        state[name] = np.array(tensor.cpu().numpy())
    return state


def load_state(model: nn.Module, state: State) -> None:
    """Copy arrays into a model. They may be read-only, and are not kept.

    Raises:
        TaskError: names or shapes are not exactly the model's.
    """
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise TaskError(f"the state does not fit the task's model: {' '.join(str(error).split())}") from None


class Paced:
    """Hands on a fraction at most once in `PROGRESS_INTERVAL_S`."""

    def __init__(self, progress: Callable[[float], None]) -> None:
        self._progress = progress
        self._next = time.monotonic() + PROGRESS_INTERVAL_S

    def __call__(self, fraction: float) -> None:
        """So far along, 0 to 1."""
        now = time.monotonic()
        if now >= self._next and fraction < 1:
            self._next = now + PROGRESS_INTERVAL_S
            self._progress(fraction)


def _draw_batches(num_examples: int, batch_size: int, order: torch.Generator, *, join_lone: bool) -> list[Tensor]:
    """The batches of one epoch, each int64[size]: a permutation, cut."""
    permutation = torch.randperm(num_examples, generator=order)
    size = batch_size or num_examples
    batches = [permutation[start : start + size] for start in range(0, num_examples, size)]
    if join_lone and len(batches) > 1 and len(batches[-1]) == 1:
        # Batch normalisation has no variance of one example, and torch raises. Whether a batch of one is left over
        # hangs on how many examples each device has, so no batch size of the run could avoid it.
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def _take(data: Data, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(data, tuple):
        for batch in batches:
            yield data[0].index_select(0, batch), data[1].index_select(0, batch)
    else:
        # Its own generator: a loader draws a number at its start, which would shift the global one.
        sampler = [batch.tolist() for batch in batches]
        yield from DataLoader(data, batch_sampler=sampler, num_workers=0, generator=torch.Generator())


def _in_order(data: Data, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(data, tuple):
        inputs, targets = data
        for start in range(0, len(targets), size):
            yield inputs[start : start + size], targets[start : start + size]
    else:
        yield from DataLoader(data, batch_size=size, num_workers=0, generator=torch.Generator())


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def _are_classes(outputs: Tensor, targets: Tensor) -> bool:
    return not targets.is_floating_point() and targets.dtype != torch.bool and outputs.ndim == targets.ndim + 1
