"""What a strategy is: how much each update weighs, how the global model moves, and what it remembers from round to round.

A strategy sees one block of elements at a time, never a whole model, so that memory does not depend on the model's size and
blocks are folded in parallel. It is therefore elementwise: element i of the next model depends on element i alone, of the
global model, of the mean and of the state.

**Robust rules** need more than a mean. A strategy may have something else in its place, made of the same elements of all
updates (`replaces_mean`, `centre`); and it may look at updates as wholes, at their norms and distances, to say how much each
counts (`shares`).

**State.** What a strategy remembers (a momentum, say) are float32 vectors of the model's length, one for each of its
`state_names`. They belong to a version of the model: they are stored with it, and handed to the round that starts from it. A
strategy itself remembers nothing, so a restart, a second attempt or another number of threads changes no bit.

docs/strategies.md shows how to write one; `coordinator.strategies.conformance` checks it.
"""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from midge.wire.messages import TrainingConfig

Weighting = Literal["examples", "uniform", "sum"]


class StrategyError(ValueError):
    """A strategy that does not exist was named, or one was given an option that it does not take.

    Args:
        text: what was seen and what was expected; it follows `key`, where there is one.
        key: the setting to complain about; empty where a strategy complains of an option.
    """

    def __init__(self, text: str, key: str = "") -> None:
        self.text = text
        self.key = key
        super().__init__(f"{key} {text}" if key else text)


@dataclass(frozen=True, slots=True)
class Step:
    """Which step is being made.

    Attributes:
        round_num: of the version in the making, from 1.
        num_updates: how many updates the mean is of, at least 1.
        num_examples: that they were trained on, the sum.
    """

    round_num: int
    num_updates: int
    num_examples: int


@dataclass(frozen=True, slots=True)
class Cohort:
    """What is known of a round's updates as wholes, in the order of agent ids.

    Attributes:
        weights: of each; they add up to 1.
        norms: L2 norm of each delta.
        distances: float64[k, k], the squared L2 distance of each two updates; None unless the strategy `needs_distances`.
    """

    weights: tuple[float, ...]
    norms: tuple[float, ...]
    distances: NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True)
class Shares:
    """How much each update counts in the mean, and the global model beside them; at least 0 each, and 1 in all."""

    updates: tuple[float, ...]
    base: float = 0.0


class Strategy(ABC):
    """How the updates of a round become the next model. Several threads use one at once: it must not change."""

    state_names: ClassVar[tuple[str, ...]] = ()
    """The vectors that it remembers, in the order in which `apply` is given them."""
    in_turn: ClassVar[bool] = False
    """Whether it visits one agent a round, each from the last one's model, and not a cohort."""
    averages_statistics: ClassVar[bool] = False
    """Whether running statistics of normalisation layers are plainly averaged, and no step is made of them: a variance that an
    optimiser moves may fall below zero."""
    replaces_mean: ClassVar[bool] = False
    """Whether `centre` stands in place of the weighted mean."""
    needs_distances: ClassVar[bool] = False
    """Whether `shares` looks at distances: then all updates are read once more."""
    caution: ClassVar[str] = ""
    """What an operator must know before using it; the log says it at the start of a run."""

    @property
    def name(self) -> str:
        """What tables call it: its class's name in small letters, unless it says otherwise."""
        return type(self).__name__.lower()

    def weight(self, num_examples: int) -> float:
        """How much an update trained on so many examples weighs, relative to the others; at least 0."""
        return float(num_examples)

    @property
    def min_updates(self) -> int:
        """The least updates that it can make a model of; a round that has fewer is abandoned."""
        return 1

    def shares(self, cohort: Cohort) -> Shares:
        """How much each update counts, now that all are there: its weight, unless the strategy says otherwise."""
        return Shares(cohort.weights)

    def centre(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """What stands in place of the mean, where `replaces_mean`: weights and shares do not count then.

        Args:
            rows: float64[k, n], the elements of each update, in the order of agent ids; it may be overwritten.

        Returns:
            float64[n]; element i depends on column i alone.
        """
        raise NotImplementedError(f"{self.name} replaces the mean, and has no centre")

    def initial_state(self) -> tuple[float, ...]:
        """What each vector of the state is filled with before the first round, in the order of `state_names`."""
        return (0.0,) * len(self.state_names)

    def training(self, config: TrainingConfig) -> TrainingConfig:
        """What agents are told, made of what the settings say."""
        return config

    @abstractmethod
    def apply(
        self,
        global_block: NDArray[np.float32],
        mean_block: NDArray[np.float64],
        state_blocks: Sequence[NDArray[np.float32]],
        step: Step,
    ) -> NDArray[np.float32]:
        """The next model's elements.

        Args:
            global_block: float32[n], of the model that was trained from; read-only.
            mean_block: float64[n], the weighted mean of what the agents had after training; it may be overwritten.
            state_blocks: float32[n] for each of `state_names`; to be overwritten with what the next round is given.
            step: which one this is.

        Returns:
            float32[n], a new array, contiguous: it is written to.
        """


@dataclass(frozen=True, kw_only=True)
class Averaging(Strategy):
    """What the strategies that step along a mean of deltas share: the weights, and a server learning rate.

    Attributes:
        server_learning_rate: factor on the step, above 0.
        weighting: "examples", an update weighs as many examples as it was trained on; "uniform", all weigh the same; "sum",
            all weigh the same, and their deltas are added up, not averaged.
        clip_to_median: a delta longer than this many times the median norm of the round's deltas is shortened to that; at
            least 1, or 0 for no clipping. Norms are bounded so by Z. Sun, P. Kairouz, A. T. Suresh, H. B. McMahan: Can You
            Really Backdoor Federated Learning?, 2019, https://arxiv.org/abs/1911.07963; that the bound follows the cohort
            is ours.

    Raises:
        StrategyError: an option is out of its range.
    """

    server_learning_rate: float = 1.0
    weighting: Weighting = "examples"
    clip_to_median: float = 0.0

    def __post_init__(self) -> None:
        require(self, "server_learning_rate", above=0)
        clip = self.clip_to_median
        if not (isinstance(clip, int | float) and (clip == 0 or 1 <= clip < math.inf)):
            # Below 1, agents that all agree would be shortened.
            raise StrategyError(f"is {clip!r}: expected a number of at least 1, or 0 for no bound", "clip_to_median")
        if self.weighting not in get_args(Weighting):
            expected = "'examples', 'uniform' or 'sum'"
            raise StrategyError(f"{self.name}: weighting is {self.weighting!r}: expected {expected}")

    def weight(self, num_examples: int) -> float:
        """`num_examples`, or 1 where all weigh the same."""
        return float(num_examples) if self.weighting == "examples" else 1.0

    def shares(self, cohort: Cohort) -> Shares:
        """The weights; a delta that is clipped counts for less, and the global model for the rest."""
        if not self.clip_to_median:
            return Shares(cohort.weights)
        bound = self.clip_to_median * statistics.median(cohort.norms)
        factors = [1.0 if norm <= bound else bound / norm for norm in cohort.norms]
        pairs = list(zip(cohort.weights, factors, strict=True))
        clipped = tuple(weight * factor for weight, factor in pairs)
        return Shares(clipped, math.fsum(weight * (1.0 - factor) for weight, factor in pairs))

    def delta(
        self, global_block: NDArray[np.float32], mean_block: NDArray[np.float64], step: Step
    ) -> NDArray[np.float64]:
        """The mean of the deltas, `local - global`, or their sum, in place of `mean_block`.

        Papers call it the pseudo-gradient; here it points downhill, to be added.
        """
        np.subtract(mean_block, global_block, out=mean_block)
        if self.weighting == "sum":
            np.multiply(mean_block, step.num_updates, out=mean_block)
        return mean_block


def require_whole(strategy: Strategy, option: str, *, at_least: int) -> None:
    """Check that an option is a whole number of at least this; 2.0 is one.

    Raises:
        StrategyError: it is not; the message says what was expected.
    """
    value = getattr(strategy, option)
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= at_least and value == value // 1:
        return
    raise StrategyError(f"{strategy.name}: {option} is {value!r}: expected a whole number of at least {at_least}")


def require(
    strategy: Strategy,
    option: str,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Check that an option is a finite number within these limits.

    Raises:
        StrategyError: it is not; the message says what was expected.
    """
    value = getattr(strategy, option)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and above < value < below and value >= at_least:
        return
    limits = (("above", above), ("of at least", at_least), ("below", below))
    words = " and ".join(f"{word} {limit:g}" for word, limit in limits if math.isfinite(limit))
    raise StrategyError(f"{strategy.name}: {option} is {value!r}: expected a finite number {words}")
