"""The built-in task `digits`: handwritten digits, 8 by 8 pixels, real data that need no download.

1797 images come with scikit-learn (a copy of the test set of the UCI Optical Recognition of Handwritten Digits,
https://archive.ics.uci.edu/dataset/80). 360 of them, of every digit its share, are the coordinator's to test on; the
other 1437 are dealt among the agents. That cut never changes, whatever the seed of a run: no agent ever trains on what
its model is tested with.

It is also the example to start your own task from: a model, data, and nothing else.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from midge.tasks.base import DataSpec, TaskError
from midge.tasks.partition import select
from midge.tasks.torch_task import TorchTask

NUM_TEST = 360
_SPLIT_SEED = 0
_BRIGHTEST = 16
_CUT_FILE = Path(__file__).with_name("digits_cut.txt")
"""The cut of `_SPLIT_SEED`, written down: so it is the same with every version of scikit-learn, and at once."""


class DigitsTask(TorchTask):
    """A perceptron of 64, 32 and 10 units that reads digits. Trained in one place, it is right on 97 % of the test data."""

    name: ClassVar[str] = "digits"

    def __init__(self, split_seed: int = _SPLIT_SEED) -> None:
        """`split_seed` draws which images are to test on. Agents and coordinator must share it; experiments may vary it."""
        self._split_seed = split_seed

    def build_model(self) -> nn.Module:
        """2410 parameters: small enough to watch a federation work in seconds."""
        hidden, output = nn.Linear(64, 32), nn.Linear(32, 10)
        for layer in (hidden, output):
            # He et al. 2015, Delving Deep into Rectifiers, https://arxiv.org/abs/1502.01852. torch's own start is smaller
            # and slower: after 10 rounds of 10 like agents it is right on 87 % of the test data, this one on 92 %.
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        return nn.Sequential(hidden, nn.ReLU(), output)

    def load_data(self, spec: DataSpec) -> tuple[Tensor, Tensor]:
        """The agent's share of the training data: images float32[n, 64] from 0 to 1, labels int64[n]. No file is read."""
        images, labels = _splits(self._split_seed)[0]
        mine = torch.from_numpy(select(labels.numpy(), spec))
        return images[mine], labels[mine]

    def test_data(self) -> tuple[Tensor, Tensor]:
        """The 360 test images and their labels."""
        return _splits(self._split_seed)[1]


@cache
def _splits(split_seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The training data and the test data."""
    pixels, digits = _everything()
    order = _cut(split_seed, digits)
    images = torch.from_numpy(pixels).float() / _BRIGHTEST
    labels = torch.from_numpy(digits).long()
    train, test = order[:-NUM_TEST], order[-NUM_TEST:]
    return (images[train], labels[train]), (images[test], labels[test])


def _everything() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """All images as scikit-learn keeps them, uint8[1797, 64] from 0 to 16, and their labels, uint8[1797].

    Read from its installed file: to import scikit-learn for that takes longer than a round, in each worker, and 60 MB.
    """
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise TaskError(
            "task digits: its data come with scikit-learn, which is not installed: pip install 'midge[torch]'"
        )
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if file.exists():
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    else:  # another version of it keeps them elsewhere
        table = np.column_stack(_sklearn("sklearn.datasets").load_digits(return_X_y=True)).astype(np.uint8)
    return table[:, :-1], table[:, -1]


def _cut(split_seed: int, digits: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Which images, int64[1797]: those to train on, and then those to test on, of every digit its share."""
    if split_seed == _SPLIT_SEED:
        return np.loadtxt(_CUT_FILE, dtype=np.int64)
    split = _sklearn("sklearn.model_selection").train_test_split
    train, test = split(np.arange(len(digits)), test_size=NUM_TEST, random_state=split_seed, stratify=digits)
    return np.concatenate([train, test])


def _sklearn(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise TaskError(
            f"task digits: its data come with scikit-learn, which cannot be imported ({error}): pip install 'midge[torch]'"
        ) from None
