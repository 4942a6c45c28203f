"""What a strategy remembers between rounds, on disk: one file in the model store for the version that it belongs to.

Each of the strategy's vectors is a tensor of that file, float32 like the model and as long, so a file is read and written
block by block in place, is durable before it is named, and is named by its digest, by which a restart checks it.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from coordinator.models import ModelFile, ModelStore, ModelWriter
from coordinator.strategies.base import Strategy
from midge.wire.layout import Layout, TensorSpec, layout_of

_PREFIX = "server_state."


class ServerStateError(Exception):
    """A stored state is not the one that the strategy keeps."""


def state_layout(strategy: Strategy, num_elements: int) -> Layout:
    """The layout of the file of a strategy that remembers something."""
    return layout_of(tuple(TensorSpec(_PREFIX + name, (num_elements,), "float32") for name in strategy.state_names))


class ServerState:
    """The state before a round, to be read, and the one after it, to be written. As a context, it ends what is open.

    Any thread may use it, each on blocks of its own.

    Args:
        strategy: says how many vectors, and what they start with.
        num_elements: of the model.
        models: the store.
        digest: of the state of the version that the round starts from; None before the first round.
        round_num: of the version in the making.

    Raises:
        ServerStateError: the version has no such state, or one of another strategy.
        ModelError: the file is missing or damaged.
        OSError: the disk is full or fails.
    """

    def __init__(
        self, strategy: Strategy, num_elements: int, models: ModelStore, digest: str | None, round_num: int
    ) -> None:
        self._initial = strategy.initial_state()
        self._num_elements = num_elements
        self._before: ModelFile | None = None
        self._after: ModelWriter | None = None
        if len(self._initial) != len(strategy.state_names):
            raise ServerStateError(
                f"strategy {strategy.name} keeps {len(strategy.state_names)} vectors and gives "
                f"{len(self._initial)} initial values: expected one for each"
            )
        if not strategy.state_names:
            return
        layout = state_layout(strategy, num_elements)
        if digest is not None:
            self._before = models.open(digest)
            if self._before.layout != layout:
                self._before.close()
                raise ServerStateError(
                    f"server state {digest[:12]} holds {_words(self._before.layout)}, strategy {strategy.name} keeps "
                    f"{_words(layout)}: use the strategy that the run began with, or begin another run"
                )
        elif round_num > 1:
            raise ServerStateError(
                f"version {round_num - 1} has no server state, and strategy {strategy.name} keeps {_words(layout)}: use the "
                "strategy that the run began with, or begin another run"
            )
        self._after = models.writer(layout, ())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            self._before.close()
        if self._after is not None:
            self._after.abort()

    @property
    def num_vectors(self) -> int:
        """How many there are."""
        return len(self._initial)

    def load(self, start: int, blocks: NDArray[np.float32]) -> None:
        """Fill `blocks` (float32[num_vectors, n]) with elements `start` to `start + n` of each vector."""
        stop = start + blocks.shape[1]
        for index, value in enumerate(self._initial):
            offset = index * self._num_elements
            blocks[index] = value if self._before is None else self._before.elements[start + offset : stop + offset]

    def save(self, start: int, blocks: NDArray[np.float32]) -> None:
        """Put `blocks`, as `load` fills them, at their place in the state of the next version."""
        if self._after is not None:
            for index, block in enumerate(blocks):
                self._after.write(start + index * self._num_elements, block)

    def release(self) -> None:
        """Give back the memory in which pages of the file are resident."""
        if self._before is not None:
            self._before.release()

    def commit(self) -> str | None:
        """Make the next version's state durable, and return its digest; None where there is none."""
        return None if self._after is None else self._after.commit()


def _words(layout: Layout) -> str:
    return " and ".join(f"{spec.name.removeprefix(_PREFIX)} {spec.shape}" for spec in layout.tensors)
