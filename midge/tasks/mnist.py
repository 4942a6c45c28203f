"""The built-in tasks `mnist`, `fashion-mnist` and `emnist`: 28 by 28 grey images, and one small convolutional network.

MNIST: 60,000 training and 10,000 test images of digits (Y. LeCun et al. 1998, Gradient-based learning applied to document
recognition). Fashion-MNIST: as many of clothes, in the same format (https://arxiv.org/abs/1708.07747). EMNIST: here its
balanced split, 112,800 and 18,800 of 47 digits and letters (https://arxiv.org/abs/1702.05373), lying on their sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from midge.tasks.torchvision_sets import TorchvisionTask


class Cnn(nn.Module):
    """Two convolutions of 5 by 5, 20 and 50 channels, each max-pooled; then 800, 500 and `num_classes` units."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """From float32[n, 1, 28, 28] to logarithms of probabilities, float32[n, num_classes]."""
        hidden = functional.max_pool2d(functional.relu(self.conv1(images)), 2)
        hidden = functional.max_pool2d(functional.relu(self.conv2(hidden)), 2)
        hidden = functional.relu(self.fc1(hidden.flatten(1)))
        return functional.log_softmax(self.fc2(hidden), dim=1)


class MnistTask(TorchvisionTask):
    """Handwritten digits: 431,080 parameters, of which training in one place makes 99 % on the test images."""

    name: ClassVar[str] = "mnist"
    dataset: ClassVar[str] = "MNIST"
    mean: ClassVar[Sequence[float]] = (0.1307,)
    std: ClassVar[Sequence[float]] = (0.3081,)
    num_classes: ClassVar[int] = 10

    def build_model(self) -> nn.Module:
        """The network, as torch starts it, with channels last in memory: so a processor needs three quarters of the time."""
        network: Any = Cnn(self.num_classes)  # torch's type hints have no such `to`
        return cast("nn.Module", network.to(memory_format=torch.channels_last))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean negative log-likelihood: the network's outputs are logarithms already."""
        return functional.nll_loss(outputs, targets)

    def files(self, dataset: Any) -> list[Path]:
        """Four files, unpacked; those that end in .gz are unpacked where they lie."""
        return [Path(dataset.__name__, "raw", name.removesuffix(".gz")) for name, _ in dataset.resources]

    def source(self, dataset: Any) -> str:
        """The first of torchvision's mirrors."""
        return f"{dataset.mirrors[0]} (packed as .gz will do)"

    def tensors(self, loaded: Any) -> tuple[Tensor, Tensor]:
        """As they are in the files, with a channel."""
        return loaded.data.unsqueeze(1), loaded.targets.to(torch.int64)


class FashionMnistTask(MnistTask):
    """Clothes."""

    name, dataset, mean, std = "fashion-mnist", "FashionMNIST", (0.2860,), (0.3530,)


class EmnistTask(MnistTask):
    """Letters and digits."""

    name, dataset, num_classes, mean, std = "emnist", "EMNIST", 47, (0.1751,), (0.3332,)
    dataset_options: ClassVar[Mapping[str, Any]] = {"split": "balanced"}

    def files(self, dataset: Any) -> list[Path]:
        """Of the balanced split."""
        kinds = [f"{part}-{kind}-ubyte" for part in ("train", "test") for kind in ("images-idx3", "labels-idx1")]
        return [Path(dataset.__name__, "raw", f"emnist-balanced-{kind}") for kind in kinds]

    def source(self, dataset: Any) -> str:
        """An archive of all splits."""
        return str(dataset.url)
