"""What a run is, as its machines see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from coordinator.round import RoundConfig
from midge.wire.messages import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run is. Every bound is in seconds or a count; docs/configuration.md explains each."""

    run_id: str
    task: str
    rounds: int
    seed: int = 0
    round: RoundConfig = field(default_factory=RoundConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    labels: Mapping[str, str] = field(default_factory=dict)
    start_deadline_s: float = 3600.0
    max_attempts: int = 5
    max_examples: int = 10_000_000
    norm_bound: float = 0.0
    evaluate: bool = True
    best_metric: str = "accuracy"
    best_is_max: bool = True
