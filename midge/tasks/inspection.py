"""Looking into a task's data before any training: how many examples, of what shape, with which labels.

Data may be of any form that their task takes. What is known here: inputs and targets as a pair of arrays or tensors; data
sets with a length, whose labels are read from `targets` or `labels` as torchvision's have them, else example by example;
subsets and loaders of those. Of anything else the number of examples is all that can be said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from midge.tasks.base import Task, TaskError
from midge.tasks.summary import DataSummary, LabelCount

Labels: TypeAlias = NDArray[np.int64]
"""int64[num_examples]."""


def summarize(task: Task, data: Any, *, max_read: int | None = None) -> DataSummary:
    """What `data`, loaded by `task`, are.

    Args:
        task: whose `num_examples` counts; names of labels come from its `label_names`, or else from the `classes` of the data
            set: a sequence in which the label is the index.
        data: not changed.
        max_read: labels that can be had only by reading each example are read of data sets up to this size; None: of any.

    Raises:
        TaskError: there is no example, or the task says that something is wrong with its data.
    """
    num_examples = int(task.num_examples(data))
    if num_examples < 1:
        raise TaskError(f"task {task.name}: no examples; look at what load_data reads and at the partition")
    labels = labels_of(data, max_read=max_read)
    counts = None
    if labels is not None and len(labels) == num_examples:
        names = _names(task, data)
        found, numbers = np.unique(labels, return_counts=True)
        counts = tuple(
            LabelCount(int(label), int(number), names[label] if 0 <= label < len(names) else "")
            for label, number in zip(found, numbers, strict=True)
        )
    return DataSummary(num_examples=num_examples, input_shape=_input_shape(data), labels=counts)


def labels_of(data: Any, *, max_read: int | None = None) -> Labels | None:
    """The label of each example, in order; None where they are no integers, or not to be had.

    Args:
        data: as a task's `load_data` gives it.
        max_read: see `summarize`.
    """
    if _is_pair(data):
        return _as_labels(data[1])
    if (inner := _loaded_by(data)) is not None:
        return labels_of(inner, max_read=max_read)
    if hasattr(data, "tensors") and _is_pair(data.tensors):  # torch.utils.data.TensorDataset
        return _as_labels(data.tensors[1])
    if hasattr(data, "dataset") and hasattr(data, "indices"):  # torch.utils.data.Subset
        of_all = labels_of(data.dataset, max_read=max_read)
        return None if of_all is None else of_all[np.asarray(data.indices, np.int64)]
    for attribute in ("targets", "labels"):
        labels = _as_labels(getattr(data, attribute, None))
        if labels is not None and len(labels) == _length(data):
            return labels
    return _read_one_by_one(data, max_read)


def _is_pair(data: Any) -> bool:
    return isinstance(data, tuple | list) and len(data) == 2 and all(hasattr(one, "shape") for one in data)


def _loaded_by(data: Any) -> Any | None:
    """The data set of a loader that hands out all of it."""
    if not hasattr(data, "batch_sampler") or not hasattr(data, "dataset"):
        return None
    sampler = getattr(data, "sampler", None)
    return data.dataset if sampler is None or _length(sampler) == _length(data.dataset) else None


def _read_one_by_one(data: Any, max_read: int | None) -> Labels | None:
    length = _length(data)
    is_long = max_read is not None and length is not None and length > max_read
    if length is None or is_long or isinstance(data, tuple | dict | str) or not hasattr(data, "__getitem__"):
        return None
    labels = []
    for index in range(length):
        example = _example(data, index)
        if not isinstance(example, tuple | list) or len(example) != 2:
            return None
        label = np.asarray(example[1])
        if label.ndim != 0 or label.dtype.kind not in "iub":
            return None
        labels.append(int(label))
    return np.array(labels, np.int64)


def _example(data: Any, index: int) -> Any | None:
    """An example; None where `data` are not counted by number, as the columns of a table are not."""
    try:
        return data[index]
    except (KeyError, IndexError, TypeError):
        return None


def _as_labels(targets: Any) -> Labels | None:
    if targets is None or isinstance(targets, str):
        return None
    try:
        labels = np.asarray(targets)
    except (TypeError, ValueError, RuntimeError):  # no array at all, ragged, or a tensor that is elsewhere
        return None
    return labels.astype(np.int64) if labels.ndim == 1 and labels.dtype.kind in "iub" and len(labels) else None


def _input_shape(data: Any) -> tuple[int, ...] | None:
    if _is_pair(data):
        return tuple(int(size) for size in data[0].shape[1:])
    if (inner := _loaded_by(data)) is not None:
        return _input_shape(inner)
    if isinstance(data, tuple | dict | str) or not hasattr(data, "__getitem__") or not _length(data):
        return None
    example = _example(data, 0)
    inputs = example[0] if isinstance(example, tuple | list) and example else example
    shape = getattr(inputs, "shape", None)
    return None if shape is None else tuple(int(size) for size in shape)


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def _names(task: Task, data: Any) -> Sequence[str]:
    """Of labels by index; empty where they have none."""
    inner = _loaded_by(data) or data
    while hasattr(inner, "dataset") and hasattr(inner, "indices"):
        inner = inner.dataset
    for names in (getattr(task, "label_names", None), getattr(inner, "classes", None)):
        if isinstance(names, tuple | list) and names and all(isinstance(name, str) for name in names):
            return names
    return ()
