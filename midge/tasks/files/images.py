"""Folders of images, in which each class has a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from midge.tasks.base import DataSpec, TaskError
from midge.tasks.files.places import root_of, some
from midge.tasks.partition import select

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})


class ImageFolder:
    """A data set of image files, opened when they are asked for: (image, label) by index.

    Attributes:
        targets: the label of each, int64[num_examples].
        classes: the names of labels by index.
    """

    def __init__(
        self, files: Sequence[Path], targets: NDArray[np.int64], classes: Sequence[str], transform: Callable[[Any], Any]
    ) -> None:
        self.targets = targets
        self.classes = tuple(classes)
        self._files = tuple(files)
        self._transform = transform

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The image, as the transform gives it, and its label.

        Raises:
            TaskError: the file is no image, or broken.
        """
        return self._transform(_open_image(self._files[index])), int(self.targets[index])

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All inputs, read into memory, and labels, as torch's tensors: faster where they fit.

        Raises:
            TaskError: a file is broken.
        """
        import torch  # noqa: PLC0415  NumPy alone serves a task without torch

        inputs = np.stack([np.asarray(self[index][0], np.float32) for index in range(len(self))])
        return torch.from_numpy(inputs), torch.from_numpy(self.targets)


def load_images(
    spec: DataSpec,
    *,
    class_names: Sequence[str] = (),
    size: tuple[int, int] | None = None,
    mode: str = "RGB",
    transform: Callable[[Any], Any] | None = None,
) -> ImageFolder:
    """This agent's share of a folder of images, in which each class has a folder: `<data_dir>/cat/1.jpg`.

    Args:
        spec: its `data_dir` is the folder.
        class_names: names of the classes' folders by label, of which a device may lack some; empty: those there are, sorted.
        size: height and width that every image is scaled to; needed where they differ, as a batch has one shape.
        mode: Pillow's name of the pixels' form: "RGB", or "L" for shades of grey.
        transform: from a Pillow image, of `mode` and `size`, to an input; without one, inputs are float32 of shape (channels,
            height, width), from 0 to 1.

    Raises:
        TaskError: Pillow is not installed, folders or images are missing, or a file is no image.
    """
    what = "a folder for each class, with images in it, such as cat/1.jpg"
    root = root_of(spec, what)
    folders = (
        sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if root.is_dir()
        else []
    )
    if not folders:
        raise TaskError(f"{root}: no folder in it: expected {what}")
    names = tuple(class_names) or tuple(folder.name for folder in folders)
    strangers = [folder.name for folder in folders if folder.name not in names]
    if strangers:
        raise TaskError(
            f"{root}: folder {strangers[0]!r} is none of the classes {some(names)}: rename it or move it away"
        )
    files, labels = [], []
    for folder in folders:
        images = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
        )
        files += images
        labels += [names.index(folder.name)] * len(images)
    if not files:
        raise TaskError(f"{root}: no images in {some([folder.name for folder in folders])}: expected {what}")
    targets = np.array(labels, np.int64)
    mine = select(targets, spec)
    chosen = [files[index] for index in mine]
    _check_images(chosen, fixed=size is not None or transform is not None)
    return ImageFolder(chosen, targets[mine], names, _Prepared(size, mode, transform))


class _Prepared:
    """From a Pillow image to an input."""

    def __init__(self, size: tuple[int, int] | None, mode: str, transform: Callable[[Any], Any] | None) -> None:
        self._size = size
        self._mode = mode
        self._transform = transform

    def __call__(self, image: Any) -> Any:
        image = image.convert(self._mode)
        if self._size is not None:
            height, width = self._size
            image = image.resize((width, height))
        if self._transform is not None:
            return self._transform(image)
        pixels = np.asarray(image, np.float32) / np.float32(255)
        return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _check_images(files: Sequence[Path], *, fixed: bool) -> None:
    """Read the head of each file, so that what is no image is said now, and not in the middle of a round."""
    sizes: dict[tuple[int, int], Path] = {}
    for file in files:
        sizes.setdefault(_open_image(file, load=False).size, file)
    if len(sizes) > 1 and not fixed:
        (one, first), (other, second), *_ = sizes.items()
        raise TaskError(
            f"{first} has {one[0]} by {one[1]} pixels and {second} {other[0]} by {other[1]}: say which "
            "size all are to be scaled to"
        )


def _open_image(file: Path, *, load: bool = True) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError  # noqa: PLC0415  an optional dependency
    except ImportError:
        raise TaskError("images are read with Pillow, which is not installed: pip install pillow") from None
    try:
        with Image.open(file) as image:
            if load:
                image.load()
            return image
    except UnidentifiedImageError:
        raise TaskError(f"{file}: no image that Pillow knows: mend it or move it away") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise TaskError(f"{file}: the image cannot be read: {error}: mend it or move it away") from None
