"""What a person sees while the demonstration runs: a live view in a terminal, else a line a round, or nothing."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.text import Text

from coordinator.board import Shared
from coordinator.display import Display, progress_row
from coordinator.experiment.agents import AgentPlan
from coordinator.experiment.demo_plan import CENTRALIZED, SINGLE_AGENT, Plan
from coordinator.experiment.demo_report import Round
from coordinator.run import RunState


class Screen(Protocol):
    """Shows how it goes on, while it is entered."""

    def __enter__(self) -> Self:
        """Begin to show."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Show no more."""

    def look(self) -> None:
        """The board may say something new; called after each turn of the coordinator."""

    def advanced(self, way: str, done: Round) -> None:
        """One of the two ways that the federation is compared with did another round."""


class LiveScreen:
    """A view that is drawn again and again, and vanishes at the end: the report takes its place."""

    def __init__(self, plan: Plan, shared: Shared, broker: str, console: Console) -> None:
        self._num_rounds = plan.rounds
        self._board = shared.board
        self._names = {SINGLE_AGENT: f"{plan.agents[0].agent_id} alone", CENTRALIZED: "all data in one place"}
        self._done: dict[str, Round] = {}
        title = f"Midge: {plan.num_agents} agents learn to read digits, over MQTT ({broker})"
        captions = {agent.agent_id: f"has {_classes(agent)}" for agent in plan.agents}
        self._display = Display(shared, console, title, captions=captions, below=self._below, transient=True)

    def __enter__(self) -> Self:
        self._display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.__exit__(kind, error, trace)

    def look(self) -> None:
        """See `Screen`. It looks by itself."""

    def advanced(self, way: str, done: Round) -> None:
        """See `Screen`."""
        self._done[way] = done

    def _below(self) -> RenderableType:
        rows: list[RenderableType] = ["", Text("then, to compare, as many epochs of", style="dim")]
        width = max(map(len, self._names.values()))
        for way, name in self._names.items():
            done = self._done.get(way)
            beside = f"{done.accuracy:.1%}" if done else ""
            rows.append(progress_row(name, done.round if done else 0, self._num_rounds, beside, width))
        return Group(*rows, "", Text(self._hint(), style="italic"))

    def _hint(self) -> str:
        """Why the bars stand still, where they do."""
        if len(self._board.history) <= 1:
            return "Round 1 takes longer: each agent loads torch and its own images first."
        if self._board.state != RunState.DONE:
            return ""
        is_over = CENTRALIZED in self._done and self._done[CENTRALIZED].round == self._num_rounds
        return "Drawing the picture." if is_over else "The agents have ended. One more process trains without them."


class PlainScreen:
    """Lines, for where nothing can be drawn twice: a file, or another program."""

    def __init__(self, plan: Plan, shared: Shared, broker: str, console: Console) -> None:
        self._plan = plan
        self._shared = shared
        self._broker = broker
        self._console = console
        self._last_round = -1

    def __enter__(self) -> Self:
        hands = "; ".join(f"{agent.agent_id} has {_classes(agent)}" for agent in self._plan.agents)
        self._say(f"{self._plan.num_agents} agents learn to read digits, over MQTT ({self._broker}): {hands}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def look(self) -> None:
        """See `Screen`."""
        with self._shared.lock:
            scores = {number: view.score for number, view in self._shared.board.history.items()}
        for number, score in scores.items():
            if number > self._last_round and score is not None:
                self._last_round = number
                self._tell(f"round {number}", score.metrics.get("accuracy", 0.0), score.loss)

    def advanced(self, way: str, done: Round) -> None:
        """See `Screen`."""
        if done.round == self._plan.rounds:
            name = f"{self._plan.agents[0].agent_id} alone" if way == SINGLE_AGENT else "all data in one place"
            self._tell(f"{name}, round {done.round}", done.accuracy, done.loss)

    def _tell(self, what: str, accuracy: float, loss: float) -> None:
        self._say(f"{what} of {self._plan.rounds}: accuracy {accuracy:.1%}, loss {loss:.4f}")

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)


def _classes(agent: AgentPlan) -> str:
    return ",".join(map(str, agent.holding.classes))
