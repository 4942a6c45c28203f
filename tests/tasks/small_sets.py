"""Small data sets in the formats of the real ones, for torchvision's own loaders: noise, with a mark for each class.

MNIST's files are IDX (http://yann.lecun.com/exdb/mnist/), packed with gzip as they are distributed. CIFAR-10's are Python
pickles (https://www.cs.toronto.edu/~kriz/cifar.html), and torchvision opens none whose MD5 sum is not the real file's. So
`SmallCifar10` tells its loader the sums of the files that `write_cifar10` wrote, which stand beside them, and changes
nothing else.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midge.tasks.cifar10 import Cifar10Task

_SUMS = "sums.json"


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    """An IDX file of bytes: two zeros, 8 for unsigned bytes, the number of dimensions, their sizes big-endian, the data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    with gzip.open(path.with_name(f"{path.name}.gz"), "wb") as file:
        file.write(head + array.tobytes())


def grey_images(num_images: int, num_classes: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images uint8[n, 28, 28] with a bright spot whose place says the label, and labels uint8[n]: 0, 1, ..., 0, 1, ..."""
    random = np.random.RandomState(seed)
    labels = (np.arange(num_images) % num_classes).astype(np.uint8)
    images = random.randint(0, 80, (num_images, 28, 28)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label) % 16, 4)
        image[7 * row : 7 * row + 6, 7 * column : 7 * column + 6] += 150
    return images, labels


def write_mnist(root: Path, num_train: int = 200, num_test: int = 50, folder: str = "MNIST") -> None:
    """The four files of MNIST or Fashion-MNIST."""
    for part, number, seed in (("train", num_train, 0), ("t10k", num_test, 1)):
        images, labels = grey_images(number, 10, seed)
        write_idx(root / folder / "raw" / f"{part}-images-idx3-ubyte", images)
        write_idx(root / folder / "raw" / f"{part}-labels-idx1-ubyte", labels)


def write_emnist(root: Path) -> None:
    """The four files of EMNIST's balanced split: two images a class to train on, one to test on."""
    for part, number, seed in (("train", 94, 0), ("test", 47, 1)):
        images, labels = grey_images(number, 47, seed)
        write_idx(root / "EMNIST" / "raw" / f"emnist-balanced-{part}-images-idx3-ubyte", images)
        write_idx(root / "EMNIST" / "raw" / f"emnist-balanced-{part}-labels-idx1-ubyte", labels)


def write_cifar10(root: Path, per_batch: int = 20, num_test: int = 20) -> None:
    """The six batches of CIFAR-10, of which five are to train on, the labels' names, and the sums of all seven."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    batches = [(f"data_batch_{number}", per_batch) for number in range(1, 6)] + [("test_batch", num_test)]
    for seed, (name, num_images) in enumerate(batches):
        random = np.random.RandomState(seed)
        labels = np.arange(num_images) % 10
        images = random.randint(0, 100, (num_images, 3, 32, 32)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[label % 3, : 8 + 2 * label] += 150
        entry = {"data": images.reshape(num_images, 3072), "labels": labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(entry))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.name != _SUMS}  # noqa: S324
    (root / _SUMS).write_text(json.dumps(sums))


class SmallCifar10(Cifar10Task):
    """`cifar10`, with the sums of the small files."""

    def dataset_class(self) -> Any:
        loader = super().dataset_class()

        class Small(loader):  # type: ignore[misc]
            def __init__(self, root: Path, **options: Any) -> None:
                sums = json.loads((root / _SUMS).read_text())
                self.train_list = [[name, sums[name]] for name, _ in loader.train_list]
                self.test_list = [[name, sums[name]] for name, _ in loader.test_list]
                self.meta = {**loader.meta, "md5": sums[loader.meta["filename"]]}
                super().__init__(root, **options)

        return Small
