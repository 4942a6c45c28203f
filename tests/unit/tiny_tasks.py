"""Tasks that learn nothing in no time, for tests of the processes that run tasks. The round's options say what goes wrong."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from midge.tasks.base import DataSpec, Score, State, TaskError, Trained, TrainSpec
from midge.tasks.partition import select

_LONG_S = 60.0


class TinyTask:
    """Five weights, to which training adds a half, and a counter, to which it adds one."""

    name = "tiny"

    def initial_state(self, seed: int) -> State:
        return {"w": np.arange(5, dtype=np.float32) + np.float32(seed), "n": np.array(0, np.int64)}

    def load_data(self, spec: DataSpec) -> int:
        """How many examples there are: one for part 0, two for part 1, and so on."""
        sys.stdout.write("loading\n")  # as libraries do that show what they download
        sys.stdout.flush()
        return spec.part + 1

    def num_examples(self, data: int) -> int:
        return data

    def test_data(self) -> Any | None:
        return 4

    def train(self, state: State, data: int, spec: TrainSpec, progress: Callable[[float], None]) -> Trained:
        progress(0.25)
        fault, value = str(spec.extra.get("fault", "")), spec.extra.get("value", "")
        trained = {"w": state["w"] + np.float32(0.5), "n": state["n"] + 1}
        num_examples, metrics = data, {"loss": 0.5, "seed": float(spec.seed % 1000)}
        match fault:
            case "raise":
                raise ValueError(str(value))
            case "task":
                raise TaskError("no labels: put some beside the images")
            case "memory":
                raise MemoryError
            case "disk":
                raise FileNotFoundError(2, "No such file or directory", "images.npz")
            case "unplugged":
                raise OSError("the sensor is unplugged")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stuck":
                time.sleep(_LONG_S)
            case "slow":  # but it lets go of what is cancelled
                for step in range(int(_LONG_S / 0.01)):
                    time.sleep(0.01)
                    progress(step / 6000)
            case "wider":
                trained["w"] = np.zeros(6, np.float32)
            case "nobody":
                num_examples = 0
            case "numpy":
                num_examples = np.int64(data)
                metrics = {"loss": np.float32(0.5), "accuracy": np.float64(0.25), "norm": np.float32("inf")}
                for fraction in (np.float32(0.5), np.float64(7.0), float("nan"), -1.0):
                    progress(fraction)
            case "metrics":
                metrics = {"loss": float("nan"), "huge": 1e301, "low": -float("inf"), "x" * 100: 1.0, "good": -1e300}
            case "many":
                metrics = {f"accuracy of label {label}": 1.0 for label in range(1000)}
            case "not finite":
                trained["w"] = np.full(5, np.nan, np.float32)
        return Trained(state=trained, num_examples=num_examples, metrics=metrics)

    def evaluate(self, state: State, data: int) -> Score:
        """The mean weight is the loss."""
        loss = float(state["w"].mean())
        return Score(num_examples=data, loss=loss, metrics={"accuracy": 0.75, "worst": float("nan")})


class DataLessTask(TinyTask):
    """Its data are missing, on agents and on the coordinator."""

    name = "dataless"

    def load_data(self, spec: DataSpec) -> int:
        raise TaskError(f"no examples in {spec.data_dir}: put some there")

    def test_data(self) -> Any | None:
        return None


class FaultyDataTask(TinyTask):
    """Loading its data raises something."""

    def __init__(self, name: str, error: BaseException) -> None:
        self.name = name
        self._error = error

    def load_data(self, spec: DataSpec) -> int:
        raise self._error


class UnfedTask(TinyTask):
    """It has data, and no example in them."""

    name = "unfed"

    def num_examples(self, data: int) -> int:
        return 0


class LateTask(TinyTask):
    """Its data are there the second time."""

    name = "late"
    num_loads = 0

    def load_data(self, spec: DataSpec) -> int:
        self.num_loads += 1
        if self.num_loads == 1:
            raise TaskError("not yet")
        return super().load_data(spec)


class LabelledTask(TinyTask):
    """Sixty examples of three numbers each, with three labels in turn."""

    name = "labelled"
    label_names = ("cat", "dog", "cow")

    def load_data(self, spec: DataSpec) -> Any:
        sys.stdout.write("loading\n")
        labels = np.arange(60) % 3
        mine = select(labels, spec)
        return np.zeros((len(mine), 3)), labels[mine]

    def num_examples(self, data: Any) -> int:
        return len(data[1])

    def test_data(self) -> Any | None:
        return np.zeros((6, 3)), np.arange(6) % 3


class OnDiskTask(TinyTask):
    """Its three test examples are on the coordinator's disk once they are downloaded."""

    name = "on_disk"

    def load_test_data(self, spec: DataSpec) -> int:
        if not spec.download:
            raise TaskError(f"no test data in {spec.data_dir}: put some there")
        return 3


class LavishTask(TinyTask):
    """It reports an accuracy for each of a thousand labels, in numbers of NumPy."""

    name = "lavish"

    def evaluate(self, state: State, data: int) -> Score:
        metrics = {f"accuracy of label {label}": np.float32(0.5) for label in range(1000)}
        return Score(num_examples=np.int64(data), loss=np.float32(0.25), metrics=metrics)


class InfiniteTask(TinyTask):
    """Its loss is infinite, and one of NumPy's."""

    name = "infinite"

    def evaluate(self, state: State, data: int) -> Score:
        return Score(num_examples=data, loss=np.float32("inf"), metrics={"accuracy": np.float32("-inf")})


class EmptyTask(TinyTask):
    """It evaluates on no examples at all."""

    name = "empty"

    def evaluate(self, state: State, data: int) -> Score:
        return Score(num_examples=0, loss=0.0)


class DivergedTask(TinyTask):
    """Its loss is not finite; nor can it make a model."""

    name = "diverged"

    def initial_state(self, seed: int) -> State:
        raise ValueError("no such network")

    def evaluate(self, state: State, data: int) -> Score:
        return Score(num_examples=data, loss=float("nan"))


class FollowingTask(TinyTask):
    """It notes what it is told, in order."""

    name = "following"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def begin_round(self, spec: TrainSpec) -> None:
        self.seen.append(f"round {spec.round_num}, width {spec.extra['width']}")

    def evaluate(self, state: State, data: int) -> Score:
        self.seen.append("evaluate")
        return super().evaluate(state, data)

    def train(self, state: State, data: int, spec: TrainSpec, progress: Callable[[float], None]) -> Trained:
        self.seen.append(f"train in round {spec.round_num}")
        return super().train(state, data, spec, progress)


class DeadlyTask(TinyTask):
    """Whoever evaluates it is killed."""

    name = "deadly"

    def evaluate(self, state: State, data: int) -> Score:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class EndlessTask(TinyTask):
    """Its evaluation does not come to an end."""

    name = "endless"

    def evaluate(self, state: State, data: int) -> Score:
        time.sleep(_LONG_S)
        raise AssertionError


tiny = TinyTask()
dataless = DataLessTask()
unfed = UnfedTask()
clumsy = FaultyDataTask("clumsy", KeyError("label"))
unplugged = FaultyDataTask("unplugged", FileNotFoundError(2, "No such file or directory", "images.npz"))
greedy = FaultyDataTask("greedy", MemoryError())
late = LateTask()
labelled = LabelledTask()
on_disk = OnDiskTask()
lavish = LavishTask()
infinite = InfiniteTask()
empty = EmptyTask()
diverged = DivergedTask()
following = FollowingTask()
deadly = DeadlyTask()
endless = EndlessTask()
