"""The held-out gate: a candidate that does much worse than its parent on the coordinator's test data is not committed. Pure.

A *candidate* is what the updates of an attempt were aggregated to, before it is a version; its *parent* is the version that
they were trained on. A candidate that is refused leaves the model as it is. The next attempt at the round leaves out the update
that reached furthest, since the same updates would come to the same candidate. That is a guess at whom to blame, and counts as
a strike (quarantine.py). What cannot be evaluated is not committed either.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from coordinator.run_events import ModelEvaluated
from midge.wire.messages import Evaluation


@dataclass(frozen=True, kw_only=True)
class HeldOutGate:
    """How much worse a candidate may do.

    Attributes:
        max_loss_ratio: its loss, over its parent's; 0 for no bound. A parent with a loss of 0 or below sets none.
        max_accuracy_drop: its parent's accuracy less its own, both fractions; 0 for no bound.
    """

    max_loss_ratio: float = 0.0
    max_accuracy_drop: float = 0.0

    @property
    def is_on(self) -> bool:
        """Whether candidates are judged at all."""
        return bool(self.max_loss_ratio or self.max_accuracy_drop)

    def objection(self, candidate: Evaluation, parent: Evaluation | None) -> str:
        """Why a candidate is refused, in words; empty where it is not. Without a parent's score nothing is worse than it."""
        if parent is None:
            return ""
        if self.max_loss_ratio and parent.loss > 0 and candidate.loss > self.max_loss_ratio * parent.loss:
            return (
                f"its loss on test data is {candidate.loss:.4g}, its parent's {parent.loss:.4g}: "
                f"{candidate.loss / parent.loss:.3g} times as much, and max_loss_ratio is {self.max_loss_ratio:g}"
            )
        ours, before = candidate.metrics.get("accuracy"), parent.metrics.get("accuracy")
        if (
            self.max_accuracy_drop
            and ours is not None
            and before is not None
            and before - ours > self.max_accuracy_drop
        ):
            return (
                f"its accuracy on test data is {ours:.4g}, its parent's {before:.4g}: {before - ours:.3g} less, and "
                f"max_accuracy_drop is {self.max_accuracy_drop:g}"
            )
        return ""

    def impossible(self, score: Evaluation | None) -> str:
        """Why nothing can be judged by such scores, in words; empty where it can."""
        if score is None:
            return (
                "max_loss_ratio or max_accuracy_drop is set, and the task has no test data on the coordinator: "
                "give it some (data_dir), or leave them out"
            )
        if self.max_accuracy_drop and not self.max_loss_ratio and "accuracy" not in score.metrics:
            return "max_accuracy_drop is set, and the task tells no accuracy: use max_loss_ratio"
        return ""


class Judging:
    """Candidates of one run beside their parents.

    Args:
        gate: how much worse they may do.
        score: of the current version on test data, where it is known.
    """

    def __init__(self, gate: HeldOutGate, score: Evaluation | None = None) -> None:
        self._gate = gate
        self._score = score
        self._passed: ModelEvaluated | None = None

    def take(self, event: ModelEvaluated) -> str:
        """The current version was evaluated; why no candidate can be judged by that, in words, or empty."""
        self._score = event.score
        return self._gate.impossible(event.score) if self._gate.is_on and not event.reason else ""

    def objection(self, event: ModelEvaluated) -> str:
        """The candidate was evaluated; why it is refused, in words, or empty."""
        if event.score is None:
            return f"it could not be evaluated: {event.reason or 'there are no test data'}"
        reason = self._gate.objection(event.score, self._score)
        if not reason:
            self._passed = event
        return reason

    def commit(self) -> ModelEvaluated | None:
        """The candidate is a version; its evaluation, where it had to pass."""
        passed, self._passed = self._passed, None
        self._score = None if passed is None else passed.score
        return passed


def furthest(norms: Iterable[tuple[str, float]]) -> str:
    """The agent whose delta is longest; of equal ones, the last by id."""
    return max((norm, agent_id) for agent_id, norm in norms)[1]
