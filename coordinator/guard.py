"""The divergence guard: a step that would carry the model away is refused, whatever the strategy.

A step is as long as the L2 norm of `next - global`. It explodes where that is more than `max_step_ratio` times the norm of
the global model. A model that is all but zero (a root mean square below 0.001 an element, such as a linear model that starts
at zero) has no length to compare with yet: it counts as one with a root mean square of 1.

Only what is learned counts. Running means and variances of normalisation layers follow the data, and may rightly jump from
their initial 0 and 1 to thousands in the first round; by their names in torch, they are left out.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from midge.wire.layout import Layout

_STATISTICS = ("running_mean", "running_var")
_LEAST_RMS = 1e-3
_BLOCK_ELEMENTS = 64 * 1024
Span = tuple[int, int]


def statistics_spans(layout: Layout) -> list[Span]:
    """First and past-the-last elements of all running statistics in the flat vector, in order, neighbours joined."""
    spans: list[Span] = []
    for spec, start, stop in layout.floats():
        if spec.name.rpartition(".")[2] in _STATISTICS:
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], stop)
            else:
                spans.append((start, stop))
    return spans


def within(spans: list[Span], start: int, stop: int) -> list[slice]:
    """What lies of `spans` in elements `start` to `stop`, as slices of that block."""
    return [
        slice(max(first, start) - start, min(last, stop) - start)
        for first, last in spans
        if first < stop and last > start
    ]


def explosion(step_sum_squares: float, elements: NDArray[np.float32], spans: list[Span], max_ratio: float) -> str:
    """Why a step is refused, in words; empty where it is not.

    Args:
        step_sum_squares: of the step, over what is learned.
        elements: float32[num_elements], the global model.
        spans: of the running statistics in it.
        max_ratio: the largest length of a step over that of the model; 0 for no bound.
    """
    if not max_ratio:
        return ""
    num_learned = len(elements) - sum(stop - start for start, stop in spans)
    # Blocks are added up until they are enough: most often the first one is.
    enough = max(step_sum_squares / max_ratio**2, num_learned * _LEAST_RMS**2)
    total = 0.0
    for start in range(0, len(elements), _BLOCK_ELEMENTS):
        block = elements[start : start + _BLOCK_ELEMENTS].astype(np.float64)
        for part in within(spans, start, start + len(block)):
            block[part] = 0
        total += float(np.add.reduce(block * block))
        if total >= enough:
            return ""
    is_tiny = total < num_learned * _LEAST_RMS**2
    norm = math.sqrt(num_learned if is_tiny else total)
    step = math.sqrt(step_sum_squares)
    if step <= max_ratio * norm:
        return ""
    counted = f"{math.sqrt(total):.3g}, and counts as {norm:.3g}" if is_tiny else f"{norm:.3g}"
    return (
        f"the step has norm {step:.3g}, the global model {counted}: {step / norm:.3g} times as much, and max_step_ratio is "
        f"{max_ratio:g}"
    )
