"""Federated averaging, and federated averaging with a proximal term on the agents.

    w  <-  sum_k (n_k / n) w_k            (Algorithm 1)

H. B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Agüera y Arcas: Communication-Efficient Learning of Deep Networks from
Decentralized Data, AISTATS 2017, https://arxiv.org/abs/1602.05629. Agent k trained the global model on its n_k examples and
has w_k; n is their sum. The paper's FedSGD is the same code with one local epoch (E = 1) and the whole data set as one batch
(B = all): then w_k = w - lr * g_k, and the mean of the w_k is one step of SGD on all data.

Seen as deltas, the mean is w + mean(w_k - w); a server learning rate scales that step (S. J. Reddi et al.: Adaptive
Federated Optimization, 2021, https://arxiv.org/abs/2003.00295). Fedjax has delta = global - local and subtracts.

With weighting "sum" it is w + server_learning_rate * sum(w_k - w), as the textbook Practicing Federated Learning (chapter 3)
has it, where the factor is called lambda: with m updates, m times as far as the uniform mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from coordinator.strategies.base import Averaging, Step, require
from midge.wire.messages import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class FedAvg(Averaging):
    """The weighted mean of what the agents have. At a server learning rate of 1, the paper's, it is the mean itself."""

    def apply(
        self,
        global_block: NDArray[np.float32],
        mean_block: NDArray[np.float64],
        state_blocks: Sequence[NDArray[np.float32]],  # noqa: ARG002  it has none
        step: Step,
    ) -> NDArray[np.float32]:
        """The mean itself, or `global + server_learning_rate * delta`, rounded to float32 once, at the end."""
        if self.server_learning_rate != 1 or self.weighting == "sum":
            delta = self.delta(global_block, mean_block, step)
            np.multiply(delta, self.server_learning_rate, out=delta)
            np.add(delta, global_block, out=mean_block)
        return mean_block.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class FedProx(FedAvg):
    """FedAvg whose agents stay near the global model: each adds `mu / 2 * ||w - w_global||^2` to its loss.

    T. Li, A. K. Sahu, M. Zaheer, M. Sanjabi, A. Talwalkar, V. Smith: Federated Optimization in Heterogeneous Networks, MLSys
    2020, https://arxiv.org/abs/1812.06127 (Algorithm 2). The paper tries mu = 0.001, 0.01, 0.1 and 1, and the best one
    depends on the data: 1 on three of its data sets, 0.01 and 0.001 on the others.

    Attributes:
        mu: weight of the proximal term, at least 0 and below 1000000; at 0 it is FedAvg.
    """

    mu: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "mu", at_least=0, below=1e6)

    def training(self, config: TrainingConfig) -> TrainingConfig:
        """The settings', and mu."""
        return msgspec.structs.replace(config, proximal_mu=float(self.mu))
