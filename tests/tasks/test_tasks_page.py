"""docs/tasks.md: every task on the page is one, trains, and is as short as the page says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from midge.tasks.base import DataSpec, TrainSpec
from midge.tasks.flatten import layout_of
from midge.tasks.registry import find_task

PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
MINE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 3))

def load_train():
    return TensorDataset(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3)

def load_test():
    return torch.zeros(3, 4), torch.arange(3)

def load_data():
    return DataLoader(load_train(), batch_size=4, shuffle=True), DataLoader(load_train(), batch_size=4)

def train(net, loader, epochs, device):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(epochs):
        for inputs, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), labels).backward()
            optimizer.step()

def test(net, loader, device):
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(net(inputs), labels).item() for inputs, labels in loader]
    return sum(losses) / len(losses), 0.5

class FlowerClient:
    net = Net()

    def get_parameters(self, config):
        return [value.numpy() for value in self.net.state_dict().values()]

    def fit(self, parameters, config):
        self.net.load_state_dict({k: torch.tensor(v) for k, v in zip(self.net.state_dict(), parameters)})
        train(self.net, load_data()[0], config["local_epochs"], "cpu")
        return self.get_parameters({}), 12, {}

    def evaluate(self, parameters, config):
        self.net.load_state_dict({k: torch.tensor(v) for k, v in zip(self.net.state_dict(), parameters)})
        return *test(self.net, load_data()[1], "cpu")[:1], 12, {"accuracy": 0.5}
"""


@pytest.mark.parametrize("block", BLOCKS, ids=["simple", "loop", "client", "subclass"])
def test_a_task_of_the_page_trains(block, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "my_task.py").write_text(block)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("mine", "my_task"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    task = find_task(str(tmp_path / "my_task.py"))
    for name in ("mine", "my_task"):
        monkeypatch.delitem(sys.modules, name)
    state, data = task.initial_state(0), task.load_data(DataSpec())
    spec = TrainSpec(local_epochs=5, batch_size=4, learning_rate=0.1)
    result = task.train(state, data, spec, lambda _: None)
    assert result.num_examples == 12
    assert layout_of(result.state) == layout_of(state)
    assert task.evaluate(result.state, data).loss < task.evaluate(state, data).loss
    assert len([line for line in block.splitlines() if line and not line.startswith("#")]) <= 12


def test_the_page_has_them_all():
    assert len(BLOCKS) == 4
