"""What a strategy is: how much each update weighs, and how the global model moves towards their mean.

A strategy sees one block of elements at a time, never a whole model, so that memory does not depend on the model's size and
blocks are folded in parallel. It is therefore elementwise: block i of the next model depends on block i alone.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class StrategyError(ValueError):
    """A strategy that does not exist was named, or one was given an option that it does not take."""


class Strategy(Protocol):
    """How the updates of a round become the next model. Several threads use one at once: it must not change."""

    @property
    def name(self) -> str:
        """What the configuration and tables call it."""

    def weight(self, num_examples: int) -> float:
        """How much an update trained on so many examples weighs, relative to the others; at least 0."""

    def apply(self, global_block: NDArray[np.float32], mean_block: NDArray[np.float64]) -> NDArray[np.float32]:
        """The next model's elements.

        Args:
            global_block: float32[n], of the model that was trained from; read-only.
            mean_block: float64[n], the weighted mean of what the agents had after training; it may be overwritten.

        Returns:
            float32[n], a new array, contiguous: it is written to.
        """
