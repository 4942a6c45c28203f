"""An agent's share of a data set that knows nothing of agents: what `DataSpec` says, done to tensors or to a torch data set."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Subset

from midge.tasks.base import DataSpec, TaskError
from midge.tasks.inspection import labels_of
from midge.tasks.partition import select

Examples: TypeAlias = tuple[Tensor, Tensor] | Dataset[Any]
"""Inputs and targets as two tensors of equal length, or a data set with a length, of (input, target)."""

_NEED_LABELS = ("shards", "dirichlet")


def share(data: Examples, spec: DataSpec) -> Examples:
    """The examples that `spec` gives its agent, in the order that `data` has them in; `data` itself where that is all.

    Raises:
        TaskError: `spec` needs labels, and these cannot be read; or it makes no sense for them, see `select`.
    """
    if not spec.is_share:
        return data
    indices = select(_labels_for(data, spec), spec)
    if isinstance(data, tuple):
        return data[0][indices], data[1][indices]
    return Subset(data, indices.tolist())


def _labels_for(data: Examples, spec: DataSpec) -> NDArray[np.int64]:
    labels = labels_of(data)
    if labels is not None:
        return labels
    if spec.classes or spec.partition.startswith(_NEED_LABELS):
        wanted = f"classes {spec.classes}" if spec.classes else f"partition {spec.partition}"
        raise TaskError(
            f"{wanted}: the labels of a {type(data).__name__} cannot be read: expected one integer an example, in `targets` or "
            "as the second of each example. Let the function that loads the data take the DataSpec as `spec`, and deal for "
            "itself with midge.tasks.partition.select."
        )
    return np.zeros(len(data[1]) if isinstance(data, tuple) else len(cast("Sized", data)), np.int64)
