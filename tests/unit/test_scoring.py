"""What agents tell of a round, put together: means over their examples."""

from __future__ import annotations

from coordinator.run_events import AcceptedUpdate
from coordinator.scoring import training_metrics


def update(agent_id: str, num_examples: int, **metrics: float) -> AcceptedUpdate:
    return AcceptedUpdate(agent_id, 1, "ab" * 32, num_examples, (), 0.5, metrics=metrics)


def test_metrics_of_the_training_are_means_over_examples_of_what_all_agents_told():
    updates = [
        (1, update("a", 10, loss=1.0, only_a=5.0)),
        (1, update("b", 30, loss=2.0)),
        (2, update("a", 10)),
    ]
    assert training_metrics(updates) == {1: {"loss": 1.75}, 2: {}}  # (10 * 1 + 30 * 2) / 40
    assert training_metrics([]) == {}
