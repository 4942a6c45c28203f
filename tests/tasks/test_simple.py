"""The shortest task: what is named is used, at its place, and everything else is a TorchTask's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from midge.tasks.base import DataSpec, TaskError, TrainSpec
from midge.tasks.registry import _lacks
from midge.tasks.simple import SimpleTask
from midge.tasks.torch_task import TorchTask, state_of

SPEC = TrainSpec(local_epochs=3, batch_size=4, learning_rate=0.1, momentum=0.5, seed=7)


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 3))


def examples(num=12):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(num, 4, generator=generator), torch.arange(num) % 3)


class Written(TorchTask):
    """The same task, as a class."""

    def build_model(self):
        return Net()

    def load_data(self, spec):
        return examples()


def trained(task):
    return task.train(task.initial_state(1), task.load_data(DataSpec()), SPEC, lambda _: None)


def assert_equal(one, other):
    assert list(one) == list(other)
    for name, array in other.items():
        np.testing.assert_array_equal(one[name], array)


def test_a_class_is_called_by_its_name_unless_it_has_another():
    class Named(Written):
        name = "thermostat"

    class Inherits(Named):
        pass

    assert (Written.name, Named.name, Inherits.name) == ("Written", "thermostat", "thermostat")
    assert _lacks(Written) == []


def test_the_shortest_task_trains_as_the_class_does_to_the_bit():
    task = SimpleTask(model=Net, train_data=examples())
    assert _lacks(task) == []
    assert task.name == "Net"
    assert_equal(trained(task).state, trained(Written()).state)
    assert task.test_data() is None


def test_loss_and_optimizer_are_the_ones_given():
    task = SimpleTask(
        model=Net, train_data=examples(), loss=nn.MultiMarginLoss(), optimizer=torch.optim.Adam, name="mine"
    )
    assert task.name == "mine"

    class ByHand(Written):
        def loss(self, outputs, targets):
            return nn.functional.multi_margin_loss(outputs, targets)

        def make_optimizer(self, model, spec):
            return torch.optim.Adam(model.parameters(), lr=spec.learning_rate)

    assert_equal(trained(task).state, trained(ByHand()).state)


def test_training_data_are_loaded_by_agents_alone_and_test_data_by_the_coordinator():
    def never():
        raise AssertionError("loaded")

    on_coordinator = SimpleTask(model=Net, train_data=never, test_data=examples)
    state = on_coordinator.initial_state(0)
    assert on_coordinator.evaluate(state, on_coordinator.test_data()).num_examples == 12
    on_agent = SimpleTask(model=Net, train_data=examples, test_data=never)
    assert on_agent.num_examples(on_agent.load_data(DataSpec())) == 12


def test_the_agent_s_options_take_its_share():
    task = SimpleTask(model=Net, train_data=examples)
    data = task.load_data(DataSpec(classes=(0, 2)))
    assert [data[index][1].item() for index in range(len(data))] == [0, 2] * 4
    pair = SimpleTask(model=Net, train_data=lambda: examples().tensors)
    assert pair.load_data(DataSpec(classes=(1,)))[1].tolist() == [1] * 4
    assert pair.load_data(DataSpec(classes=(1,)))[0].shape == (4, 4)


def test_a_function_that_takes_the_spec_deals_for_itself(tmp_path):
    seen = []

    def mine(spec):
        seen.append(spec)
        return examples(2)

    spec = DataSpec(classes=(9,), data_dir=tmp_path)
    assert len(SimpleTask(model=Net, train_data=mine).load_data(spec)) == 2
    assert seen == [spec]


def test_test_data_may_be_told_where_they_lie(tmp_path):
    def load(data_dir=None):
        return examples(2 if data_dir is None else 3)

    task = SimpleTask(model=Net, train_data=examples(), test_data=load)
    assert len(task.test_data()) == 2
    assert len(task.load_test_data(DataSpec(data_dir=tmp_path))) == 3


def test_a_model_made_by_a_function_has_its_name_and_the_seed_s_weights():
    def small():
        return nn.Linear(2, 1)

    task = SimpleTask(model=small, train_data=examples)
    assert task.name == "small"
    torch.manual_seed(3)
    assert_equal(task.initial_state(3), state_of(small()))


def test_a_parameter_that_nobody_can_fill_is_found_when_the_task_is_made():
    with pytest.raises(TaskError, match=r"train_data\(root\): nobody can say what root should be"):
        SimpleTask(model=Net, train_data=lambda root: None)
