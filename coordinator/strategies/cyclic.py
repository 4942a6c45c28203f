"""One agent at a time: the model visits them in turn, and each goes on from where the last one left it.

Sequential training on data that stay where they are is older than federated averaging; K. Chang et al.: Distributed deep
learning networks among institutions for medical imaging, JAMIA 2018, https://doi.org/10.1093/jamia/ocy017, call it cyclical
weight transfer. It makes as many steps in a row as one place would, with nobody training beside it; and the model leans towards
whom it visited last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from coordinator.strategies.base import Step, Strategy


@dataclass(frozen=True, kw_only=True)
class Cyclic(Strategy):
    """The next model is what the visited agent made of the last one, to the bit. The order is in round.py. No options."""

    in_turn: ClassVar[bool] = True

    def weight(self, num_examples: int) -> float:  # noqa: ARG002  there is one update
        """1: there is one update."""
        return 1.0

    def apply(
        self,
        global_block: NDArray[np.float32],  # noqa: ARG002
        mean_block: NDArray[np.float64],
        state_blocks: Sequence[NDArray[np.float32]],  # noqa: ARG002
        step: Step,  # noqa: ARG002
    ) -> NDArray[np.float32]:
        """The agent's own elements."""
        return mean_block.astype(np.float32)
