"""Files with the ten keys of another system: chapter 3 of the book Practicing Federated Learning, whose JSON is read as it is.

    {"model_name": "resnet18", "no_models": 10, "type": "cifar", "global_epochs": 20, "local_epochs": 3, "k": 6,
     "batch_size": 32, "lr": 0.001, "momentum": 0.0001, "lambda": 0.1}

| key | here |
| --- | --- |
| `type`, `model_name` | `task`: `cifar` with `resnet18` is `cifar10`, `mnist` with `cnn` is `mnist` |
| `no_models` | `start_agents`: so many there are, before k of them are drawn each round |
| `k` | `cohort` and `min_agents`, with `over_select` 1: exactly so many are drawn and waited for |
| `global_epochs`, `local_epochs`, `batch_size`, `lr`, `momentum` | `rounds`, the same two, `learning_rate`, `momentum` |
| `lambda` | `server_learning_rate`, with `weighting` "sum": G + lambda * sum (L_i - G) |

A file with these keys has all of them and no other. The environment, options and --set win over it, as over any file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from midge.settings import Entry, Problem

KEYS = (
    *("model_name", "no_models", "type", "global_epochs", "local_epochs"),
    *("k", "batch_size", "lr", "momentum", "lambda"),
)
TASKS = {("cifar", "resnet18"): "cifar10", ("mnist", "cnn"): "mnist"}
"""The task for a data set and a model."""
_TELLING = frozenset({"no_models", "global_epochs", "lambda"})
"""Whatever has one of these is such a file: they are no settings, nor nearly."""
_OURS = {
    "no_models": ("start_agents",),
    "k": ("cohort", "min_agents"),
    "global_epochs": ("rounds",),
    "local_epochs": ("local_epochs",),
    "batch_size": ("batch_size",),
    "lr": ("learning_rate",),
    "momentum": ("momentum",),
    "lambda": ("server_learning_rate",),
}


def translate(values: Mapping[str, Any], settings: Collection[str]) -> tuple[list[Entry], list[Problem]] | None:
    """Our settings for a file's keys and values, and what is wrong with these; None where it is no such file.

    Args:
        values: the file's.
        settings: the names of ours.
    """
    if _TELLING.isdisjoint(values):
        return None
    problems = [_stranger(key, settings) for key in values if key not in KEYS]
    missing = [key for key in KEYS if key not in values]
    if missing:
        telling = next(key for key in values if key in _TELLING)
        problems.append(Problem(telling, f"is there, but not {', '.join(missing)}: such a file has {', '.join(KEYS)}"))
    entries = [Entry(ours, values[key], key) for key, names in _OURS.items() if key in values for ours in names]
    if "type" in values and "model_name" in values:
        task = TASKS.get((str(values["type"]), str(values["model_name"])))
        if task is None:
            problems.append(_unknown_task(values))
        else:
            entries.append(Entry("task", task, "type"))
    if "lambda" in values:
        entries.append(Entry("weighting", "sum", "lambda"))
    if "k" in values:
        entries.append(Entry("over_select", 1.0, "k"))
    return entries, problems + _too_many(values)


def _stranger(key: str, settings: Collection[str]) -> Problem:
    if key in settings:
        return Problem(
            key, f"is a key of Midge's own, among {', '.join(KEYS)}: keep to one kind, or use --set {key}=..."
        )
    return Problem(key, f"is unknown: such a file has {', '.join(KEYS)}")


def _unknown_task(values: Mapping[str, Any]) -> Problem:
    seen = f"is {str(values['type'])[:80]!r} with model_name {str(values['model_name'])[:80]!r}"
    known = ", ".join(f"{kind!r} with {model!r}" for kind, model in TASKS)
    own = "for another model, write a task (midge/tasks/cifar10.py shows how), and a file with Midge's own keys"
    return Problem("type", f"{seen}: expected {known}; {own}")


def _too_many(values: Mapping[str, Any]) -> list[Problem]:
    drawn, there = values.get("k"), values.get("no_models")
    if isinstance(drawn, int) and isinstance(there, int) and drawn > there:
        return [Problem("k", f"is {drawn}, above no_models ({there}): k of the no_models agents are drawn each round")]
    return []
