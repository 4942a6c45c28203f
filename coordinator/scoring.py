"""How the versions of a run do: which evaluations are owed, what the agents found, and which version is best so far. Pure.

A version is scored on the coordinator's test data, where the task has some: the *central* evaluation. Beside it stands what
agents found on their own data before they trained from it: the *federated* one. The best version is judged by the first, and
by the second only where there is no test data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from coordinator import run_events as ev
from coordinator.run_config import RunConfig, Version
from midge.wire.messages import Evaluation


class Scoring:
    """The scores of one run.

    Attributes:
        best: (round, value) of the best version so far.
        owed: versions under evaluation, by round, with their digests.
    """

    def __init__(self, config: RunConfig) -> None:
        self.best: tuple[int, float] | None = None
        self.owed: dict[int, str] = {}
        self._config = config
        self._has_test_data = config.evaluate

    def restore(self, best: tuple[int, float] | None, unevaluated: Iterable[Version]) -> None:
        """Go on where an earlier process was: it owed these evaluations."""
        self.best = best
        if self._config.evaluate:
            self.owed = {each.round_num: each.digest for each in unevaluated if self._is_due(each.round_num)}

    def begin(self, version: Version) -> list[ev.Command]:
        """A version is there: have it evaluated, where that can be done."""
        if not self._has_test_data or not self._is_due(version.round_num):
            return []
        self.owed[version.round_num] = version.digest
        return [ev.EvaluateModel(version.round_num, version.digest)]

    def repeat(self) -> list[ev.Command]:
        """Ask again for what is owed: an earlier process did, and its answers are lost."""
        return [ev.EvaluateModel(round_num, digest) for round_num, digest in self.owed.items()]

    def take(self, event: ev.ModelEvaluated) -> list[ev.Command]:
        """An evaluation is done, or could not be."""
        self.owed.pop(event.round_num, None)
        if event.score is None:
            # No reason means that the task has no test data: then the agents' own evaluation decides what is best.
            self._has_test_data = self._has_test_data and bool(event.reason)
            return []
        self._improve(event.round_num, event.score)
        return [ev.SaveEvaluation(event.round_num, "central", event.score)]

    def take_federated(self, base: Version, counted: Sequence[ev.AcceptedUpdate]) -> list[ev.Command]:
        """What the agents of a round found of the version that they trained from: the mean, weighted by their examples."""
        scores = [update.evaluation for update in counted if update.evaluation is not None]
        if not scores:
            return []
        total = sum(score.num_examples for score in scores)
        names = set.intersection(*(set(score.metrics) for score in scores))
        score = Evaluation(
            num_examples=min(total, 2**53),  # all that it may say; each agent alone may say as much
            loss=sum(score.loss * (score.num_examples / total) for score in scores),
            metrics={name: sum(s.metrics[name] * (s.num_examples / total) for s in scores) for name in sorted(names)},
        )
        if not self._has_test_data:
            self._improve(base.round_num, score)
        return [ev.SaveEvaluation(base.round_num, "federated", score)]

    def _is_due(self, round_num: int) -> bool:
        """Whether the coordinator evaluates this version."""
        return round_num % self._config.training.evaluate_every == 0 or round_num == self._config.rounds

    def _improve(self, round_num: int, score: Evaluation) -> None:
        metric = self._config.best_metric
        value = score.loss if metric == "loss" else score.metrics.get(metric)
        if value is None or not math.isfinite(value):
            return
        sign = 1 if self._config.best_is_max else -1
        if self.best is None or sign * value > sign * self.best[1]:
            self.best = (round_num, value)


def training_metrics(updates: Iterable[tuple[int, ev.AcceptedUpdate]]) -> dict[int, dict[str, float]]:
    """By round, what its agents told of their training: means over their examples, of the metrics that all of them told."""
    by_round: dict[int, list[ev.AcceptedUpdate]] = {}
    for round_num, update in updates:
        by_round.setdefault(round_num, []).append(update)
    means = {}
    for round_num, counted in by_round.items():
        total = sum(update.num_examples for update in counted)
        names = set.intersection(*(set(update.metrics) for update in counted))
        means[round_num] = {
            name: sum(update.metrics[name] * (update.num_examples / total) for update in counted)
            for name in sorted(names)
        }
    return means
