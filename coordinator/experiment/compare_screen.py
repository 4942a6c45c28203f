"""What a person sees while a comparison runs: a live view in a terminal, else a line a unit, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from coordinator.board import Shared
from coordinator.experiment.baselines import Surveyed
from coordinator.experiment.compare_plan import ComparePlan
from coordinator.experiment.compare_runner import units_of
from coordinator.experiment.compare_store import Unit, UnitResult
from coordinator.experiment.compare_summary import label_of
from coordinator.experiment.scores import RoundScore

_FRAMES_PER_SECOND = 4


class PlainScreen:
    """Lines, for where nothing can be drawn twice; no lines on a quiet console."""

    def __init__(self, plan: ComparePlan, console: Console) -> None:
        self._plan = plan
        self._console = console

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def surveyed(self, survey: Surveyed, rounds: dict[str, int]) -> None:  # noqa: ARG002
        """See `Watcher`."""
        for agent in self._plan.agents:
            held = survey.agents[agent.agent_id]
            self._say(f"{agent.agent_id}: {held.num_examples} examples, {agent.holding.words()}")

    def began(self, unit: Unit, shared: Shared | None) -> None:
        """See `Watcher`."""

    def look(self) -> None:
        """See `Watcher`."""

    def advanced(self, unit: Unit, done: RoundScore) -> None:
        """See `Watcher`."""

    def finished(self, result: UnitResult, *, is_new: bool) -> None:
        """See `Watcher`."""
        seconds = sum(one.duration_s for one in result.rounds)
        took = f"{seconds:.1f} s" if is_new else "done before"
        rounds = len(result.rounds) - 1
        self._say(f"{result.unit.words}: {_scores(result)} ({rounds} rounds, {result.num_steps} steps, {took})")

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False)


class LiveScreen:
    """A view that is drawn again and again, and vanishes at the end: the table takes its place."""

    def __init__(self, plan: ComparePlan, console: Console) -> None:
        self._plan = plan
        self._units = units_of(plan)
        self._rounds: dict[str, int] = {}
        self._done: dict[Unit, RoundScore] = {}
        self._finished: dict[Unit, UnitResult] = {}
        self._unit: Unit | None = None
        self._shared: Shared | None = None
        self._live = Live(
            console=console, get_renderable=self.view, refresh_per_second=_FRAMES_PER_SECOND, transient=True
        )

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def surveyed(self, survey: Surveyed, rounds: dict[str, int]) -> None:  # noqa: ARG002
        """See `Watcher`."""
        self._rounds = rounds

    def began(self, unit: Unit, shared: Shared | None) -> None:
        """See `Watcher`."""
        self._unit, self._shared = unit, shared

    def look(self) -> None:
        """See `Watcher`. It looks by itself."""

    def advanced(self, unit: Unit, done: RoundScore) -> None:
        """See `Watcher`."""
        self._done[unit] = done

    def finished(self, result: UnitResult, *, is_new: bool) -> None:  # noqa: ARG002
        """See `Watcher`."""
        self._finished[result.unit] = result
        self._unit = self._shared = None

    def view(self) -> RenderableType:
        """What is drawn."""
        plan, status = self._plan, self._status()
        many = f"{len(plan.agents)} agent{'s' if len(plan.agents) > 1 else ''}"
        title = f"Midge compares: {plan.settings.task}, {many}, {plan.compare.seeds} seeds, into {plan.out}"
        table = Table.grid(padding=(0, 2))
        for kind in dict.fromkeys(unit.kind for unit in self._units):
            units = [unit for unit in self._units if unit.kind == kind]
            total = sum(self._total(unit) for unit in units)
            done = sum(self._total(unit) if unit in self._finished else self._at(unit) for unit in units)
            bar = ProgressBar(total=max(total, 1), completed=done, width=30)
            num_done = sum(unit in self._finished for unit in units)
            table.add_row(_kind(kind, len(plan.agents)), bar, f"{num_done}/{len(units)}", self._latest(units))
        return Group(
            Text(title, style="bold"), "", table, "", Text(status, style="dim", overflow="ellipsis", no_wrap=True)
        )

    def _total(self, unit: Unit) -> int:
        return self._rounds.get(unit.kind, self._plan.settings.rounds)

    def _at(self, unit: Unit) -> int:
        if unit == self._unit and self._shared is not None:
            with self._shared.lock:
                return max(self._shared.board.history, default=0)
        return self._done[unit].round if unit in self._done else 0

    def _latest(self, units: Sequence[Unit]) -> str:
        finished = [self._finished[unit] for unit in units if unit in self._finished]
        return _scores(finished[-1]).partition(", ")[0] if finished else ""

    def _status(self) -> str:
        if not self._rounds:
            return "Looking at everybody's data."
        if self._unit is None:
            return "Putting it together." if len(self._finished) == len(self._units) else ""
        doing = ""
        if self._shared is not None:
            with self._shared.lock:
                doing = f": {self._shared.board.status}"
        elif self._unit in self._done:
            doing = f": round {self._done[self._unit].round} of {self._total(self._unit)}"
        return f"{self._unit.words}{doing}"


def _kind(kind: str, num_agents: int) -> str:
    return "each alone" if kind == "alone" else label_of(kind, num_agents)


def _scores(result: UnitResult) -> str:
    score = result.tested.score
    accuracy = "" if score.accuracy is None else f"accuracy {score.accuracy:.1%}, "
    return f"{accuracy}loss {score.loss:.4f}"
