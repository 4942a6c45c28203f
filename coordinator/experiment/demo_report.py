"""The demonstration's report: what three ways of learning came to, whether it is what it should be, and tables of it.

    federated      the agents together, none of which shows its data to anyone
    single_agent   the first agent alone, on its own data
    centralized    one model on all training data in one place: what federated learning can hope for at best

All three start from the same weights, make the same number of passes over their data, and are tested on the same images.
What one agent lacks shows on the labels that it does not own, hence `accuracy_other_labels`: over the test images with those
labels.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType
from rich import box
from rich.table import Table

MIN_ACCURACY = 0.93
MIN_GAIN = 0.05
DEFAULT_ROUNDS = 30
DEFAULT_AGENTS = 3


class Round(msgspec.Struct, kw_only=True):
    """How the model does after this many rounds. For the two that are no federation a round is as many epochs."""

    round: int
    accuracy: float
    loss: float
    duration_s: float
    num_updates: int | UnsetType = UNSET


class Learned(msgspec.Struct, kw_only=True):
    """What one way of learning came to.

    Attributes:
        accuracy: of the last model on the test data, 0 to 1.
        loss: its mean loss there.
        accuracy_other_labels: its accuracy on the labels that the first agent does not own.
        accuracy_by_label: its accuracy on each label.
        wall_s: from the start of the processes that trained until the last model was there, import of torch included.
        rounds: one entry a round.
    """

    accuracy: float
    loss: float
    accuracy_other_labels: float
    accuracy_by_label: dict[str, float]
    wall_s: float
    rounds: list[Round]


class Report(msgspec.Struct, kw_only=True):
    """All of it, as `report.json` has it.

    Attributes:
        agents: the labels that each agent owns.
        broker: "mosquitto" or "embedded", or the address of the one that was given.
        wall_s: of the whole demonstration.
        problems: what is not as it should be; empty where all is well.
    """

    federated: Learned
    single_agent: Learned
    centralized: Learned
    broker: str
    wall_s: float
    run_id: str
    task: str
    seed: int
    local_epochs: int
    agents: dict[str, list[int]]
    problems: list[str] = []

    @property
    def first_agent(self) -> str:
        """The one that also learns alone."""
        return next(iter(self.agents))


def judge(report: Report) -> list[str]:
    """What is not as it should be: one sentence each, with what to do."""
    federated, alone = report.federated.accuracy, report.single_agent.accuracy
    hint = _hint(report)
    problems = []
    if federated < MIN_ACCURACY:
        problems.append(f"federated accuracy is {federated:.1%}, expected at least {MIN_ACCURACY:.0%}{hint}")
    if federated - alone < MIN_GAIN:
        gain = f"{(federated - alone) * 100:+.1f} points over {report.first_agent} alone ({alone:.1%})"
        problems.append(f"federated accuracy is {gain}, expected at least {MIN_GAIN * 100:+.0f}{hint}")
    return problems


def summary(report: Report) -> str:
    """One sentence: what was gained by learning together, and what it cost against data in one place."""
    federated, alone, central = (
        way.accuracy * 100 for way in (report.federated, report.single_agent, report.centralized)
    )
    gained = f"Together: {federated - alone:+.1f} points over {report.first_agent} alone"
    return f"{gained}, {federated - central:+.1f} against all data in one place."


def table(report: Report) -> Table:
    """The three side by side."""
    num_epochs = len(report.federated.rounds) * report.local_epochs
    first = report.first_agent
    view = Table(
        box=box.SIMPLE_HEAD,
        title=f"{report.task}, {num_epochs} epochs each",
        title_style="bold",
        caption="seconds: from the start of the processes, loading torch included",
    )
    view.add_column("")
    for heading in ("accuracy", f"on labels\n{first} lacks", "loss", "seconds"):
        view.add_column(heading, justify="right", vertical="bottom")
    rows = (
        (f"federated, {len(report.agents)} agents", report.federated, "bold green"),
        (f"{first} alone", report.single_agent, ""),
        ("centralised, all data", report.centralized, ""),
    )
    for name, way, style in rows:
        scores = (f"{way.accuracy:.1%}", f"{way.accuracy_other_labels:.1%}", f"{way.loss:.3f}", f"{way.wall_s:.1f}")
        view.add_row(name, *scores, style=style)
    return view


def _hint(report: Report) -> str:
    num_rounds = len(report.federated.rounds)
    if num_rounds < DEFAULT_ROUNDS:
        return f": {num_rounds} round{'s are' if num_rounds > 1 else ' is'} too few, take {DEFAULT_ROUNDS}"
    if len(report.agents) > DEFAULT_AGENTS:
        return f": {len(report.agents)} agents with so few labels each need more rounds"
    return ""
