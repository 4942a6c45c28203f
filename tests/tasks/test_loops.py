"""A user's own training loop as a task: it is called as it stands, and what it does is what plain torch does."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset, WeightedRandomSampler

from midge.tasks.base import DataSpec, FollowsRounds, TaskError, TrainSpec
from midge.tasks.loops import LoopTask, num_examples_of
from midge.tasks.registry import _lacks
from midge.tasks.torch_task import state_of

# The user's file, as it was before they knew of Midge.


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.fc(self.drop(x))


def examples(num=30):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(num, 4, generator=generator), torch.arange(num) % 3)


def load_data():
    return DataLoader(examples(), batch_size=8, shuffle=True), DataLoader(examples(12), batch_size=5)


def train(net, trainloader, epochs, device):
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    net.train()
    for _ in range(epochs):
        for images, labels in trainloader:
            optimizer.zero_grad()
            criterion(net(images.to(device)), labels.to(device)).backward()
            optimizer.step()


def test_net(net, testloader, device):
    correct, loss = 0, 0.0
    net.eval()
    with torch.no_grad():
        for images, labels in testloader:
            outputs = net(images.to(device))
            loss += nn.functional.cross_entropy(outputs, labels, reduction="sum").item()
            correct += (outputs.argmax(1) == labels).sum().item()
    return loss / len(testloader.dataset), correct / len(testloader.dataset)


user_test = test_net
test_net.__test__ = False

SPEC = TrainSpec(local_epochs=2, batch_size=7, learning_rate=0.05, momentum=0.5, seed=11, round_num=3)


def task_of(**changes) -> LoopTask:
    return LoopTask(**{"net": Net, "load_data": load_data, "train": train, "test": user_test, **changes})


def mute(fraction: float) -> None:
    pass


def trained(task: LoopTask, spec: TrainSpec = SPEC, data_spec: DataSpec | None = None):
    return task.train(task.initial_state(1), task.load_data(data_spec or DataSpec()), spec, mute)


# The task.


def test_it_is_a_task_and_is_called_what_its_network_is_called():
    assert _lacks(task_of()) == []
    assert isinstance(task_of(), FollowsRounds)
    assert task_of().name == "Net"
    assert task_of(name="mine").name == "mine"


def test_a_training_is_the_user_s_own_to_the_bit():
    torch.manual_seed(1)
    net = Net()
    torch.manual_seed(SPEC.seed)  # shuffling and dropout draw from it
    train(net, load_data()[0], epochs=2, device=torch.device("cpu"))
    result = trained(task_of())
    assert result.num_examples == 30
    assert result.metrics == {}
    for name, array in state_of(net).items():
        np.testing.assert_array_equal(result.state[name], array)


@pytest.mark.parametrize("own_generator", [False, True])
def test_the_same_round_trained_again_gives_the_same_bits_and_leaves_the_generators_alone(own_generator):
    def load():
        generator = torch.Generator().manual_seed(99) if own_generator else None
        return DataLoader(examples(), batch_size=8, shuffle=True, generator=generator)

    def noisy(net, loader, epochs):
        train(net, loader, epochs, "cpu")
        return random.random() + np.random.rand()  # noqa: NPY002

    task = task_of(load_data=load, train=noisy)
    data = task.load_data(DataSpec())
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first, again = (task.train(task.initial_state(1), data, SPEC, mute) for _ in range(2))
    np.testing.assert_array_equal(first.state["fc.weight"], again.state["fc.weight"])
    assert first.metrics == again.metrics
    other = task.train(task.initial_state(1), data, replace(SPEC, seed=12), mute)
    assert not np.array_equal(first.state["fc.weight"], other.state["fc.weight"])
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1], before[2]) == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002


def test_the_initial_model_is_the_seed_s():
    torch.manual_seed(5)
    expected = state_of(Net())
    state = task_of().initial_state(5)
    assert list(state) == ["fc.weight", "fc.bias"]
    np.testing.assert_array_equal(state["fc.weight"], expected["fc.weight"])


def test_a_network_that_exists_already_is_used_with_the_weights_that_it_has():
    net = Net()
    np.testing.assert_array_equal(task_of(net=net).initial_state(5)["fc.weight"], net.fc.weight.detach().numpy())
    assert task_of(net=net).name == "Net"


def test_the_state_given_is_not_changed():
    task = task_of()
    state = task.initial_state(1)
    kept = {name: array.copy() for name, array in state.items()}
    for array in state.values():
        array.flags.writeable = False  # as a worker hands it over
    task.train(state, task.load_data(DataSpec()), SPEC, mute)
    for name, array in kept.items():
        np.testing.assert_array_equal(state[name], array)


# What the functions are told.


def test_a_function_is_given_what_it_has_a_parameter_for_and_nothing_else():
    seen = {}

    def asking(model, data, lr, *, num_epochs, server_round, config, batch_size, momentum, seed, verbose=True):
        seen.update({name: value for name, value in locals().items() if name != "seen"})

    trained(task_of(train=asking), replace(SPEC, extra={"width": 3}))
    assert type(seen.pop("model")) is Net
    assert isinstance(seen.pop("data"), DataLoader)
    config = seen.pop("config")
    assert seen == {
        "lr": 0.05, "num_epochs": 2, "server_round": 3, "batch_size": 7, "momentum": 0.5, "seed": 11, "verbose": True
    }  # fmt: skip
    assert config == {
        "server_round": 3, "round_num": 3, "local_epochs": 2, "batch_size": 7, "learning_rate": 0.05, "momentum": 0.5,
        "seed": 11, "width": 3,
    }  # fmt: skip


def test_a_test_function_is_told_of_the_round_that_began():
    def asking(net, loader, round_num, device):
        return float(round_num)

    task = task_of(test=asking)
    data = task.load_data(DataSpec())
    assert task.evaluate(task.initial_state(0), data).loss == 0
    task.begin_round(SPEC)
    assert task.evaluate(task.initial_state(0), data).loss == 3


def test_a_parameter_that_nobody_can_fill_is_found_when_the_task_is_made():
    def needy(net, loader, criterion, epochs): ...

    with pytest.raises(
        TaskError, match=r"train\(net, loader, criterion, epochs\): nobody can say what criterion should be"
    ):
        task_of(train=needy)
    with pytest.raises(TaskError, match=r"test\(net\): expected at least 2 parameters"):
        task_of(test=lambda net: 0.0)
    with pytest.raises(TaskError, match=r"load_data\(path\): nobody can say what path should be"):
        task_of(load_data=lambda path: None)
    assert task_of(train=partial(needy, criterion=nn.CrossEntropyLoss())) is not None


@pytest.mark.parametrize(
    ("returned", "metrics"),
    [
        (None, {}),
        (0.5, {"loss": 0.5}),
        (torch.tensor(0.5), {"loss": 0.5}),
        ((0.5, np.float32(0.25)), {"loss": 0.5, "accuracy": 0.25}),
        ([0.9, 0.7, 0.5], {"loss": 0.5}),
        ([], {}),
        ({"loss": 0.5, "note": "good", "steps": 8, "history": [1, 2]}, {"loss": 0.5, "steps": 8.0}),
        ("done", {}),
    ],
)
def test_whatever_train_returns_becomes_metrics_where_it_is_numbers(returned, metrics):
    assert trained(task_of(train=lambda net, loader: returned)).metrics == metrics


def test_a_network_that_train_returns_is_the_trained_one():
    def copying(net, loader):
        better = Net()
        nn.init.ones_(better.fc.weight)
        return better

    assert trained(task_of(train=copying)).state["fc.weight"].tolist() == [[1.0] * 4] * 3


@pytest.mark.parametrize(
    ("returned", "loss", "metrics"),
    [
        ((1.5, 0.25), 1.5, {"accuracy": 0.25}),
        ([1.5, 0.25], 1.5, {"accuracy": 0.25}),
        ({"accuracy": 0.25, "loss": 1.5, "f1": 0.5}, 1.5, {"accuracy": 0.25, "f1": 0.5}),
        (1.5, 1.5, {}),
        (torch.tensor([1.5]), 1.5, {}),
    ],
)
def test_whatever_test_returns_is_a_score_over_its_own_data(returned, loss, metrics):
    task = task_of(test=lambda net, loader: returned)
    score = task.evaluate(task.initial_state(0), task.load_data(DataSpec()))
    assert (score.num_examples, score.loss, score.metrics) == (12, loss, metrics)


@pytest.mark.parametrize(
    ("returned", "shown"),
    [(None, "nothing"), ({"accuracy": 1.0}, "a dictionary with 'accuracy'"), ("good", "a str"), ((), "a tuple")],
)
def test_a_test_without_a_loss_says_what_it_returned(returned, shown):
    task = task_of(test=lambda net, loader: returned)
    with pytest.raises(TaskError, match=f"test returned {shown}: expected a loss"):
        task.evaluate(task.initial_state(0), task.load_data(DataSpec()))


def test_an_evaluation_is_the_user_s_own():
    task = task_of()
    net = Net()
    score = task.evaluate(state_of(net), task.load_data(DataSpec()))
    loss, accuracy = user_test(net, load_data()[1], "cpu")
    assert (score.loss, score.metrics["accuracy"]) == (loss, accuracy)


def test_progress_is_counted_as_the_network_is_called_and_a_cancelled_training_ends_there(monkeypatch):
    monkeypatch.setattr("midge.tasks.torch_task.PROGRESS_INTERVAL_S", -1.0)
    task, told = task_of(), []
    data = task.load_data(DataSpec())
    task.train(task.initial_state(1), data, SPEC, told.append)
    assert told == pytest.approx([*(n / 8 for n in range(1, 8)), 0.99, 1.0])  # 30 examples in 4 batches, twice

    class CancelledError(Exception):
        pass

    def cancel(fraction):
        raise CancelledError

    with pytest.raises(CancelledError):
        task.train(task.initial_state(1), data, SPEC, cancel)
    assert task.train(task.initial_state(1), data, SPEC, mute).num_examples == 30
    assert not task._own_net._forward_pre_hooks


# The data.


def test_without_skew_the_user_s_loader_is_handed_on_as_it_is():
    loaders = load_data()
    data = task_of(load_data=lambda: loaders).load_data(DataSpec())
    assert (data.train, data.test) == loaders
    assert len(data) == 30
    assert data.labels.tolist() == [0, 1, 2] * 10


def test_an_agent_s_share_is_taken_of_the_training_data_and_the_loader_stays_like_the_user_s():
    data = task_of().load_data(DataSpec(classes=(2,), def_prob=0.1))
    assert sorted(data.labels.tolist()) == [0, 1] + [2] * 10
    assert (data.train.batch_size, type(data.train.sampler).__name__) == (8, "RandomSampler")
    assert num_examples_of(data.test) == 12
    parts = [task_of().load_data(DataSpec(partition="iid", part=part, num_parts=3)) for part in range(3)]
    assert [len(part) for part in parts] == [10, 10, 10]
    indices = [index for part in parts for index in part.train.dataset.indices]
    assert sorted(indices) == list(range(30))
    assert trained(task_of(), data_spec=DataSpec(partition="iid", num_parts=3)).num_examples == 10


@pytest.mark.parametrize(
    "given",
    [
        examples(),
        (examples(), examples(12)),
        [examples(), examples(12), {"trainset": 30}],
        (torch.randn(30, 4), torch.arange(30) % 3),
        ((np.zeros((30, 4), np.float32), np.arange(30) % 3), (np.zeros((12, 4), np.float32), np.arange(12) % 3)),
    ],
    ids=["a data set", "two", "and something", "tensors", "arrays"],
)
def test_data_sets_get_loaders_with_the_round_s_batch_size(given):
    sizes = []

    def look(net, loader):
        sizes.extend(len(labels) for _, labels in loader)

    task = task_of(load_data=lambda: given, train=look)
    data = task.load_data(DataSpec(classes=(1, 2)))
    assert sorted(set(data.labels.tolist())) == [1, 2]
    task.train(task.initial_state(0), data, SPEC, mute)
    assert sizes == [7, 7, 6]
    assert 0 <= task.evaluate(task.initial_state(0), data).metrics["accuracy"] <= 1


def test_one_example_that_is_left_over_is_left_out_of_the_epoch():
    def look(net, loader):
        return {"batches": len(loader)}

    task = task_of(load_data=lambda: examples(29), train=look)
    assert trained(task).metrics == {"batches": 4}  # 7, 7, 7, 7 of 29
    assert trained(task, replace(SPEC, batch_size=0)).metrics == {"batches": 1}


def test_a_function_that_takes_its_part_deals_for_itself():
    def load_data(partition_id: int, num_partitions: int):
        return Subset(examples(), range(partition_id, 30, num_partitions))

    data = task_of(load_data=load_data).load_data(DataSpec(partition="iid", part=1, num_parts=5))
    assert list(data.train.indices) == [1, 6, 11, 16, 21, 26]


def test_a_data_directory_reaches_the_parameter_of_that_name(tmp_path):
    def load_data(data_dir="usual"):
        return TensorDataset(torch.zeros(1, 4), torch.tensor([len(str(data_dir))]))

    assert task_of(load_data=load_data).load_data(DataSpec()).labels.tolist() == [len("usual")]
    assert task_of(load_data=load_data).load_data(DataSpec(data_dir=tmp_path)).labels.tolist() == [len(str(tmp_path))]


class Unlabelled(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {"inputs": torch.zeros(4)}


@pytest.mark.parametrize(
    ("given", "spec", "words"),
    [
        (Unlabelled(), DataSpec(classes=(1,)), r"classes \(1,\): the labels of a Unlabelled cannot be read"),
        (Unlabelled(), DataSpec(partition="shards:2", num_parts=2), "partition shards:2: the labels of a Unlabelled"),
        (
            DataLoader(examples(), sampler=WeightedRandomSampler([1.0] * 30, 30)),
            DataSpec(classes=(1,)),
            "a DataLoader with a WeightedRandomSampler, of which no share can be taken",
        ),
        (iter(()), DataSpec(classes=(1,)), "a tuple_iterator, of which no share can be taken"),
        (examples(), DataSpec(classes=(9,)), "no example is labelled 9"),
        (examples(), DataSpec(part=1, num_parts=2), "no partition: say how to deal"),
        ((), DataSpec(), "load_data returned nothing"),
        (None, DataSpec(), "load_data gave a NoneType: expected a loader or a data set"),
    ],
)
def test_what_cannot_be_dealt_out_is_said(given, spec, words):
    with pytest.raises(TaskError, match=words):
        task_of(load_data=lambda: given).load_data(spec)


def test_what_needs_no_labels_is_dealt_without_them():
    data = task_of(load_data=Unlabelled).load_data(DataSpec(partition="iid", part=1, num_parts=3))
    assert len(data) == 2
    assert data.labels is None


def test_examples_that_cannot_be_counted_or_are_none_are_said_to_be():
    with pytest.raises(TaskError, match="cannot be counted: expected a data set with a length"):
        task_of().num_examples(task_of(load_data=lambda: iter(())).load_data(DataSpec()))
    some = DataLoader(examples(), sampler=torch.utils.data.SubsetRandomSampler(range(5)))
    assert task_of().num_examples(task_of(load_data=lambda: some).load_data(DataSpec())) == 5
    with pytest.raises(TaskError, match="no examples"):
        task_of().num_examples(task_of(load_data=lambda: examples(0)).load_data(DataSpec()))


def test_the_coordinator_evaluates_where_it_is_told_on_what():
    assert task_of().test_data() is None
    for test_data in (lambda: load_data()[1], examples(12)):
        task = task_of(test_data=test_data)
        assert task.evaluate(task.initial_state(0), task.test_data()).num_examples == 12
