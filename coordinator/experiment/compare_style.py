"""How arms look, in pictures and on the page: a colour for light, one for dark, and a line that prints in black and white."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.experiment.compare_plan import ALONE, CENTRALIZED, FEDERATED, FEDSGD, LOCAL_AVERAGE


@dataclass(frozen=True)
class Style:
    """Of a line. `dashes` are lengths of strokes and gaps; none for a solid line."""

    light: str
    dark: str
    dashes: tuple[int, ...] = ()


_STYLES = {
    FEDERATED: Style("#0b6e99", "#58b7e0"),
    CENTRALIZED: Style("#6b6b6b", "#b0b0b0", (7, 4)),
    LOCAL_AVERAGE: Style("#8a3f92", "#d19ad8", (2, 3)),
    FEDSGD: Style("#1f7a4d", "#66c998", (8, 3, 2, 3)),
}
_ALONE = (Style("#c85f0a", "#f2a65a"), Style("#a8323e", "#f08f98", (5, 2)), Style("#7d6608", "#d9c352", (3, 2)))


def styles_of(arms: Sequence[str]) -> dict[str, Style]:
    """By arm."""
    alone = [arm for arm in arms if arm.partition(":")[0] == ALONE]
    return {arm: _ALONE[alone.index(arm) % len(_ALONE)] if arm in alone else _STYLES[arm] for arm in arms}


def ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, about as many as wanted."""
    span = high - low
    if span <= 0:
        return [low]
    rough = span / wanted
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def is_logarithmic(metric: str, values: Sequence[float]) -> bool:
    """Whether an axis should be: a loss that falls far would else be a line at the bottom."""
    return metric == "loss" and bool(values) and min(values) > 0 and max(values) > 20 * min(values)
