"""How models do, as an experiment notes it. Accuracies are shares from 0 to 1, and None where a task has none: a regression."""

from __future__ import annotations

import msgspec


class RoundScore(msgspec.Struct, frozen=True, kw_only=True):
    """How the model does on the test data after a round; round 0 is before any training.

    Attributes:
        num_steps: gradient steps that were made in this round, by all who took part together.
        duration_s: of the round.
        num_updates: that counted; None where there is no federation.
    """

    round: int
    loss: float | None
    accuracy: float | None
    num_steps: int
    duration_s: float
    num_updates: int | None = None


class LabelScore(msgspec.Struct, frozen=True, kw_only=True):
    """How the model does on the test examples with one label."""

    num_examples: int
    accuracy: float


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """How the model does on some examples."""

    num_examples: int
    loss: float
    accuracy: float | None


class Assessed(msgspec.Struct, frozen=True, kw_only=True, tag="assessed"):
    """How the last model does.

    Attributes:
        score: on the test data.
        by_label: on the test data, by label; empty where the task tells no labels.
        by_agent: on what each agent trains on.
    """

    score: Score
    by_label: dict[str, LabelScore]
    by_agent: dict[str, Score]

    def accuracy_without(self, labels: tuple[int, ...]) -> float:
        """The accuracy over the test examples with none of these labels; 0 where there are none."""
        others = [one for label, one in self.by_label.items() if int(label) not in labels]
        num_examples = sum(one.num_examples for one in others)
        return sum(one.accuracy * one.num_examples for one in others) / num_examples if num_examples else 0.0


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent holds: examples, and how many of each label; empty where the task's data do not tell."""

    num_examples: int
    by_label: dict[str, int]
