"""Tasks whose data lie in files: subclass one, name the classes and give a model.

    class Iris(CsvTask):
        name = "iris"
        class_names = ("setosa", "versicolor", "virginica")

        def build_model(self) -> nn.Module:
            return nn.Linear(4, 3)

    edge-agent run --task my_tasks:Iris --data-dir /srv/iris

`midge.tasks.files` says how the files must look.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, cast

from midge.tasks.base import DataSpec
from midge.tasks.files import load_arrays, load_csv, load_images
from midge.tasks.torch_task import Data, TorchTask


class FileTask(TorchTask):
    """What all of them have in common."""

    class_names: ClassVar[Sequence[str]] = ()
    """Names of labels by index. The same on every device, whatever that has of them."""
    test_path: ClassVar[str] = ""
    """Where the coordinator has its test data, which look like an agent's; empty for none."""

    @property
    def label_names(self) -> Sequence[str]:
        """As `class_names`: what labels are called where they are shown."""
        return tuple(self.class_names)

    def test_data(self) -> Data | None:
        """All that lies at `test_path`."""
        return self.load_data(DataSpec(data_dir=Path(self.test_path))) if self.test_path else None


class CsvTask(FileTask):
    """Rows of numbers, one example each."""

    label: ClassVar[str] = ""
    """The column of the label; empty: the last one."""

    def load_data(self, spec: DataSpec) -> Data:
        """This agent's share of the rows."""
        return load_csv(spec, label=self.label, class_names=self.class_names).tensors()


class ArraysTask(FileTask):
    """Inputs and labels as NumPy's arrays."""

    def load_data(self, spec: DataSpec) -> Data:
        """This agent's share of the examples."""
        return load_arrays(spec, class_names=self.class_names).tensors()


class ImagesTask(FileTask):
    """Images in a folder for each class."""

    size: ClassVar[tuple[int, int]] = (32, 32)
    """Height and width that all are scaled to."""
    mode: ClassVar[str] = "RGB"
    """Pillow's name of the pixels' form; "L": shades of grey."""
    in_memory: ClassVar[bool] = True
    """Whether images are read once and kept, 4 bytes a value; else from their files, in every epoch."""

    def load_data(self, spec: DataSpec) -> Data:
        """This agent's share of the images: float32[channels, height, width] from 0 to 1."""
        images = load_images(spec, class_names=self.class_names, size=self.size, mode=self.mode)
        return images.tensors() if self.in_memory else cast("Data", images)
