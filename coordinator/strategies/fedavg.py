"""Federated averaging.

    w  <-  sum_k (n_k / n) w_k            (Algorithm 1)

H. B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Agüera y Arcas: Communication-Efficient Learning of Deep Networks from
Decentralized Data, AISTATS 2017, https://arxiv.org/abs/1602.05629. Agent k trained the global model on its n_k examples and
has w_k; n is their sum. The paper's FedSGD is the same code with one local epoch (E = 1) and the whole data set as one batch
(B = all): then w_k = w - lr * g_k, and the mean of the w_k is one step of SGD on all data.

Seen as deltas, the mean is w + mean(w_k - w); a server learning rate scales that step (S. J. Reddi et al.: Adaptive
Federated Optimization, 2021, https://arxiv.org/abs/2003.00295). Fedjax has delta = global - local and subtracts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from coordinator.strategies.base import StrategyError

Weighting = Literal["examples", "uniform"]


@dataclass(frozen=True, kw_only=True)
class FedAvg:
    """The weighted mean of what the agents have.

    Attributes:
        server_learning_rate: how far to go from the global model to the mean, above 0; 1 is the paper's, the mean itself.
        weighting: "examples", an update weighs as many examples as it was trained on; "uniform", all weigh the same.

    Raises:
        StrategyError: an option is out of its range.
    """

    server_learning_rate: float = 1.0
    weighting: Weighting = "examples"

    def __post_init__(self) -> None:
        rate = self.server_learning_rate
        if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 < rate < math.inf:
            raise StrategyError(f"fedavg: server_learning_rate is {rate!r}: expected a finite number above 0")
        if self.weighting not in get_args(Weighting):
            expected = " or ".join(map(repr, get_args(Weighting)))
            raise StrategyError(f"fedavg: weighting is {self.weighting!r}: expected {expected}")

    @property
    def name(self) -> str:
        """What the configuration and tables call it."""
        return "fedavg"

    def weight(self, num_examples: int) -> float:
        """`num_examples`, or 1 where all weigh the same."""
        return float(num_examples) if self.weighting == "examples" else 1.0

    def apply(self, global_block: NDArray[np.float32], mean_block: NDArray[np.float64]) -> NDArray[np.float32]:
        """The mean itself, or `global + server_learning_rate * (mean - global)`, rounded to float32 once, at the end."""
        if self.server_learning_rate != 1:
            np.subtract(mean_block, global_block, out=mean_block)
            np.multiply(mean_block, self.server_learning_rate, out=mean_block)
            np.add(mean_block, global_block, out=mean_block)
        return mean_block.astype(np.float32)
