"""Strategies: how the updates of a round become the next model. docs/strategies.md has them side by side.

Files
base         what a strategy is
fedavg       FedAvg and FedProx
fedopt       FedAvgM, FedAdagrad, FedAdam, FedYogi
cyclic       one agent at a time
registry     strategies by name, yours too
conformance  what every strategy must hold to, as a check that you can run on yours
"""

from __future__ import annotations

from coordinator.strategies.base import Averaging, Step, Strategy, StrategyError, require
from coordinator.strategies.cyclic import Cyclic
from coordinator.strategies.fedavg import FedAvg, FedProx
from coordinator.strategies.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from coordinator.strategies.registry import STRATEGIES, make_strategy

__all__ = [
    "STRATEGIES",
    "Averaging",
    "Cyclic",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedProx",
    "FedYogi",
    "Step",
    "Strategy",
    "StrategyError",
    "make_strategy",
    "require",
]
