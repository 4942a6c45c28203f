"""The picture of `edge-agent data --plot`: agents against labels, as a heat map with counts, and what each has in all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from midge.tasks.summary import DataSummary

_COLOURS = LinearSegmentedColormap.from_list("midge", ["#ffffff", "#b9d8e4", "#0b6e99", "#06384f"])
_BAR = "#0b6e99"
_INK = "#222222"
_FAINT = "#e6e6e6"
_MAX_NUMBERED = (30, 26)
"""Agents and labels up to which the counts stand in their cells."""
_MAX_TITLED = 40


def draw(title: str, parts: Sequence[tuple[int, DataSummary]], path: Path) -> None:
    """Write the picture into a PNG file; arguments as for `picture`.

    Raises:
        OSError: the file cannot be written.
    """
    picture(title, parts).savefig(path, format="png", pil_kwargs={"optimize": True})


def picture(title: str, parts: Sequence[tuple[int, DataSummary]]) -> Figure:
    """A heat map, or for a single part a bar chart, 800 pixels wide.

    Args:
        title: how the data were dealt.
        parts: the number of each, and what is in it; their labels were read.
    """
    titles = {one.label: one.title for _, summary in parts for one in summary.labels or ()}
    labels = sorted(titles)
    column = {label: place for place, label in enumerate(labels)}
    counts = np.zeros((len(parts), len(labels)), np.int64)
    for row, (_, summary) in enumerate(parts):
        for one in summary.labels or ():
            counts[row, column[one.label]] = one.count
    names = [titles[label] for label in labels]
    figure = _bars(counts[0], names) if len(parts) == 1 else _heat_map(counts, names, [part for part, _ in parts])
    height = figure.get_figheight()
    figure.text(0.02, 1 - 0.30 / height, title, fontsize=13, fontweight="bold", color=_INK, va="center")
    figure.text(0.02, 1 - 0.58 / height, _sizes(counts), fontsize=9.5, color="#555555", va="center")
    return figure


def _sizes(counts: NDArray[np.int64]) -> str:
    totals = counts.sum(axis=1)
    if len(totals) == 1:
        return f"{totals[0]} examples with {np.count_nonzero(counts)} labels"
    held = (counts > 0).sum(axis=1)
    return (
        f"{totals.sum()} examples: {_span(totals)} an agent, with {_span(held)} of {counts.shape[1]} labels, "
        f"{counts.max()} where it is darkest"
    )


def _span(numbers: NDArray[np.int64]) -> str:
    low, high = int(numbers.min()), int(numbers.max())
    return str(low) if low == high else f"{low} to {high}"


def _new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _heat_map(counts: NDArray[np.int64], names: Sequence[str], parts: Sequence[int]) -> Figure:
    num_agents, num_labels = counts.shape
    height = min(12.0, 1.5 + 0.32 * max(num_agents, 4))
    figure = _new_figure(8.0, height)
    heat, totals = figure.subplots(1, 2, width_ratios=(4, 1), sharey=True)
    bottom = 0.55 + 0.055 * max(0, max(map(len, names)) - 4)  # room for labels that are words
    figure.subplots_adjust(left=0.085, right=0.975, top=1 - 0.85 / height, bottom=bottom / height, wspace=0.04)
    heat.imshow(counts, cmap=_COLOURS, vmin=0, vmax=max(1, int(counts.max())), aspect="auto", interpolation="nearest")
    if num_agents <= _MAX_NUMBERED[0] and num_labels <= _MAX_NUMBERED[1]:
        _write_counts(heat, counts)
        heat.set_yticks(range(num_agents), [str(part) for part in parts])
    _title_labels(heat, names)
    heat.set_ylabel("agent")
    heat.tick_params(length=0, colors=_INK)
    heat.spines[:].set_color(_FAINT)
    totals.barh(range(num_agents), counts.sum(axis=1), color=_BAR, height=0.7)
    totals.set_xlabel("examples")
    totals.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
    totals.grid(axis="x", color=_FAINT)
    totals.set_axisbelow(True)
    totals.spines[["top", "right", "left"]].set_visible(False)
    totals.tick_params(length=0, colors=_INK, labelleft=False)
    return figure


def _write_counts(axes: Axes, counts: NDArray[np.int64]) -> None:
    size = 8.5 if max(counts.shape[0] / 20, counts.shape[1] / 14, len(str(counts.max())) / 4) <= 1 else 6.5
    dark = counts.max() * 0.5
    for (row, place), count in np.ndenumerate(counts):
        if count:
            colour = "white" if count > dark else _INK
            axes.text(place, row, str(count), ha="center", va="center", fontsize=size, color=colour)


def _bars(counts: NDArray[np.int64], names: Sequence[str]) -> Figure:
    height = 3.2
    figure = _new_figure(8.0, height)
    axes = figure.subplots()
    bottom = 0.55 + 0.055 * max(0, max(map(len, names)) - 4)
    figure.subplots_adjust(left=0.085, right=0.975, top=1 - 0.85 / height, bottom=bottom / height)
    drawn = axes.bar(range(len(counts)), counts, color=_BAR, width=0.75)
    if len(counts) <= _MAX_NUMBERED[1]:
        axes.bar_label(drawn, fontsize=8.5, color=_INK, padding=1)
    _title_labels(axes, names)
    axes.set_ylabel("examples")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    axes.margins(x=0.02, y=0.12)
    axes.grid(axis="y", color=_FAINT)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, colors=_INK)
    return figure


def _title_labels(axes: Axes, names: Sequence[str]) -> None:
    are_words = max(map(len, names)) > 4
    if not are_words:
        axes.set_xlabel("label")
    if len(names) > _MAX_TITLED:
        return
    axes.set_xticks(range(len(names)), names, rotation=45 if are_words else 0, ha="right" if are_words else "center")
