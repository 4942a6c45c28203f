"""What the settings make of a run: `RunConfig`, as its machines want it."""

from __future__ import annotations

from coordinator.config import Settings
from coordinator.held_out import HeldOutGate
from coordinator.quarantine import QuarantineConfig
from coordinator.round import RoundConfig
from coordinator.run_config import RunConfig
from coordinator.strategies import Strategy
from midge.wire.identifiers import task_name
from midge.wire.messages import TrainingConfig


def run_config(run_id: str, settings: Settings, strategy: Strategy) -> RunConfig:
    """What a run is, by its settings."""
    quorum, one = settings.needed_updates, strategy.in_turn
    held_out = HeldOutGate(max_loss_ratio=settings.max_loss_ratio, max_accuracy_drop=settings.max_accuracy_drop)
    training = TrainingConfig(
        local_epochs=settings.local_epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        momentum=settings.momentum,
        evaluate_every=settings.evaluate_every,
        extra=dict(settings.task_options),
    )
    return RunConfig(
        run_id=run_id,
        task=task_name(settings.task),
        rounds=settings.rounds,
        seed=settings.seed,
        round=RoundConfig(
            target=1 if one else settings.cohort,
            minimum=1 if one else max(settings.min_agents, quorum),
            quorum=1 if one else quorum,
            over_select=1.0 if one else settings.over_select,
            selection_deadline_s=settings.selection_deadline_s,
            acceptance_deadline_s=settings.acceptance_deadline_s,
            report_deadline_s=settings.round_deadline_s,
            in_turn=one,
            is_checked=held_out.is_on,
            visit_order=settings.visit_order,
        ),
        training=strategy.training(training),
        min_agents=max(settings.min_agents, quorum),
        start_agents=settings.start_agents,
        labels=dict(settings.select),
        start_deadline_s=settings.start_deadline_s,
        max_attempts=settings.max_attempts,
        max_examples=settings.max_examples,
        norm_bound=settings.norm_bound,
        held_out=held_out,
        quarantine=QuarantineConfig(
            after=settings.quarantine_after, window=settings.quarantine_window, rounds=settings.quarantine_rounds
        ),
        evaluate=settings.evaluate,
        best_metric=settings.best_metric,
        best_is_max=settings.best_mode == "max",
    )
