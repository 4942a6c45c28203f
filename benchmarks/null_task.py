"""Tasks that train nothing, so that what is measured is Midge: a flat model of a given size, and no torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from midge.tasks.base import DataSpec, Score, State, Trained, TrainSpec


class NullTask:
    """A model of `num_elements` float32 that comes back as it went out, or `shrink` times that, after a pause."""

    def __init__(self, num_elements: int, pause_s: float = 0.0, shrink: float = 1.0) -> None:
        self.name = f"null-{num_elements}"
        self._num_elements = num_elements
        self._pause_s = pause_s
        self._shrink = np.float32(shrink)

    def initial_state(self, seed: int) -> State:
        return {"weight": np.random.default_rng(seed).standard_normal(self._num_elements, dtype=np.float32)}

    def load_data(self, spec: DataSpec) -> Any:
        return spec

    def num_examples(self, data: Any) -> int:
        return 1

    def test_data(self) -> Any | None:
        return None

    def train(self, state: State, data: Any, spec: TrainSpec, progress: Callable[[float], None]) -> Trained:
        time.sleep(self._pause_s)
        progress(1.0)
        return Trained(state={"weight": state["weight"] * self._shrink}, num_examples=1)

    def evaluate(self, state: State, data: Any) -> Score:
        return Score(num_examples=1, loss=0.0)


small = NullTask(2_500)
"""10 KB."""
paced = NullTask(2_500, pause_s=0.1, shrink=0.999)
"""The same, at the pace of a little work, and no version like the one before."""
large = NullTask(11_250_000)
"""45 MB."""
