"""Strategies by name. A new one is a file here with a frozen dataclass, and a line in the table below."""

from __future__ import annotations

import dataclasses
from typing import Any

from coordinator.strategies.base import Strategy, StrategyError
from coordinator.strategies.fedavg import FedAvg

__all__ = ["STRATEGIES", "FedAvg", "Strategy", "StrategyError", "make_strategy"]

STRATEGIES: dict[str, type[FedAvg]] = {"fedavg": FedAvg}


def make_strategy(name: str, **options: Any) -> Strategy:
    """The strategy of this name, with its options as its class documents them.

    Raises:
        StrategyError: there is none of this name, or it has no such option, or an option is out of its range.
    """
    if name not in STRATEGIES:
        raise StrategyError(f"strategy {name!r}: expected one of {', '.join(sorted(STRATEGIES))}")
    known = {field.name for field in dataclasses.fields(STRATEGIES[name])}
    for option in options:
        if option not in known:
            raise StrategyError(f"strategy {name} has no option {option!r}: expected any of {', '.join(sorted(known))}")
    return STRATEGIES[name](**options)
