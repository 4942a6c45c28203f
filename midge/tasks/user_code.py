"""Calling what a user wrote before they knew of Midge: by the names of its parameters, from fixed seeds. No torch here.

A function is given what it asks for by name, and nothing else, so that it need not change. What none of the names stands for
must have a default: that is found when the task is made, not in the first round.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import numpy as np

from midge.tasks.base import DataSpec, TaskError, TrainSpec

_DEALS = {"spec", "part", "partition_id", "classes"}
"""A function that takes one of these deals the data out by itself."""


class DataFunction:
    """A function that loads data, or makes what holds them, from as much of a `DataSpec` as it has parameters for.

    Known are `spec` (all of it), `data_dir`, `download`, `classes`, `partition`, `part` or `partition_id`, and `num_parts` or
    `num_partitions`. A `data_dir` that the operator did not give is left to the function's default.

    Attributes:
        deals: whether it takes this agent's part by itself, so that nobody else must.

    Raises:
        TaskError: a parameter has another name and no default.
    """

    def __init__(self, function: Callable[..., Any], what: str) -> None:
        self._function = function
        self._names = named_parameters(function, set(_of_data(DataSpec())), what)
        self.deals = not _DEALS.isdisjoint(self._names)

    @classmethod
    def of(cls, source: Any, what: str) -> Self:
        """`source` where it is a function; else one that gives it. A data set may be callable, and still is one."""
        is_function = callable(source) and not hasattr(source, "__getitem__")
        return cls(source if is_function else lambda: source, what)

    def __call__(self, spec: DataSpec) -> Any:
        """What the function gives."""
        values = _of_data(spec)
        if spec.data_dir is None and "data_dir" not in _required(self._function):
            del values["data_dir"]
        return self._function(**{name: values[name] for name in self._names if name in values})


def named_parameters(function: Callable[..., Any], known: set[str], what: str, *, first: int = 0) -> list[str]:
    """Those of a function's parameters that are in `known`, the `first` ones aside, which are given by position.

    Raises:
        TaskError: it takes fewer than `first`, or another one has no default.
    """
    parameters = list(_signature(function).parameters.values())
    by_position = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    takes_any = any(each.kind is each.VAR_POSITIONAL for each in parameters)
    if len(by_position) < first and not takes_any:
        raise TaskError(f"{what}{_signature(function)}: expected at least {first} parameters")
    given = by_position[:first]
    rest = [
        each for each in parameters if each not in given and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    strangers = [each.name for each in rest if each.name not in known and each.default is each.empty]
    if strangers:
        raise TaskError(
            f"{what}{_signature(function)}: nobody can say what {', '.join(strangers)} should be: give a default, or "
            f"wrap it in a function that does. Known are {', '.join(sorted(known))}"
        )
    return [each.name for each in rest if each.name in known]


def round_config(spec: TrainSpec) -> dict[str, bool | int | float | str]:
    """A round's configuration as a dictionary; the run's `task_options` are in it by their own names, and win."""
    return {
        "server_round": spec.round_num,
        "round_num": spec.round_num,
        "local_epochs": spec.local_epochs,
        "batch_size": spec.batch_size,
        "learning_rate": spec.learning_rate,
        "momentum": spec.momentum,
        "seed": spec.seed,
        **spec.extra,
    }


def numbers_of(metrics: Mapping[Any, Any]) -> dict[str, float]:
    """Those entries that are numbers, also of NumPy or in a tensor of one element: nothing else travels."""
    found = {str(name): number(value) for name, value in metrics.items()}
    return {name: value for name, value in found.items() if value is not None}


def number(value: Any) -> float | None:
    """`value` as a float; None where it is no number."""
    if isinstance(value, str | bytes):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Every global generator starts from `seed` within, and goes on where it was after: Python's, NumPy's, torch's.

    torch is not imported for it; where the user's code has not done so, it draws nothing from torch.
    """
    kept = random.getstate(), np.random.get_state()  # noqa: NPY002  it is the global one that users draw from
    torch: Any = sys.modules.get("torch")
    with torch.random.fork_rng(devices=[]) if torch is not None else contextlib.nullcontext():
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        if torch is not None:
            torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])  # noqa: NPY002


def _of_data(spec: DataSpec) -> dict[str, Any]:
    return {
        "spec": spec,
        "data_dir": spec.data_dir,
        "download": spec.download,
        "classes": spec.classes,
        "partition": spec.partition,
        "part": spec.part,
        "partition_id": spec.part,
        "num_parts": spec.num_parts,
        "num_partitions": spec.num_parts,
    }


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """Of a function in C that does not tell: none."""
    try:
        return inspect.signature(function)
    except ValueError:
        return inspect.Signature()


def _required(function: Callable[..., Any]) -> set[str]:
    return {name for name, each in _signature(function).parameters.items() if each.default is each.empty}
