"""Tasks over torchvision's own data sets: where the files lie, how they are fetched, and what a model sees of an image.

    class SvhnTask(TorchvisionTask):
        name, dataset, num_classes = "svhn", "SVHN", 10
        ...

The files are read by torchvision's loaders, from the disk of this very device, where its operator put them, or where
torchvision put them when the operator said `--download`. Nothing here ever comes from a peer. (CIFAR's files are Python
pickles. torchvision compares each with the MD5 sum that it carries before it opens it.)

An agent keeps its share of the images as bytes; a batch becomes numbers when its turn comes.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import importlib
import shutil
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from midge.tasks.base import DataSpec, TaskError
from midge.tasks.partition import select
from midge.tasks.torch_task import TorchTask
from midge.tasks.torchvision_compat import import_torchvision

DEFAULT_DIR = Path("data")
"""Where data lie if nothing else is said: in the directory that the program was started in, as torchvision's examples do."""
_BRIGHTEST = 255


class TorchvisionTask(TorchTask):
    """A task over images of one of torchvision's data sets."""

    dataset: ClassVar[str]
    """The class in `torchvision.datasets`."""
    dataset_options: ClassVar[Mapping[str, Any]] = {}
    """That the class is called with besides root and train."""
    mean: ClassVar[Sequence[float]]
    """Of the training images' pixels from 0 to 1, one a channel."""
    std: ClassVar[Sequence[float]]
    """Their standard deviation."""

    def load_data(self, spec: DataSpec) -> tuple[Tensor, Tensor]:
        """This agent's share of the training images, uint8[n, channels, height, width], and their labels, int64[n].

        Raises:
            TaskError: a file is missing or broken, or nothing is left for this agent.
        """
        images, labels = self._load(spec, train=True)
        mine = torch.from_numpy(select(labels.numpy(), spec))
        return images[mine], labels[mine]

    def load_test_data(self, spec: DataSpec) -> tuple[Tensor, Tensor]:
        """All test images and their labels, as `load_data` has them.

        Raises:
            TaskError: a file is missing or broken.
        """
        return self._load(spec, train=False)

    def test_data(self) -> tuple[Tensor, Tensor]:
        """The test images of `DEFAULT_DIR`."""
        return self.load_test_data(DataSpec())

    def prepare(self, inputs: Tensor, *, training: bool) -> Tensor:
        """float32 images, normalised channel by channel to mean 0 and standard deviation 1; in training first augmented."""
        images = self.augment(inputs) if training else inputs
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return images.float().div_(_BRIGHTEST).sub_(mean).div_(std)

    def augment(self, images: Tensor) -> Tensor:
        """Random changes to a batch of training images, drawn from torch's global generator; none unless overridden."""
        return images

    @abstractmethod
    def files(self, dataset: Any) -> list[Path]:
        """What a loader of the class `dataset` reads, relative to its root."""

    @abstractmethod
    def source(self, dataset: Any) -> str:
        """The URL where the files are to be had."""

    @abstractmethod
    def tensors(self, loaded: Any) -> tuple[Tensor, Tensor]:
        """The images and labels of an instance of the data set, as `load_data` has them."""

    def dataset_class(self) -> Any:
        """The loader."""
        import_torchvision()
        return getattr(importlib.import_module("torchvision.datasets"), self.dataset)

    def _load(self, spec: DataSpec, *, train: bool) -> tuple[Tensor, Tensor]:
        root = (spec.data_dir or DEFAULT_DIR).absolute()
        dataset = self.dataset_class()
        if self._missing(root, dataset):
            self._provide(root, dataset, download=spec.download)
        try:
            return self.tensors(dataset(root, train=train, **self.dataset_options))
        except Exception as error:  # a loader raises anything for a file that is not what it expects
            raise TaskError(
                f"task {self.name}: torchvision cannot read the files of {self.dataset} in {self._folder(root, dataset)} "
                f"({type(error).__name__}: {error}). Delete them, and get them again."
            ) from error

    def _provide(self, root: Path, dataset: Any, *, download: bool) -> None:
        """Have missing files unpacked or downloaded, by one process of this device at a time."""
        with _locked(root) if root.is_dir() or download else contextlib.nullcontext():
            for path in self._missing(root, dataset):
                packed = path.with_name(f"{path.name}.gz")
                if packed.exists():
                    _unpack(packed, path)
            missing = self._missing(root, dataset)
            if missing and not download:
                names = ", ".join(path.name for path in missing)
                raise TaskError(
                    f"task {self.name}: {self._folder(root, dataset)} lacks {names}. Put them there, from "
                    f"{self.source(dataset)}; or start with --download, and torchvision fetches them."
                )
            if missing:
                self._download(root, dataset)

    def _download(self, root: Path, dataset: Any) -> None:
        try:
            dataset(root, download=True, **self.dataset_options)
        except Exception as error:  # the network, the disk, the mirror
            raise TaskError(
                f"task {self.name}: torchvision cannot download {self.dataset} to {root}: {' '.join(str(error).split())}. "
                f"Or put its files into {self._folder(root, dataset)} by hand, from {self.source(dataset)}"
            ) from error

    def _missing(self, root: Path, dataset: Any) -> list[Path]:
        return [path for name in self.files(dataset) if not (path := root / name).exists()]

    def _folder(self, root: Path, dataset: Any) -> Path:
        return root / self.files(dataset)[0].parent


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Alone among the processes that unpack or download into `root`: several agents of one device start at once."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".midge.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _unpack(packed: Path, path: Path) -> None:
    temporary = path.with_name(f"{path.name}.part")
    try:
        with gzip.open(packed) as source, temporary.open("wb") as target:
            shutil.copyfileobj(source, target)
    except (OSError, EOFError) as error:
        temporary.unlink(missing_ok=True)
        raise TaskError(f"{packed} cannot be unpacked ({error}): get it again") from error
    temporary.replace(path)
