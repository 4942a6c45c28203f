"""Between a state dictionary of arrays and what travels: one flat float32 vector and the counters.

Both sides use these: the agent's worker around a training, the coordinator for round 0 and for evaluation. Floating-point
tensors lie in the vector in the layout's order, whatever their own type: float64 is rounded to float32 on the way, float16
is widened, and bfloat16, which NumPy lacks, is float32 in a state. Integer and boolean buffers become whole numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from midge.tasks.base import State
from midge.wire.errors import LayoutError
from midge.wire.layout import FloatType, IntegerType, Layout, TensorSpec

_SHOWN = 3


def numpy_dtype(spec: TensorSpec) -> np.dtype[Any]:
    """The type that a tensor of the layout has in a state: its own, and float32 for bfloat16."""
    return np.dtype("float32" if spec.dtype == "bfloat16" else spec.dtype)


def layout_of(state: State) -> Layout:
    """The layout of a model given as arrays.

    Raises:
        LayoutError: an array has a type that cannot travel, or a limit of layouts is exceeded.
    """
    return Layout(tuple(_spec(name, np.asarray(array)) for name, array in state.items()))


def _spec(name: str, array: NDArray[Any]) -> TensorSpec:
    travels = [kind for kind in (*get_args(FloatType), *get_args(IntegerType)) if kind != "bfloat16"]
    if array.dtype.name not in travels:
        raise LayoutError(f"{name} {array.shape} is {array.dtype.name}: expected one of {', '.join(travels)}")
    return TensorSpec(name=name, shape=array.shape, dtype=array.dtype.name)  # type: ignore[arg-type]


def difference(ours: Layout, expected: Layout) -> str:
    """What is wrong with the layout of a state where a model's is expected, as a predicate; empty where nothing is.

    bfloat16 is float32 in a state, so that the two are no difference.
    """
    return _in_a_state(expected).difference(_in_a_state(ours))


def _in_a_state(layout: Layout) -> Layout:
    return Layout(
        tuple(TensorSpec(spec.name, spec.shape, numpy_dtype(spec).name) for spec in layout.tensors)  # type: ignore[arg-type]
    )


def state_to_vector(state: State, layout: Layout) -> tuple[NDArray[np.float32], tuple[int, ...]]:
    """What travels of a state: a new float32[layout.num_elements], and the counters.

    Values that float32 cannot hold become infinite, and are for the reader's finite check to refuse.

    Raises:
        LayoutError: a tensor is missing, unexpected, or of another shape or type than the layout's.
    """
    _check_names(state, layout)
    vector = np.empty(layout.num_elements, np.float32)
    with np.errstate(over="ignore"):
        for spec, start, stop in layout.floats():
            vector[start:stop] = _checked(state, spec).reshape(-1)
    counters = tuple(
        int(value) for spec, _, _ in layout.integers() for value in _checked(state, spec).reshape(-1).tolist()
    )
    return vector, counters


def _check_names(state: Mapping[str, object], layout: Layout) -> None:
    expected = {spec.name for spec in layout.tensors}
    for names, word in ((expected - state.keys(), "lacks"), (state.keys() - expected, "has unexpected")):
        if names:
            shown = sorted(names)
            more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
            raise LayoutError(f"state {word} {', '.join(shown[:_SHOWN])}{more}: it must have the layout's tensors")


def _checked(state: State, spec: TensorSpec) -> NDArray[Any]:
    array = np.asarray(state[spec.name])
    if array.shape != spec.shape or array.dtype.name != numpy_dtype(spec).name:
        raise LayoutError(f"state has {spec.name} {array.shape} {array.dtype.name}: expected {spec}")
    return array


def vector_to_state(vector: NDArray[np.float32], counters: Sequence[int], layout: Layout) -> dict[str, NDArray[Any]]:
    """The state that `state_to_vector` made `vector` and `counters` of, in the layout's order, shapes and types.

    Float32 tensors are views of `vector` (float32[layout.num_elements]); all others are new arrays.

    Raises:
        LayoutError: the vector or the counters do not fit the layout.
    """
    if vector.shape != (layout.num_elements,) or vector.dtype != np.float32:
        raise LayoutError(f"vector {vector.shape} {vector.dtype}: expected ({layout.num_elements},) float32")
    layout.check_counters(counters)
    floats = {
        spec.name: vector[start:stop].reshape(spec.shape).astype(numpy_dtype(spec), copy=False)
        for spec, start, stop in layout.floats()
    }
    integers = {
        spec.name: np.array(counters[start:stop], dtype=spec.dtype).reshape(spec.shape)
        for spec, start, stop in layout.integers()
    }
    return {spec.name: floats[spec.name] if spec.is_float else integers[spec.name] for spec in layout.tensors}
