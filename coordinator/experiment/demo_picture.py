"""The demonstration's picture: accuracy by round of the three ways of learning, and by digit where they end."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from coordinator.experiment.demo_report import Learned, Report

_FEDERATED = "#0b6e99"
_ALONE = "#d9730d"
_CENTRAL = "#8a8a8a"
_INK = "#222222"
_FAINT = "#e6e6e6"
_OWN = "#f4f1ea"


def draw(report: Report, path: Path) -> None:
    """Write the picture into a PNG file, 1500 by 675 pixels."""
    figure = Figure(figsize=(10, 4.5), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    curves, digits = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.subplots_adjust(left=0.065, right=0.985, top=0.76, bottom=0.13, wspace=0.16)
    title = f"{len(report.agents)} agents learn together what none of them can learn alone"
    figure.text(0.065, 0.925, title, fontsize=15, fontweight="bold", color=_INK)
    how = f"Task {report.task}, each agent with all examples of its own labels and 5 % of the others, over MQTT"
    figure.text(0.065, 0.868, how, fontsize=10, color="#555555")
    _draw_curves(curves, report)
    _draw_digits(digits, report)
    figure.savefig(path, format="png")


def _ways(report: Report) -> list[tuple[str, Learned, str, str]]:
    """Name, result, colour and line style, the most important one last, so that it is drawn on top."""
    return [
        ("centralised, all data in one place", report.centralized, _CENTRAL, "--"),
        (f"{report.first_agent} alone", report.single_agent, _ALONE, "-"),
        (f"federated, {len(report.agents)} agents", report.federated, _FEDERATED, "-"),
    ]


def _draw_curves(axes: Axes, report: Report) -> None:
    for name, way, colour, style in _ways(report):
        numbers = [one.round for one in way.rounds]
        accuracies = [one.accuracy for one in way.rounds]
        marker = "o" if len(numbers) < 5 else ""
        axes.plot(numbers, accuracies, style, color=colour, label=f"{name}: {way.accuracy:.1%}", lw=2, marker=marker)
    worst = min(one.accuracy for _, way, _, _ in _ways(report) for one in way.rounds)
    axes.set_ylim(max(0.0, worst - 0.05), 1.0)
    num_rounds = len(report.federated.rounds)
    axes.set_xlim(1 - 0.02 * num_rounds, num_rounds * 1.02)
    axes.set_title("Accuracy on test images", loc="left", fontsize=11, color=_INK)
    axes.set_xlabel(f"round ({report.local_epochs} epochs each)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], loc="best", fontsize=10, facecolor="white", edgecolor="none", framealpha=1)
    _tidy(axes)


def _draw_digits(axes: Axes, report: Report) -> None:
    labels = sorted(report.federated.accuracy_by_label, key=int)
    own = {str(label) for label in report.agents[report.first_agent]}
    for place, label in enumerate(labels):
        if label in own:
            axes.axvspan(place - 0.5, place + 0.5, color=_OWN, zorder=0)
        pair = [way.accuracy_by_label[label] for way in (report.single_agent, report.federated)]
        axes.plot([place, place], pair, color="#bbbbbb", lw=2, zorder=1)
    for _, way, colour, _ in _ways(report)[1:]:
        heights = [way.accuracy_by_label[label] for label in labels]
        axes.scatter(range(len(labels)), heights, s=52, color=colour, zorder=2)
    axes.set_ylim(-0.03, 1.05)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_title("By digit, after the last round", loc="left", fontsize=11, color=_INK)
    middle = sum(place for place, label in enumerate(labels) if label in own) / len(own)
    axes.text(middle, 0.0, f"{report.first_agent}'s own", ha="center", va="bottom", fontsize=9, color="#555555")
    axes.set_xlabel("digit")
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="y", color=_FAINT, zorder=-1)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, colors=_INK)
