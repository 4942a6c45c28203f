"""A comparison as a table in the terminal, and as CSV files: what is drawn on the page, for another program to draw.

arms.csv       an arm: means and spreads over the seeds
rounds.csv     a round of a unit: of an arm, or of an agent alone, with one seed
classes.csv    a label of a unit
agents.csv     an agent whose data a unit's last model was tested on
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

from rich import box
from rich.table import Table

from coordinator.experiment.compare_plan import FEDSGD
from coordinator.experiment.compare_store import UnitResult, write_whole
from coordinator.experiment.compare_summary import ArmSummary, Comparison, shown


def table(comparison: Comparison) -> Table:
    """The arms side by side."""
    num_seeds = len(comparison.seeds)
    seeds = f"{num_seeds} seeds, mean ± standard deviation" if num_seeds > 1 else "1 seed"
    title = f"{comparison.task}, {seeds}"
    view = Table(
        box=box.SIMPLE_HEAD, title=title, title_style="bold", pad_edge=False, collapse_padding=True, show_edge=False
    )
    view.add_column("", no_wrap=True)
    headings = ["accuracy"] if comparison.metric == "accuracy" else []
    for heading in (*headings, "loss", "rounds", "steps", "seconds"):
        view.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    for arm in comparison.arms:
        is_accuracy = comparison.metric == "accuracy"
        scores = [shown(arm.accuracy, "accuracy"), f"{arm.loss.mean:.3f}"] if is_accuracy else [shown(arm.loss, "loss")]
        numbers = (str(arm.rounds), steps_of_arm(arm), f"{arm.seconds:.1f}")
        view.add_row(arm.label, *scores, *numbers, style="bold green" if arm.arm == "federated" else "")
    return view


def steps_of_arm(arm: ArmSummary) -> str:
    """Such as `2,880`, or for FedSGD, which has a bound, `1,500 of 2,880`."""
    made = f"{arm.num_steps:,.0f}"
    return f"{made} of {arm.budget:,}" if arm.arm == FEDSGD and is_short(arm) else made


def is_short(arm: ArmSummary) -> bool:
    """Whether it made fewer steps than the budget has, by more than what does not make up a round."""
    return arm.num_steps < arm.budget * 0.99


def write_csv(out: Path, comparison: Comparison, results: Sequence[UnitResult]) -> None:
    """Write all files."""
    _write(
        out / "arms.csv",
        (
            "arm",
            "accuracy_mean",
            "accuracy_spread",
            "loss_mean",
            "loss_spread",
            "rounds",
            "num_steps",
            "passes",
            "seconds",
        ),
        (
            (
                arm.arm,
                *((arm.accuracy.mean, arm.accuracy.spread) if arm.accuracy else (None, None)),
                arm.loss.mean,
                arm.loss.spread,
                arm.rounds,
                arm.num_steps,
                round(arm.passes, 3),
                round(arm.seconds, 3),
            )
            for arm in comparison.arms
        ),
    )
    _write(
        out / "rounds.csv",
        ("unit", "agent", "seed", "round", "num_steps", "accuracy", "loss", "duration_s"),
        (
            (*_unit(result), one.round, num_steps, one.accuracy, one.loss, round(one.duration_s, 6))
            for result in results
            for one, num_steps in zip(result.rounds, accumulate(done.num_steps for done in result.rounds), strict=True)
        ),
    )
    _write(
        out / "classes.csv",
        ("unit", "agent", "seed", "label", "num_examples", "accuracy"),
        (
            (*_unit(result), label, one.num_examples, one.accuracy)
            for result in results
            for label, one in result.tested.by_label.items()
        ),
    )
    _write(
        out / "agents.csv",
        ("unit", "agent", "seed", "data_of", "num_examples", "accuracy", "loss"),
        (
            (*_unit(result), agent_id, one.num_examples, one.accuracy, one.loss)
            for result in results
            for agent_id, one in result.tested.by_agent.items()
        ),
    )


def _unit(result: UnitResult) -> tuple[str, str, int]:
    return result.unit.kind, result.unit.agent, result.unit.seed


def _write(path: Path, heading: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heading)
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())
