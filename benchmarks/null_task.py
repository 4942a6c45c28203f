"""Tasks that train nothing, so that what is measured is Midge: a flat model of a given size, and no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from midge.tasks.base import DataSpec, Score, State, Trained, TrainSpec


class NullTask:
    """A model of `num_elements` float32 zeros that comes back as it went out."""

    def __init__(self, num_elements: int) -> None:
        self.name = f"null-{num_elements}"
        self._num_elements = num_elements

    def initial_state(self, seed: int) -> State:
        return {"weight": np.random.default_rng(seed).standard_normal(self._num_elements, dtype=np.float32)}

    def load_data(self, spec: DataSpec) -> Any:
        return spec

    def num_examples(self, data: Any) -> int:
        return 1

    def test_data(self) -> Any | None:
        return None

    def train(self, state: State, data: Any, spec: TrainSpec, progress: Callable[[float], None]) -> Trained:
        progress(1.0)
        return Trained(state=state, num_examples=1)

    def evaluate(self, state: State, data: Any) -> Score:
        return Score(num_examples=1, loss=0.0)


small = NullTask(2_500)
"""10 KB."""
large = NullTask(11_250_000)
"""45 MB."""
