"""The pictures of a comparison, as PNG files: curves with a band, and accuracy by label as a heat map."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from coordinator.experiment.compare_style import is_logarithmic, styles_of
from coordinator.experiment.compare_summary import Comparison, shown

_INK, _FAINT = "#222222", "#e6e6e6"


def draw_all(path: Path, directory: Path) -> None:
    """Draw the comparison of a JSON file: `curves.png`, and `classes.png` where the task tells labels apart."""
    comparison = msgspec.json.decode(path.read_bytes(), type=Comparison)
    _draw_curves(comparison, directory / "curves.png")
    if any(arm.by_label for arm in comparison.arms):
        _draw_labels(comparison, directory / "classes.png")


def _draw_curves(comparison: Comparison, path: Path) -> None:
    figure, axes = _figure(10, 5)
    is_accuracy = comparison.metric == "accuracy"
    styles = styles_of([arm.arm for arm in comparison.arms])
    every: list[float] = []
    for depth, arm in enumerate(comparison.arms):
        found = [(one.position, one.accuracy if is_accuracy else one.loss) for one in arm.by_round]
        known = [(position, one.mean, one.spread or 0.0) for position, one in found if one is not None]
        places, means, spreads = (np.array(column) for column in zip(*known, strict=True))
        every += [mean for _, mean, _ in known]
        style = styles[arm.arm]
        zorder = 10 - depth
        axes.fill_between(places, means - spreads, means + spreads, color=style.light, alpha=0.15, lw=0, zorder=zorder)
        dashes = (0, [length / 2 for length in style.dashes]) if style.dashes else "-"
        score = shown(arm.accuracy if is_accuracy else arm.loss, comparison.metric)
        marker = "o" if len(known) < 5 else ""
        label = f"{arm.label}: {score}"
        axes.plot(places, means, color=style.light, lw=2, ls=dashes, label=label, zorder=zorder, marker=marker)
    axes.set_title(f"{comparison.metric.capitalize()} on test data", loc="left", fontsize=13, color=_INK)
    axes.set_xlabel("round of the federation, or as large a share of the budget of gradient steps", color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if is_accuracy:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(top=1.0)
    elif is_logarithmic("loss", every):
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(every) / 1.5)
    axes.set_xlim(0, comparison.rounds)
    axes.legend(loc="best", fontsize=10, facecolor="white", edgecolor="none", framealpha=0.9)
    axes.grid(axis="y", color=_FAINT)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, colors=_INK)
    figure.savefig(path, format="png")


def _draw_labels(comparison: Comparison, path: Path) -> None:
    arms = [arm for arm in comparison.arms if arm.by_label]
    labels = comparison.labels
    values = np.array([[arm.by_label[label].mean for label in labels] for arm in arms])
    figure, axes = _figure(max(6.0, 2.6 + 0.75 * len(labels)), 1.5 + 0.5 * len(arms))
    axes.imshow(values, cmap="Blues", vmin=0.0, vmax=1.15, aspect="auto")
    if len(labels) <= 30:  # more, and figures would overlap
        for row, column in np.ndindex(*values.shape):
            colour = "white" if values[row, column] > 0.7 else _INK
            text = f"{values[row, column] * 100:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=10, color=colour)
    axes.set_yticks(range(len(arms)), [arm.label for arm in arms])
    axes.set_xticks(range(len(labels)), labels)
    axes.set_title("Accuracy by label, per cent, after the last round", loc="left", fontsize=13, color=_INK)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=_INK)
    figure.savefig(path, format="png")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()
