"""Strategies as a user writes them: right ones, and each of the others breaks one rule."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from coordinator.strategies import FedAvg, FedAvgM, Step, Strategy, require

Block = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Clipped(Strategy):
    """No element moves by more than `limit`, nor by more than twice its last step and a little."""

    state_names: ClassVar[tuple[str, ...]] = ("last",)
    limit: float = 0.1

    def __post_init__(self) -> None:
        require(self, "limit", above=0)

    def apply(self, global_block: Block, mean_block: Block, state_blocks: Sequence[Block], step: Step) -> Block:
        (last,) = state_blocks
        limits = np.minimum(self.limit, 2 * np.abs(last.astype(np.float64)) + 0.01)
        moves = np.clip(mean_block - global_block, -limits, limits)
        last[:] = moves
        return (global_block + moves).astype(np.float32)


class Remembers(FedAvg):
    """Its memory is its own, not the state's."""

    memory = 0.0

    def apply(self, global_block: Block, mean_block: Block, state_blocks: Sequence[Block], step: Step) -> Block:
        type(self).memory += 0.5
        return (global_block + (mean_block - global_block) / (1 + self.memory)).astype(np.float32)


class Normalises(FedAvg):
    """It divides by the norm of its block."""

    def apply(self, global_block: Block, mean_block: Block, state_blocks: Sequence[Block], step: Step) -> Block:
        delta = mean_block - global_block
        return (global_block + delta / (1 + np.sqrt((delta * delta).sum()))).astype(np.float32)


class Ranks(FedAvg):
    """In place of the mean it takes the update whose elements in the block add up to the least."""

    replaces_mean: ClassVar[bool] = True

    def centre(self, rows: Block) -> Block:
        return rows[rows.sum(axis=1).argmin()]


class Ascends(FedAvg):
    """It takes the delta for a gradient, and subtracts it."""

    def apply(self, global_block: Block, mean_block: Block, state_blocks: Sequence[Block], step: Step) -> Block:
        return (2.0 * global_block - mean_block).astype(np.float32)


class Doubles(FedAvg):
    """It gives float64."""

    def apply(self, global_block: Block, mean_block: Block, state_blocks: Sequence[Block], step: Step) -> Block:
        return mean_block.copy()


class Overwrites(FedAvg):
    """It works in the global model's place."""

    def apply(self, global_block: Block, mean_block: Block, state_blocks: Sequence[Block], step: Step) -> Block:
        global_block[:] = mean_block
        return global_block


class Decays(FedAvg):
    """It pulls the model towards zero."""

    def apply(self, global_block: Block, mean_block: Block, state_blocks: Sequence[Block], step: Step) -> Block:
        return (0.5 * mean_block).astype(np.float32)


class Repels(FedAvg):
    """It weighs large data sets below zero."""

    def weight(self, num_examples: int) -> float:
        return 100.0 - num_examples


class Forgets(FedAvgM):
    """It names what it remembers, and not what that starts with."""

    def initial_state(self) -> tuple[float, ...]:
        return ()


class Raises(FedAvg):
    """It cannot be trusted with large numbers."""

    def apply(self, global_block: Block, mean_block: Block, state_blocks: Sequence[Block], step: Step) -> Block:
        if np.abs(mean_block).max() > 1e30:
            raise ZeroDivisionError("far too large")
        return mean_block.astype(np.float32)


def not_a_strategy() -> int:
    return 1


WRONG = {
    Remembers: "The same updates and the same state give the same bits",
    Normalises: "An element of the next model and of the state depends on no other element",
    Ranks: "An element of the next model and of the state depends on no other element",
    Ascends: "no element moves away from what they agree on",
    Doubles: "`apply` gives a new float32 array of the block's length",
    Overwrites: "`apply` gives a new float32 array of the block's length, and leaves the global model alone",
    Decays: "the model stays as it is, to the bit",
    Repels: "A weight is a finite number of at least 0",
    Forgets: "the state is all that is remembered",
    Raises: "what is not finite is refused, and never stored nor anything else raised",
}
