"""Small tasks for federations of real processes: NumPy alone, so that a worker is up, and a round done, in a moment.

    linear      least squares of five parameters on a few examples: everything about it can be computed in a test
    wide        1.2 MB in many frames, and an integer buffer
    batch_norm  a torch model with batch normalisation
    echo        a client as Flower has them, which tells what it was told

An agent's data directory is the test's remote control of that agent:

    trainings   gains a line when a training begins: the digest of what it starts from
    hold        holds the number of a training, counted from 1, which waits for as long as the file exists
    fault       one word: what is to go wrong, see `_misbehave`
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midge.tasks.base import DataSpec, Score, State, TaskError, Trained, TrainSpec
from midge.tasks.numpy_client import numpy_client_task

NUM_FEATURES = 4
NUM_WIDE = 300_000
_HELD_S = 60.0
_SLOW_S = 5.0


@dataclass(frozen=True)
class Examples:
    """An agent's data: inputs float64[n, 4] and targets float64[n]."""

    inputs: NDArray[np.float64]
    targets: NDArray[np.float64]
    part: int
    control: Path | None


class LinearTask:
    """Least squares: weight float32[1, 4] and bias float32[1], as in `torch.nn.Linear(4, 1)`."""

    name = "linear"

    def initial_state(self, seed: int) -> State:
        weight = np.random.default_rng(seed).standard_normal((1, NUM_FEATURES), dtype=np.float32)
        return {"weight": weight, "bias": np.zeros(1, np.float32)}

    def load_data(self, spec: DataSpec) -> Examples:
        """4, 7, 10, ... examples for part 0, 1, 2, ...: no two agents weigh the same."""
        if _fault(spec.data_dir) == "no-data":
            raise TaskError(f"no examples in {spec.data_dir}: put some there")
        if _fault(spec.data_dir) == "slow-data":
            time.sleep(_HELD_S)
        rng = np.random.default_rng([spec.seed, spec.part])
        inputs = rng.standard_normal((4 + 3 * spec.part, NUM_FEATURES))
        targets = inputs.sum(axis=1) + spec.part + 0.1 * rng.standard_normal(len(inputs))
        return Examples(inputs, targets, spec.part, spec.data_dir)

    def num_examples(self, data: Examples) -> int:
        return len(data.targets)

    def test_data(self) -> Any | None:
        return None

    def train(self, state: State, data: Examples, spec: TrainSpec, progress: Callable[[float], None]) -> Trained:
        _begin(state, data.control, progress)
        progress(0.5)
        trained = Trained(state=self.fit(state, data, spec), num_examples=self.num_examples(data))
        return _misbehave(trained, _fault(data.control))

    def fit(self, state: State, data: Examples, spec: TrainSpec) -> State:
        """Gradient descent in float64, rounded at the end. No BLAS, whose sums depend on the number of threads."""
        weight, bias = state["weight"].astype(np.float64), state["bias"].astype(np.float64)
        for batch in _batches(len(data.targets), spec):
            inputs = data.inputs[batch]
            residuals = (inputs * weight).sum(axis=1) + bias - data.targets[batch]
            weight = weight - spec.learning_rate * 2 * (inputs * residuals[:, None]).mean(axis=0)
            bias = bias - spec.learning_rate * 2 * residuals.mean()
        return {"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)}

    def evaluate(self, state: State, data: Examples) -> Score:
        residuals = (data.inputs * state["weight"]).sum(axis=1) + state["bias"] - data.targets
        return Score(num_examples=len(data.targets), loss=float((residuals**2).mean()))


class TestedLinearTask(LinearTask):
    """The same, with data for the coordinator to test on."""

    __test__ = False

    name = "tested-linear"

    def test_data(self) -> Examples:
        return self.load_data(DataSpec(part=9))


class AlikeLinearTask(LinearTask):
    """The same, where all parts follow one law, and an agent may send ten times the opposite of what it learned."""

    name = "alike-linear"

    def load_data(self, spec: DataSpec) -> Examples:
        data = super().load_data(spec)
        return Examples(data.inputs, data.targets - spec.part, data.part, data.control)

    def test_data(self) -> Examples:
        return self.load_data(DataSpec(part=9))

    def train(self, state: State, data: Examples, spec: TrainSpec, progress: Callable[[float], None]) -> Trained:
        trained = super().train(state, data, spec, progress)
        if _fault(data.control) != "flip":
            return trained
        flipped = {name: before - 10 * (trained.state[name] - before) for name, before in state.items()}
        return Trained(state=flipped, num_examples=trained.num_examples)


class WideTask(LinearTask):
    """A vector that each agent halves and moves by its part, and a counter that each raises by its part + 1."""

    name = "wide"

    def initial_state(self, seed: int) -> State:
        vector = np.random.default_rng(seed).standard_normal(NUM_WIDE, dtype=np.float32)
        return {"vector": vector, "steps": np.zeros(1, np.int64)}

    def fit(self, state: State, data: Examples, spec: TrainSpec) -> State:
        return {
            "vector": state["vector"] * np.float32(0.5) + np.float32(data.part),
            "steps": state["steps"] + (data.part + 1),
        }

    def evaluate(self, state: State, data: Examples) -> Score:
        return Score(num_examples=self.num_examples(data), loss=float(np.abs(state["vector"]).mean()))


class OneClassTask(LinearTask):
    """Its data are all of class 1."""

    name = "one_class"

    def load_data(self, spec: DataSpec) -> Any:
        return np.zeros((5, NUM_FEATURES)), np.ones(5, np.int64)

    def num_examples(self, data: Any) -> int:
        return len(data[1])


def batch_norm() -> Any:
    """A torch model with batch normalisation, and a buffer of float64. torch is imported for those alone who ask for it."""
    import torch
    from torch import nn

    from midge.tasks.torch_task import TorchTask

    class BatchNormTask(TorchTask):
        name = "batch_norm"

        def build_model(self) -> nn.Module:
            model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
            model.register_buffer("scale", torch.full((2,), 0.5, dtype=torch.float64))
            return model

        def load_data(self, spec: DataSpec) -> tuple[torch.Tensor, torch.Tensor]:
            """12 examples for part 0, 24 for part 1."""
            generator = torch.Generator().manual_seed(spec.part)
            inputs = torch.randn(12 * (spec.part + 1), 6, generator=generator) + spec.part
            return inputs, torch.arange(len(inputs)) % 3

    return BatchNormTask()


class EchoClient:
    """Of the shape of Flower's NumPyClient: it halves a vector, counts, and tells of what it was told."""

    def get_parameters(self, config):
        return [np.full((2, 2), 8, np.float32), np.zeros((), np.int64)]

    def fit(self, parameters, config):
        vector, count = parameters
        told = {key: config[key] for key in ("server_round", "local_epochs", "learning_rate", "width")}
        return [vector / 2, count + 1], 5, {**told, "mood": "fine"}

    def evaluate(self, parameters, config):
        return float(parameters[0].mean()), 7, {"told_of_round": config["server_round"], "accuracy": 0.5}


linear = LinearTask()
wide = WideTask()
one_class = OneClassTask()
echo = numpy_client_task(EchoClient)


def fingerprint(state: State) -> str:
    """A short digest of a state's bytes, as a line of `trainings` has it."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in state.values())).hexdigest()[:16]


def _batches(num_examples: int, spec: TrainSpec) -> Iterator[NDArray[np.int64]]:
    rng = np.random.default_rng(spec.seed)
    size = spec.batch_size or num_examples
    for _ in range(spec.local_epochs):
        order = rng.permutation(num_examples)
        for start in range(0, num_examples, size):
            yield order[start : start + size]


def _begin(state: State, control: Path | None, progress: Callable[[float], None]) -> None:
    """Say that a training begins, and wait where the test wants that."""
    if control is None:
        return
    with (control / "trainings").open("a") as file:
        file.write(fingerprint(state) + "\n")
    number = str(len((control / "trainings").read_text().splitlines()))
    patience = time.monotonic() + _HELD_S
    while _read(control / "hold") == number and time.monotonic() < patience:
        progress(0.1)
        time.sleep(0.02)


def _fault(control: Path | None) -> str:
    return "" if control is None else _read(control / "fault")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _misbehave(trained: Trained, fault: str) -> Trained:
    state = dict(trained.state)
    match fault:
        case "raise":
            raise ValueError("the sensor [/red] is broken")
        case "memory":
            np.ones(2**28)  # 2 GiB: the agent is started with less
        case "nan":
            state["weight"] = np.full_like(state["weight"], np.nan)
        case "far":
            state["weight"] = state["weight"] + np.float32(1000)
        case "wider":
            state["weight"] = np.zeros((1, NUM_FEATURES + 1), np.float32)
        case "boast":
            return Trained(state=state, num_examples=10**6)
        case "slow":
            time.sleep(_SLOW_S)
        case "burn":
            until = time.monotonic() + _SLOW_S
            while time.monotonic() < until:
                pass
        case _:
            return trained
    return Trained(state=state, num_examples=trained.num_examples)
