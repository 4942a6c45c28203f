"""Where data lie on a device, and what was read there; shared by all that read files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from midge.tasks.base import DataSpec, TaskError

if TYPE_CHECKING:
    from torch import Tensor

_SHOWN = 8


@dataclass(frozen=True)
class Examples:
    """Examples in memory.

    Attributes:
        inputs: float32[num_examples, ...].
        labels: int64[num_examples], each 0 or more.
        class_names: of labels by index; empty where labels are numbers in the file too.
    """

    inputs: NDArray[np.float32]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...] = ()

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels as torch's tensors, sharing memory: what a `TorchTask` calls data."""
        import torch  # noqa: PLC0415  NumPy alone serves a task without torch

        return torch.from_numpy(self.inputs), torch.from_numpy(self.labels)


def root_of(spec: DataSpec, what: str) -> Path:
    """The agent's `data_dir`, which is there."""
    if spec.data_dir is None:
        raise TaskError(f"no data_dir is set: say with --data-dir where the data lie: {what}")
    if not spec.data_dir.exists():
        raise TaskError(f"{spec.data_dir.absolute()}: there is no such directory: expected {what}")
    return spec.data_dir


def files_of(spec: DataSpec, pattern: str, what: str) -> list[Path]:
    """`data_dir` where it is a file, else the files in it that are like `pattern`, in order of their names."""
    root = root_of(spec, what)
    files = [root] if root.is_file() else sorted(path for path in root.glob(pattern) if path.is_file())
    if not files:
        raise TaskError(f"{root.absolute()}: no file like {pattern} in it: expected {what}")
    return files


def some(words: Sequence[str]) -> str:
    """The first of the words, in one line."""
    rest = len(words) - _SHOWN
    return ", ".join(words[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
