"""Strategies by name, as an operator writes it, with their options.

A name is one of

    fedavg                    a built-in strategy
    package.module:object     a class of any module that can be imported
    path/to/file.py:object    a class in a file, the path as seen from where the coordinator is started

where the object is a class, or a function, that gives a `Strategy` when called with the options.

**Importing is running.** What a name names is imported: it comes from the operator's own configuration, never from a peer.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from coordinator.strategies.base import Strategy, StrategyError
from coordinator.strategies.cyclic import Cyclic
from coordinator.strategies.fedavg import FedAvg, FedProx
from coordinator.strategies.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from coordinator.strategies.robust import Krum, Median, MultiKrum, TrimmedMean

Scalar = bool | int | float | str

STRATEGIES: dict[str, type[Strategy]] = {
    kind.__name__.lower(): kind for kind in (FedAvg, FedProx, FedAvgM, FedAdagrad, FedAdam, FedYogi, Cyclic)
} | {"median": Median, "trimmed-mean": TrimmedMean, "krum": Krum, "multi-krum": MultiKrum}
SETTINGS = ("server_learning_rate", "weighting", "clip_to_median")
"""Options of strategies that are settings of their own."""

_REFERENCE = re.compile(r"(?:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*|.*\.py):[A-Za-z_]\w*")


def find_strategy(name: str) -> Callable[..., Strategy]:
    """What makes the strategy of this name when called with its options.

    Raises:
        StrategyError: there is none of this name, or its module cannot be imported; says which, and what to do.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    if _REFERENCE.fullmatch(name) is None:
        built_in = ", ".join(sorted(STRATEGIES))
        raise StrategyError(
            f"is {name!r}: not known.{_nearest(name, STRATEGIES)} Known are {built_in}; yours is named as "
            "package.module:object or path/to/file.py:object",
            "strategy",
        )
    module_name, _, attribute = name.rpartition(":")
    module = _import_file(name, Path(module_name)) if module_name.endswith(".py") else _import(name, module_name)
    found = getattr(module, attribute, None)
    if not callable(found):
        public = [one for one in vars(module) if not one.startswith("_")]
        raise StrategyError(
            f"is {name!r}: {module_name} has no class {attribute!r}.{_nearest(attribute, public)}", "strategy"
        )
    made: Callable[..., Strategy] = found
    return made


def option_names(factory: Callable[..., Strategy]) -> list[str]:
    """What may be given to it, in its own order."""
    if isinstance(factory, type) and dataclasses.is_dataclass(factory):
        return [field.name for field in dataclasses.fields(factory) if field.init]
    parameters = inspect.signature(factory).parameters.values()
    return [one.name for one in parameters if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)]


def make_strategy(
    name: str,
    options: Mapping[str, Scalar] | None = None,
    *,
    server_learning_rate: float | None = None,
    weighting: str | None = None,
    clip_to_median: float | None = None,
) -> Strategy:
    """The strategy of this name.

    Args:
        name: see the head of this file.
        options: its own, as its class documents them.
        server_learning_rate: None for the strategy's own.
        weighting: None for the strategy's own.
        clip_to_median: None for the strategy's own, which is not to clip.

    Raises:
        StrategyError: there is none of this name, or it has no such option, or an option is out of its range.
    """
    factory = find_strategy(name)
    known = option_names(factory)
    given: dict[str, Any] = {}
    for option, value in (options or {}).items():
        if option in SETTINGS:
            raise StrategyError(f"has {option}: give it as the setting {option}", "strategy_options")
        if option not in known:
            own = ", ".join(one for one in known if one not in SETTINGS)
            legal = f"Its options are {own}" if own else "It has none"
            text = f"has {option!r}: {name} has no such option.{_nearest(option, known)} {legal}"
            raise StrategyError(text, "strategy_options")
        given[option] = value
    for setting, choice in zip(SETTINGS, (server_learning_rate, weighting, clip_to_median), strict=True):
        if choice is None:
            continue
        if setting not in known:
            raise StrategyError(f"is {choice!r}, and strategy {name} has none: leave it out", setting)
        given[setting] = choice
    return _made(name, factory, given)


def options_of(strategy: Strategy, given: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """All options with which this strategy works, those that were not given too, but for those that are settings."""
    kind: Any = type(strategy)
    options: dict[str, Any] = dict(given)
    if dataclasses.is_dataclass(kind):
        options = {field.name: getattr(strategy, field.name) for field in dataclasses.fields(kind) if field.init}
    return {
        key: float(value) if isinstance(value, int) and not isinstance(value, bool) else value
        for key, value in options.items()
        if key not in SETTINGS
    }


def _made(name: str, factory: Callable[..., Strategy], given: Mapping[str, Any]) -> Strategy:
    try:
        strategy: object = factory(**given)
    except StrategyError:
        raise
    except Exception as error:  # it is somebody's code
        raise StrategyError(f"is {name!r}: making it failed: {type(error).__name__}: {error}", "strategy") from error
    if not isinstance(strategy, Strategy):
        raise StrategyError(
            f"is {name!r}: it gives a {type(strategy).__name__}: expected a subclass of coordinator.strategies.Strategy",
            "strategy",
        )
    return strategy


def _import(name: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(missing + "."):
            raise StrategyError(
                f"is {name!r}: no module {missing!r} is found: install it, name its directory in PYTHONPATH, or give the "
                "path of its file",
                "strategy",
            ) from None
        raise StrategyError(f"is {name!r}: it imports {missing!r}, which is not installed", "strategy") from None
    except Exception as error:  # a module may raise anything while it runs
        text = f"is {name!r}: importing {module_name} failed: {type(error).__name__}: {error}"
        raise StrategyError(text, "strategy") from error


def _import_file(name: str, path: Path) -> ModuleType:
    """The module in a file, once for each content: a name of its own keeps it apart from every other module."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StrategyError(f"is {name!r}: {path}: {error.strerror}", "strategy") from None
    digest = hashlib.sha256(str(path.resolve()).encode() + content).hexdigest()[:16]
    module_name = f"midge_strategy_{digest}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path, loader=_AsItIs(module_name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # before it runs: dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        text = f"is {name!r}: running {path} failed: {type(error).__name__}: {error}"
        raise StrategyError(text, "strategy") from error
    return module


class _AsItIs(SourceFileLoader):
    """Compiles a file whenever it is asked to: what Python keeps compiled is told apart by second and size alone."""

    def path_stats(self, path: str) -> NoReturn:
        """Of no file is anything known by which a compiled one could be found or kept."""
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), path)


def _nearest(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word.lower(), known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
