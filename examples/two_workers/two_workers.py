"""Two workers with two rows each: does the second column, or the first, decide the target?

The task of docs/scenarios/1-two-workers-in-turn.md. bob has the first two rows (`--index 0`), alice the last two (`--index 1`);
the coordinator tests on all four.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from midge.tasks.base import DataSpec
from midge.tasks.torch_task import TorchTask

INPUTS = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
TARGETS = torch.tensor([[0.0], [0.0], [1.0], [1.0]])


class TwoWorkers(TorchTask):
    """One linear layer, and the sum of squared errors."""

    name = "two-workers"

    def build_model(self) -> nn.Module:
        """Two inputs, one output."""
        return nn.Linear(2, 1)

    def load_data(self, spec: DataSpec) -> tuple[Tensor, Tensor]:
        """Two rows of the four."""
        mine = slice(2 * spec.part, 2 * spec.part + 2)
        return INPUTS[mine], TARGETS[mine]

    def test_data(self) -> tuple[Tensor, Tensor]:
        """All four rows."""
        return INPUTS, TARGETS

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The sum of squared errors."""
        return ((outputs - targets) ** 2).sum()


task = TwoWorkers()
