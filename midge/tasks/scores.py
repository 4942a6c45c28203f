"""What of a task's figures can travel. A task may report anything: NumPy's numbers, NaN, accuracies of a thousand labels."""

from __future__ import annotations

from collections.abc import Mapping

from midge.tasks.base import Score
from midge.tasks.user_code import numbers_of
from midge.wire.messages import Evaluation

_LARGEST = 1e300
_MAX_METRICS = 64
_MAX_NAME_LENGTH = 64


def fitting(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those metrics that are finite numbers: as many, with names as long, as a message holds."""
    numbers = {name[:_MAX_NAME_LENGTH]: value for name, value in numbers_of(metrics).items()}
    fit = [(name, number) for name, number in numbers.items() if abs(number) <= _LARGEST]
    return dict(fit[:_MAX_METRICS])


def to_evaluation(score: Score) -> Evaluation | None:
    """The score as it travels; None where there were no examples, or the loss is not finite."""
    loss = float(score.loss)  # first: NumPy would make the limit a float32 too, and infinity would not be above it
    if score.num_examples < 1 or not abs(loss) <= _LARGEST:
        return None
    return Evaluation(num_examples=int(score.num_examples), loss=loss, metrics=fitting(score.metrics))
