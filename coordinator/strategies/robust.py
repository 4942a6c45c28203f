"""Robust rules: the next model when some agents may send anything.

    median          middle of each element                     D. Yin, Y. Chen, K. Ramchandran, P. Bartlett: Byzantine-Robust
    trimmed-mean    mean of each element without its extremes  Distributed Learning: Towards Optimal Statistical Rates, ICML
                                                               2018, https://arxiv.org/abs/1803.01498 (Definitions 1 and 2)
    krum            the update that is nearest to the others   P. Blanchard, E. M. El Mhamdi, R. Guerraoui, J. Stainer:
    multi-krum      the mean of the nearest ones               Machine Learning with Adversaries: Byzantine Tolerant Gradient
                                                               Descent, NeurIPS 2017, https://arxiv.org/abs/1703.02757

All updates weigh the same: how many examples it had is what an agent says of itself. All elements count, running statistics of
normalisation layers too: what a rule leaves out of account, an attacker may choose.

**They take an honest update that differs from the others for a hostile one.** Where agents have different labels, what only a
few of them know is lost: with two digits each and nobody hostile, 30 rounds of `digits` come to 88 % with the mean, 76 with the
median and 20 with Krum (`benchmarks/robust.py`). So none is a default, and each says so at the start of a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from coordinator.strategies.base import Cohort, Shares, Step, Strategy, require, require_whole

_ULPS = 1e-9
"""So that a fifth of ten is two, however 0.2 is rounded."""
_COST = (
    "{rule}, so what only a few agents know is lost where their labels differ: with two digits each and nobody hostile, "
    "30 rounds of digits come to {accuracy} %, and to 88 % with fedavg; use it where data are alike"
)


@dataclass(frozen=True, kw_only=True)
class _Robust(Strategy):
    """What they share: equal weights, and a step of `server_learning_rate` towards what the rule comes to.

    Attributes:
        server_learning_rate: factor on the step, above 0.
    """

    server_learning_rate: float = 1.0

    def __post_init__(self) -> None:
        require(self, "server_learning_rate", above=0)

    def weight(self, num_examples: int) -> float:  # noqa: ARG002
        """1, whatever the agent says that it has."""
        return 1.0

    def apply(
        self,
        global_block: NDArray[np.float32],
        mean_block: NDArray[np.float64],
        state_blocks: Sequence[NDArray[np.float32]],  # noqa: ARG002  it has none
        step: Step,  # noqa: ARG002
    ) -> NDArray[np.float32]:
        """What the rule came to, or `global + server_learning_rate * (that - global)`, rounded to float32 once."""
        if self.server_learning_rate != 1:
            np.subtract(mean_block, global_block, out=mean_block)
            np.multiply(mean_block, self.server_learning_rate, out=mean_block)
            np.add(mean_block, global_block, out=mean_block)
        return mean_block.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Median(_Robust):
    """The coordinate-wise median; of an even number, the mean of the two in the middle. Fewer than half may be hostile."""

    replaces_mean: ClassVar[bool] = True
    caution: ClassVar[str] = _COST.format(rule="a median takes the middle of each element", accuracy=76)

    @property
    def min_updates(self) -> int:
        """3: the median of two is their mean."""
        return 3

    def centre(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """float64[n], the middle of each column."""
        rows.sort(axis=0)
        middle: NDArray[np.float64] = np.add(0.5 * rows[(len(rows) - 1) // 2], 0.5 * rows[len(rows) // 2])
        middle += 0.0  # -0 becomes 0: which of the two is sorted first is by chance
        return middle


@dataclass(frozen=True, kw_only=True)
class TrimmedMean(_Robust):
    """The coordinate-wise mean without the `floor(trim * k)` largest and smallest of k values. As many may be hostile.

    Attributes:
        trim: share that is left out at either end, above 0 and below 0.5.
    """

    replaces_mean: ClassVar[bool] = True
    caution: ClassVar[str] = _COST.format(rule="a trimmed mean drops the extremes of each element", accuracy=77)

    trim: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "trim", above=0, below=0.5)

    @property
    def name(self) -> str:
        """As it is chosen."""
        return "trimmed-mean"

    @property
    def min_updates(self) -> int:
        """So many that one is left out at either end: of fewer it would be the mean."""
        return math.ceil(1 / self.trim - _ULPS)

    def centre(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """float64[n], of each column the mean of what is left."""
        rows.sort(axis=0)
        num_trimmed = math.floor(self.trim * len(rows) + _ULPS)
        kept = rows[num_trimmed : len(rows) - num_trimmed]
        total = np.zeros(rows.shape[1])
        for row in kept:  # one after the other: NumPy would add a single column in another order
            total += row
        total /= len(kept)
        return total


@dataclass(frozen=True, kw_only=True)
class _Nearest(_Robust):
    """What Krum and Multi-Krum share: an update's score is the sum of its squared distances to its k - f - 2 nearest others.

    Attributes:
        num_byzantine: f, how many of the k updates may be hostile, at least 0. The paper needs k >= 2 f + 3.
    """

    needs_distances: ClassVar[bool] = True

    num_byzantine: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole(self, "num_byzantine", at_least=0)

    @property
    def min_updates(self) -> int:
        """2 f + 3."""
        return 2 * int(self.num_byzantine) + 3

    def nearest(self, cohort: Cohort) -> NDArray[np.intp]:
        """The updates in the order of their scores; of equal ones, the agent first whose id is first."""
        assert cohort.distances is not None
        num_others = len(cohort.weights) - int(self.num_byzantine) - 2
        scores = [math.fsum(sorted(np.delete(row, number))[:num_others]) for number, row in enumerate(cohort.distances)]
        return np.argsort(scores, kind="stable")


@dataclass(frozen=True, kw_only=True)
class Krum(_Nearest):
    """The one update whose score is least, to the bit. All others are thrown away."""

    caution: ClassVar[str] = _COST.format(rule="Krum takes one agent's update and drops all others", accuracy=20)

    def shares(self, cohort: Cohort) -> Shares:
        """1 for the nearest."""
        return _equal(cohort, self.nearest(cohort)[:1])


@dataclass(frozen=True, kw_only=True)
class MultiKrum(_Nearest):
    """The mean of the `num_chosen` updates whose scores are least.

    Attributes:
        num_chosen: m, from 1 to k - f - 2; 0 for as many as that.
    """

    caution: ClassVar[str] = _COST.format(rule="Multi-Krum drops the updates that differ most", accuracy=64)

    num_chosen: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole(self, "num_chosen", at_least=0)

    @property
    def name(self) -> str:
        """As it is chosen."""
        return "multi-krum"

    @property
    def min_updates(self) -> int:
        """The larger of 2 f + 3 and m + f + 2."""
        return max(super().min_updates, int(self.num_chosen) + int(self.num_byzantine) + 2)

    def shares(self, cohort: Cohort) -> Shares:
        """The same for each of the nearest."""
        num_chosen = int(self.num_chosen) or len(cohort.weights) - int(self.num_byzantine) - 2
        return _equal(cohort, self.nearest(cohort)[:num_chosen])


def _equal(cohort: Cohort, chosen: NDArray[np.intp]) -> Shares:
    kept = set(chosen.tolist())
    return Shares(tuple(1 / len(kept) if number in kept else 0.0 for number in range(len(cohort.weights))))
