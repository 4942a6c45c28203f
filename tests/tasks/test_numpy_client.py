"""A class of the shape of Flower's NumPyClient, written only from what scenario 4 says of one, runs unchanged."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from midge.tasks.base import DataSpec, FollowsRounds, ShowsModel, TaskError, TrainSpec
from midge.tasks.flatten import layout_of, state_to_vector, vector_to_state
from midge.tasks.inspection import labels_of
from midge.tasks.numpy_client import numpy_client_task
from midge.tasks.registry import _lacks
from midge.wire.errors import LayoutError

ROOT = Path(__file__).parents[2]
SPEC = TrainSpec(
    local_epochs=2, batch_size=4, learning_rate=0.05, momentum=0.5, seed=7, round_num=3, extra={"width": 9}
)
INPUTS = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 3


class FlowerClient:
    """As a user of the tutorial has it: everything is in the class, and the class is all there is."""

    def __init__(self):
        self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))

    def get_parameters(self, config):
        return [value.cpu().numpy() for _, value in self.net.state_dict().items()]

    def set_parameters(self, parameters):
        pairs = zip(self.net.state_dict().keys(), parameters, strict=True)
        self.net.load_state_dict(OrderedDict({name: torch.tensor(value) for name, value in pairs}), strict=True)

    def fit(self, parameters, config):
        self.set_parameters(parameters)
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.net.train()
        for _ in range(config["local_epochs"]):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.net(INPUTS + 0.1 * torch.randn(24, 4)), LABELS)
            loss.backward()
            optimizer.step()
        return self.get_parameters(config={}), len(INPUTS), {"train_loss": loss.item(), "phase": "done"}

    def evaluate(self, parameters, config):
        self.set_parameters(parameters)
        self.net.eval()
        with torch.no_grad():
            outputs = self.net(INPUTS)
        accuracy = (outputs.argmax(1) == LABELS).float().mean().item()
        return float(nn.functional.cross_entropy(outputs, LABELS)), len(INPUTS), {"accuracy": accuracy}


class Mean:
    """One without torch and without set_parameters: its parameters are a mean in float64, a count, and a flag."""

    seen: ClassVar[list] = []

    def __init__(self, values=(1.0, 2.0, 6.0)):
        self.values = np.array(values)

    def get_parameters(self, config):
        return [np.float64(0.0), np.zeros(2, np.int32), np.array([True]), np.zeros((2, 1), np.float32)]

    def fit(self, parameters, config):
        mean, count, flag, _ = parameters
        count += 1  # in place: what comes is the client's own
        return [mean + 0.5 * (self.values.mean() - mean), count, flag, np.ones((2, 1))], len(self.values), {}

    def evaluate(self, parameters, config):
        type(self).seen.append(dict(config))
        return np.float32(abs(parameters[0] - self.values.mean())), np.int64(3), {"worst": np.float64(6), "who": "me"}


def mute(fraction: float) -> None:
    pass


def trained(task, spec=SPEC, seed=1):
    return task.train(task.initial_state(seed), task.load_data(DataSpec()), spec, mute)


def journey(state):
    """A state as it arrives: over the flat vector and the counters, and read-only."""
    layout = layout_of(state)
    vector, counters = state_to_vector(state, layout)
    vector.flags.writeable = False
    return vector_to_state(vector, counters, layout)


# What it does.


def test_it_is_a_task_and_is_called_what_the_class_is_called():
    task = numpy_client_task(FlowerClient)
    assert _lacks(task) == []
    assert isinstance(task, FollowsRounds)
    assert isinstance(task, ShowsModel)
    assert task.name == "FlowerClient"
    assert numpy_client_task(FlowerClient()).name == "FlowerClient"
    assert numpy_client_task(lambda: FlowerClient()).name == "client"  # noqa: PLW0108
    assert numpy_client_task(FlowerClient, name="mine").name == "mine"


def test_a_fit_is_the_client_s_own_to_the_bit_and_repeats():
    client = FlowerClient()
    task = numpy_client_task(client)
    state = task.initial_state(0)
    by_hand = FlowerClient()
    torch.manual_seed(SPEC.seed)
    expected, num_examples, metrics = by_hand.fit(list(state.values()), {"local_epochs": 2})
    data = task.load_data(DataSpec())
    for _ in range(2):
        result = task.train(journey(state), data, SPEC, mute)
        assert (result.num_examples, result.metrics) == (num_examples, {"train_loss": metrics["train_loss"]})
        assert list(result.state) == [f"parameters.{index}" for index in range(9)]
        for array, own in zip(result.state.values(), expected, strict=True):
            assert array.dtype == own.dtype
            np.testing.assert_array_equal(array, own)
    assert result.state["parameters.6"] == 2  # num_batches_tracked, int64 without a dimension
    assert result.state["parameters.6"].dtype == np.int64


def test_the_initial_model_is_the_seed_s():
    torch.manual_seed(5)
    expected = FlowerClient().get_parameters({})
    for array, own in zip(numpy_client_task(FlowerClient).initial_state(5).values(), expected, strict=True):
        np.testing.assert_array_equal(array, own)


def test_types_and_shapes_survive_the_journey_and_float64_has_the_values_of_float32():
    task = numpy_client_task(Mean)
    state = journey(task.initial_state(0))
    result = task.train(state, task.load_data(DataSpec()), SPEC, mute).state
    assert [(array.shape, array.dtype.name) for array in result.values()] == [
        ((), "float64"), ((2,), "int32"), ((1,), "bool"), ((2, 1), "float32")
    ]  # fmt: skip
    assert result["parameters.0"] == 1.5  # half of the mean, 3
    assert result["parameters.1"].tolist() == [1, 1]
    third = journey({"third": np.array(1 / 3)})["third"]
    assert (third.dtype, float(third)) == (np.float64, float(np.float32(1 / 3)))
    assert state["parameters.1"].tolist() == [0, 0]  # what was given is not changed


def test_an_evaluation_is_the_client_s_own_and_metrics_that_are_no_numbers_stay_behind():
    task = numpy_client_task(FlowerClient)
    state = task.initial_state(1)
    score = task.evaluate(journey(state), task.load_data(DataSpec()))
    loss, num_examples, metrics = FlowerClient().evaluate(list(state.values()), {})
    assert (score.loss, score.num_examples, score.metrics) == (loss, num_examples, metrics)
    task = numpy_client_task(Mean)
    score = task.evaluate(task.initial_state(0), task.load_data(DataSpec()))
    assert (score.loss, score.num_examples, score.metrics) == (3.0, 3, {"worst": 6.0})


def test_the_dictionary_carries_the_round_to_fit_and_to_evaluate():
    seen = []

    class Asking(Mean):
        def fit(self, parameters, config):
            seen.append(config)
            return super().fit(parameters, config)

        def evaluate(self, parameters, config):
            seen.append(config)
            return super().evaluate(parameters, config)

    task = numpy_client_task(Asking)
    task.begin_round(SPEC)
    task.evaluate(task.initial_state(0), task.load_data(DataSpec()))
    trained(task)
    told = {
        "server_round": 3, "round_num": 3, "local_epochs": 2, "batch_size": 4, "learning_rate": 0.05, "momentum": 0.5,
        "seed": 7, "width": 9,
    }  # fmt: skip
    assert seen == [told, told]


def test_get_parameters_may_take_no_dictionary():
    class Early(Mean):
        def get_parameters(self):
            return super().get_parameters({})

    assert len(numpy_client_task(Early).initial_state(0)) == 4


def test_a_class_without_evaluate_trains_and_has_no_score():
    class Half:
        def get_parameters(self, config):
            return [np.zeros(1, np.float32)]

        def fit(self, parameters, config):
            return parameters, 1, {}

    task = numpy_client_task(Half)
    assert task.evaluate(task.initial_state(0), task.load_data(DataSpec())).num_examples == 0
    assert trained(task).num_examples == 1
    with pytest.raises(TaskError, match="test_client is a Half, which has no evaluate"):
        numpy_client_task(Half, test_client=Half).test_data()


def test_the_same_seeds_give_the_same_fit_and_the_generators_go_on_where_they_were():
    class Noisy(Mean):
        def fit(self, parameters, config):
            noise = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
            return [np.float64(noise), *parameters[1:]], 3, {}

    task = numpy_client_task(Noisy)
    before = random.getstate()
    first, again = (float(trained(task).state["parameters.0"]) for _ in range(2))
    assert first == again
    assert first != float(trained(task, TrainSpec(seed=8)).state["parameters.0"])
    assert random.getstate() == before


# How it is made.


def test_a_function_may_take_the_agent_s_part_and_a_client_is_made_once_for_an_agent():
    made = []

    def make(partition_id, num_partitions):
        made.append((partition_id, num_partitions))
        return Mean([partition_id] * 2)

    task = numpy_client_task(make)
    data = task.load_data(DataSpec(partition="iid", part=4, num_parts=5))
    assert task.train(task.initial_state(0), data, SPEC, mute).state["parameters.0"] == 2
    assert task.model_state(data)["parameters.3"].shape == (2, 1)
    assert made == [(4, 5), (0, 1)]
    spec_task = numpy_client_task(lambda spec: Mean([spec.part]))
    assert spec_task.load_data(DataSpec(part=2, num_parts=3)).client.values == [2]


def test_a_share_that_nobody_takes_is_refused_rather_than_ignored():
    with pytest.raises(
        TaskError, match="the client loads its data by itself: let a function make it from the DataSpec"
    ):
        numpy_client_task(Mean).load_data(DataSpec(classes=(1,)))


def test_where_the_coordinator_has_no_data_the_initial_parameters_are_given():
    class Loading(Mean):
        def __init__(self):
            raise FileNotFoundError("no data here")

    task = numpy_client_task(Loading, initial_parameters=lambda: [np.zeros(3, np.float32)], names=["weight"])
    assert list(task.initial_state(0)) == ["weight"]


def test_names_of_a_network_make_an_exported_model_load_into_it():
    names = list(FlowerClient().net.state_dict())
    task = numpy_client_task(FlowerClient, names=names)
    state = trained(task).state
    FlowerClient().net.load_state_dict({name: torch.tensor(array) for name, array in state.items()}, strict=True)
    with pytest.raises(TaskError, match="2 names for 9 arrays"):
        numpy_client_task(FlowerClient, names=["a", "b"]).initial_state(0)


def test_a_client_on_the_coordinator_evaluates_there():
    assert numpy_client_task(Mean).test_data() is None
    Mean.seen.clear()
    task = numpy_client_task(Mean, test_client=lambda: Mean([4.0]))
    assert task.evaluate(task.initial_state(0), task.test_data()).loss == 4
    assert Mean.seen[0]["server_round"] == 0


def test_how_many_examples_a_client_has_is_seen_where_it_keeps_them_in_the_usual_place():
    class Holding(Mean):
        trainloader = torch.utils.data.DataLoader(range(17), batch_size=5)

    class HoldingArrays(Mean):
        x_train = np.zeros((6, 2))

    counts = [
        task.num_examples(task.load_data(DataSpec())) for task in map(numpy_client_task, (Holding, HoldingArrays, Mean))
    ]
    assert counts == [17, 6, 1]


def test_the_labels_of_a_client_s_data_are_seen_where_they_can_be_read():
    class Labelled(Mean):
        trainloader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(INPUTS, LABELS), batch_size=5)

    data = numpy_client_task(Labelled).load_data(DataSpec())
    assert labels_of(data).tolist() == [0, 1, 2] * 8
    assert numpy_client_task(Mean).load_data(DataSpec()).labels is None


# What is wrong is said.


def returning(method, value):
    return type("Wrong", (Mean,), {method: lambda *_: value})


@pytest.mark.parametrize(
    ("method", "value", "words"),
    [
        ("fit", None, r"fit returned a NoneType: expected \(parameters, num_examples, metrics\)"),
        ("fit", ([], 1), "fit returned 2 values"),
        ("fit", ([], 1, {}), "fit returned 0 arrays: expected 4"),
        ("fit", ({}, 1, {}), "fit gave a dict: expected a list of NumPy arrays"),
        ("fit", ([], 1.5, {}), "fit returned 1.5 as its num_examples: expected a whole number"),
        ("fit", ([], 1, [3]), "fit returned a list as its metrics: expected a dict"),
        (
            "fit",
            ([0.0, np.zeros(3, np.int32), np.array([True]), np.ones((2, 1))], 1, {}),
            r"fit returned parameters.1 as \(3,\) int32: expected \(2,\) int32, as it was given",
        ),
        (
            "fit",
            ([0.0, np.zeros(2), np.array([True]), np.ones((2, 1))], 1, {}),
            r"fit returned parameters.1 as \(2,\) float64: expected \(2,\) int32",
        ),
        ("evaluate", (1.0, {}), r"evaluate returned 2 values: expected \(loss, num_examples, metrics\)"),
        ("evaluate", ("low", 1, {}), "evaluate returned a str as its loss"),
    ],
)
def test_a_return_value_of_another_shape_is_shown_beside_the_expected_one(method, value, words):
    task = numpy_client_task(returning(method, value))
    state, data = task.initial_state(0), task.load_data(DataSpec())
    with pytest.raises(TaskError, match=words):
        task.train(state, data, SPEC, mute) if method == "fit" else task.evaluate(state, data)


def test_what_is_no_client_is_told_what_it_lacks():
    with pytest.raises(TaskError, match=r"nobody can say what trainloader should be: give a default"):
        numpy_client_task(type("Needy", (Mean,), {"__init__": lambda self, trainloader: None}))
    with pytest.raises(TaskError, match="client is a int: expected a class"):
        numpy_client_task(3)
    with pytest.raises(TaskError, match="a dict has no get_parameters and no fit"):
        numpy_client_task(dict).initial_state(0)


def test_arrays_that_cannot_travel_are_named():
    state = numpy_client_task(returning("get_parameters", [np.zeros(2, np.complex64)])).initial_state(0)
    with pytest.raises(LayoutError, match=r"parameters.0 \(2,\) is complex64"):
        layout_of(state)


def test_neither_flower_nor_torch_is_imported():
    code = "import sys; import midge.tasks.numpy_client; sys.exit(bool({'flwr', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
