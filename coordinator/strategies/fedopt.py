"""Optimisers on the server: the mean delta of a round is taken for a gradient (pointing downhill), with memory.

FedAvgM is of T.-M. H. Hsu, H. Qi, M. Brown: Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification, 2019, https://arxiv.org/abs/1909.06335. The other three are Algorithm 2 of S. J. Reddi, Z. Charles, M. Zaheer,
Z. Garrett, K. Rush, J. Konečný, S. Kumar, H. B. McMahan: Adaptive Federated Optimization, ICLR 2021,
https://arxiv.org/abs/2003.00295, as it stands there: no bias correction, and tau outside of the root.

Arithmetic is float64; what is remembered is rounded to float32 after the step was made with it, once a round.

Batch normalisation's running statistics are not weights: no step is made of them, they are averaged.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from coordinator.strategies.base import Averaging, Step, require


@dataclass(frozen=True, kw_only=True)
class FedAvgM(Averaging):
    """FedAvg with momentum on the server: `v <- momentum * v + delta`, `w <- w + server_learning_rate * v`, v zero at first.

    The paper has a server learning rate of 1 and tries momenta from 0 to 0.997; 0.9 is the usual one of its figures. A step is
    in the long run 1 / (1 - momentum) times as long as FedAvg's.

    Attributes:
        momentum: share of the last step that goes on, at least 0 and below 1.
    """

    state_names: ClassVar[tuple[str, ...]] = ("momentum",)
    averages_statistics: ClassVar[bool] = True

    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "momentum", at_least=0, below=1)

    def apply(
        self,
        global_block: NDArray[np.float32],
        mean_block: NDArray[np.float64],
        state_blocks: Sequence[NDArray[np.float32]],
        step: Step,
    ) -> NDArray[np.float32]:
        """`global + server_learning_rate * (momentum * v + delta)`, rounded to float32 once."""
        (velocity,) = state_blocks
        moved = self.delta(global_block, mean_block, step)
        moved += self.momentum * velocity.astype(np.float64)
        velocity[:] = moved
        moved *= self.server_learning_rate
        moved += global_block
        return moved.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class _Adaptive(Averaging):
    """What the three adaptive strategies share.

        m <- beta1 * m + (1 - beta1) * delta
        v <- as the strategy has it
        w <- w + server_learning_rate * m / (sqrt(v) + tau)

    m starts at 0 and v at tau^2, the least that the paper allows. Elements whose deltas are far above tau move by about the
    server learning rate a round, whatever the agents' learning rate: so it is a length, not a factor, and 0.1 at first.

    Attributes:
        beta1: decay of the first moment, at least 0 and below 1.
        tau: adaptivity, above 0: elements whose deltas are below it move in proportion to them.
    """

    state_names: ClassVar[tuple[str, ...]] = ("first_moment", "second_moment")
    averages_statistics: ClassVar[bool] = True

    server_learning_rate: float = 0.1
    beta1: float = 0.9
    tau: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "beta1", at_least=0, below=1)
        require(self, "tau", above=0)

    def initial_state(self) -> tuple[float, ...]:
        """Zero, and tau squared."""
        return 0.0, float(self.tau) ** 2

    @abstractmethod
    def second_moment(self, before: NDArray[np.float64], squares: NDArray[np.float64]) -> NDArray[np.float64]:
        """The v of this round, float64[n], from the last one's and the squares of the deltas."""

    def apply(
        self,
        global_block: NDArray[np.float32],
        mean_block: NDArray[np.float64],
        state_blocks: Sequence[NDArray[np.float32]],
        step: Step,
    ) -> NDArray[np.float32]:
        """`global + server_learning_rate * m / (sqrt(v) + tau)`, rounded to float32 once."""
        first, second = state_blocks
        delta = self.delta(global_block, mean_block, step)
        v = self.second_moment(second.astype(np.float64), delta * delta)
        m = self.beta1 * first.astype(np.float64) + (1.0 - self.beta1) * delta
        first[:], second[:] = m, v
        m *= self.server_learning_rate
        m /= np.sqrt(v) + self.tau
        m += global_block
        return m.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(_Adaptive):
    """`v <- v + delta^2`: steps become shorter for ever. beta1 is 0, as in the paper: Adagrad has no momentum."""

    beta1: float = 0.0

    def second_moment(self, before: NDArray[np.float64], squares: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum of all squares so far."""
        return before + squares


@dataclass(frozen=True, kw_only=True)
class FedAdam(_Adaptive):
    """`v <- beta2 * v + (1 - beta2) * delta^2`. The paper's beta1 = 0.9, beta2 = 0.99 and tau = 0.001.

    Attributes:
        beta2: decay of the second moment, at least 0 and below 1.
    """

    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "beta2", at_least=0, below=1)

    def second_moment(self, before: NDArray[np.float64], squares: NDArray[np.float64]) -> NDArray[np.float64]:
        """A mean of the squares in which those of long ago fade."""
        return self.beta2 * before + (1.0 - self.beta2) * squares


@dataclass(frozen=True, kw_only=True)
class FedYogi(_Adaptive):
    """`v <- v - (1 - beta2) * delta^2 * sign(v - delta^2)`. The paper's beta1 = 0.9, beta2 = 0.99 and tau = 0.001.

    v moves by the size of delta^2 whichever way it goes, so it forgets large deltas more slowly than FedAdam's.

    Attributes:
        beta2: decay of the second moment, at least 0 and below 1.
    """

    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "beta2", at_least=0, below=1)

    def second_moment(self, before: NDArray[np.float64], squares: NDArray[np.float64]) -> NDArray[np.float64]:
        """Additive, towards the square of the delta."""
        return before - (1.0 - self.beta2) * squares * np.sign(before - squares)
