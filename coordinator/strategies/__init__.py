"""Strategies: how the updates of a round become the next model. docs/strategies.md has them side by side.

Files
base         what a strategy is
fedavg       FedAvg and FedProx
fedopt       FedAvgM, FedAdagrad, FedAdam, FedYogi
cyclic       one agent at a time
robust       median, trimmed mean, Krum, Multi-Krum
registry     strategies by name, yours too
conformance  what every strategy must hold to, as a check that you can run on yours
"""

from __future__ import annotations

from coordinator.strategies.base import Averaging, Cohort, Shares, Step, Strategy, StrategyError, require
from coordinator.strategies.cyclic import Cyclic
from coordinator.strategies.fedavg import FedAvg, FedProx
from coordinator.strategies.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from coordinator.strategies.registry import STRATEGIES, make_strategy
from coordinator.strategies.robust import Krum, Median, MultiKrum, TrimmedMean

__all__ = [
    "STRATEGIES",
    "Averaging",
    "Cohort",
    "Cyclic",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedProx",
    "FedYogi",
    "Krum",
    "Median",
    "MultiKrum",
    "Shares",
    "Step",
    "Strategy",
    "StrategyError",
    "TrimmedMean",
    "make_strategy",
    "require",
]
