"""The built-in task `cifar10`: 32 by 32 colour images of ten kinds of things, and torchvision's ResNet-18.

50,000 training and 10,000 test images (A. Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images). The model
is that of K. He et al. 2016, Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385, with ten
outputs, from random weights. Another one of torchvision's takes two lines:

    class Cifar10Vgg16(Cifar10Task):
        name, architecture = "cifar10-vgg16", "vgg16"
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from midge.tasks.torchvision_compat import import_torchvision
from midge.tasks.torchvision_sets import TorchvisionTask


class Cifar10Task(TorchvisionTask):
    """11,181,642 parameters, and BatchNorm's statistics and counters."""

    name: ClassVar[str] = "cifar10"
    architecture: ClassVar[str] = "resnet18"
    """A classifier of `torchvision.models`."""
    dataset: ClassVar[str] = "CIFAR10"
    mean: ClassVar[Sequence[float]] = (0.4914, 0.4822, 0.4465)
    std: ClassVar[Sequence[float]] = (0.2023, 0.1994, 0.2010)
    num_classes: ClassVar[int] = 10

    def build_model(self) -> nn.Module:
        """The classifier, as torchvision starts it."""
        import_torchvision()
        models = importlib.import_module("torchvision.models")
        return cast("nn.Module", models.get_model(self.architecture, weights=None, num_classes=self.num_classes))

    def augment(self, images: Tensor) -> Tensor:
        """Each image by itself: a random window of 32 by 32 of it with a black frame of 4 pixels, and half of them mirrored."""
        return torch.stack([self._transform(image) for image in images])

    @cached_property
    def _transform(self) -> Any:
        import_torchvision()
        transforms = importlib.import_module("torchvision.transforms")
        return transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()])

    def files(self, dataset: Any) -> list[Path]:
        """Six batches and a list of the labels' names."""
        names = [*(name for name, _ in dataset.train_list + dataset.test_list), dataset.meta["filename"]]
        return [Path(dataset.base_folder, name) for name in names]

    def source(self, dataset: Any) -> str:
        """An archive, which holds the folder."""
        return str(dataset.url)

    def tensors(self, loaded: Any) -> tuple[Tensor, Tensor]:
        """As they are in the files, with the channels first."""
        return torch.from_numpy(loaded.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(loaded.targets)
