"""The curves of a comparison as SVG within the page: colours come from its style sheet, so that they follow light and dark."""

from __future__ import annotations

import math
from html import escape

from coordinator.experiment.compare_style import is_logarithmic, styles_of, ticks
from coordinator.experiment.compare_summary import Comparison, Stat

_WIDTH, _HEIGHT = 760, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 12, 48

Point = tuple[float, float, float]
"""Position, mean and spread."""


def curves(comparison: Comparison, metric: str) -> str:
    """Mean and spread of each arm over the budget; nothing where there are no numbers."""
    lines = {arm.arm: _points(comparison, arm.arm, metric) for arm in comparison.arms}
    means = [mean for points in lines.values() for _, mean, _ in points]
    if not means:
        return ""
    low, high = _limits(means, metric)
    plot = _Plot(max(comparison.rounds, 1), low, high, is_log=is_logarithmic(metric, means))
    styles = styles_of([arm.arm for arm in comparison.arms])
    body = [plot.axes(metric)]
    ordered = [arm.arm for arm in reversed(comparison.arms)]  # the first one asked for is drawn on top
    for arm in ordered:
        place = list(styles).index(arm)
        body.append(f'<polygon class="band arm{place}" points="{plot.band(lines[arm])}"/>')
    for arm in ordered:
        place = list(styles).index(arm)
        dashes = f' stroke-dasharray="{" ".join(map(str, styles[arm].dashes))}"' if styles[arm].dashes else ""
        label = escape(next(one.label for one in comparison.arms if one.arm == arm))
        body.append(
            f'<polyline class="line arm{place}"{dashes} points="{plot.line(lines[arm])}"><title>{label}</title></polyline>'
        )
    what = f"{metric.capitalize()} on the test data over the budget of gradient steps, a line an arm"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(what)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(body)}</svg>'
    )


def legend(comparison: Comparison) -> str:
    """Which line is whose."""
    styles = styles_of([arm.arm for arm in comparison.arms])
    items = []
    for place, arm in enumerate(comparison.arms):
        dashes = " ".join(map(str, styles[arm.arm].dashes))
        sample = (
            f'<svg width="34" height="10" aria-hidden="true"><line class="line arm{place}" x1="1" x2="33" y1="5" y2="5" '
            f'stroke-dasharray="{dashes}"/></svg>'
        )
        items.append(f"<li>{sample} {escape(arm.label)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


class _Plot:
    """From numbers to places."""

    def __init__(self, rounds: int, low: float, high: float, *, is_log: bool) -> None:
        self._rounds = rounds
        self._is_log = is_log
        self._low = float(math.floor(math.log10(low))) if is_log else low
        self._high = math.log10(high) if is_log else high

    def line(self, points: list[Point]) -> str:
        return " ".join(self._place(position, mean) for position, mean, _ in points)

    def band(self, points: list[Point]) -> str:
        above = [self._place(position, mean + spread) for position, mean, spread in points]
        below = [self._place(position, mean - spread) for position, mean, spread in reversed(points)]
        return " ".join(above + below)

    def axes(self, metric: str) -> str:
        parts = []
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        for height in ticks(self._low, self._high):
            if self._is_log and height != round(height):
                continue
            value = 10.0**height if self._is_log else height
            y = self._y(value)
            text = f"{value:.0%}" if metric == "accuracy" else f"{value:g}"
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        for value in ticks(0, self._rounds, 8):
            if value == int(value):
                x = self._x(value)
                parts.append(
                    f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{value:.0f}</text>'
                )
        middle = (_LEFT + right) / 2
        words = "round of the federation, or as large a share of the budget of gradient steps"
        parts.append(f'<text class="tick" x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{words}</text>')
        return "".join(parts)

    def _place(self, position: float, value: float) -> str:
        return f"{self._x(position):.1f},{self._y(value):.1f}"

    def _x(self, position: float) -> float:
        return _LEFT + min(position / self._rounds, 1.0) * (_WIDTH - _LEFT - _RIGHT)

    def _y(self, value: float) -> float:
        if self._is_log:
            value = math.log10(value) if value > 0 else self._low
        share = (min(max(value, self._low), self._high) - self._low) / (self._high - self._low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _points(comparison: Comparison, name: str, metric: str) -> list[Point]:
    arm = next(one for one in comparison.arms if one.arm == name)
    found: list[tuple[float, Stat | None]] = [
        (one.position, one.accuracy if metric == "accuracy" else one.loss) for one in arm.by_round
    ]
    return [(position, one.mean, one.spread or 0.0) for position, one in found if one is not None]


def _limits(means: list[float], metric: str) -> tuple[float, float]:
    if metric == "accuracy":
        low = max(0.0, min(means) - 0.05)
        return (0.0 if low < 0.25 else low), 1.0
    low = min(means) if is_logarithmic(metric, means) else min(0.0, *means)
    return low, max(means) * 1.05 or 1.0
