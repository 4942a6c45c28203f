"""Live progress in the terminal: the round, what each agent is doing, how well the model does, and the time left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from coordinator.board import AgentView, Board, Shared
from midge.wire.messages import Evaluation

FRAMES_PER_SECOND = 8
_MAX_AGENTS = 12
_SPARKS = "▁▂▃▄▅▆▇█"
_NUM_SPARKS = 24
_NUM_COLUMNS = 8
"""Rounds that the table of agents by round shows."""
_STYLES = {
    "fetching": "blue",
    "training": "cyan",
    "uploading": "blue",
    "accepted": "green",
    "invited": "dim",
    "idle": "dim",
    "offline": "red",
    "lost": "red",
    "refused": "yellow",
    "rejected": "red",
}
# "fetching" is what the coordinator takes an agent for that has accepted and said no more: it may be training already.
_WORDS = {"accepted": "done", "fetching": "at work", "idle": "waiting"}
_WORD_WIDTH = 9


class Above:
    """A stream for the log while a live view is drawn: its lines go above the view, whole.

    Args:
        console: the view's.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    def write(self, text: str) -> int:
        """Print what a log handler says."""
        if text.strip("\n"):
            self._console.print(Text(text.rstrip("\n")), soft_wrap=True)
        return len(text)

    def flush(self) -> None:
        """Nothing is kept back."""


class Display:
    """A live view of the board, while it is entered. It is drawn by a thread of its own, so that no terminal slows the work.

    Args:
        shared: the board.
        console: where to draw.
        title: above it all.
        captions: what to show beside an agent's id.
        below: gives what to draw below the board; called by that thread.
        transient: whether the view vanishes at the end.
    """

    def __init__(
        self,
        shared: Shared,
        console: Console,
        title: str = "",
        *,
        captions: Mapping[str, str] | None = None,
        below: Callable[[], RenderableType] | None = None,
        transient: bool = False,
    ) -> None:
        self._shared = shared
        self._title = title
        self._captions = captions or {}
        self._below = below
        self._live = Live(
            console=console,
            get_renderable=self._view,
            refresh_per_second=FRAMES_PER_SECOND,
            transient=transient,
        )

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def _view(self) -> RenderableType:
        with self._shared.lock:
            view = render(self._shared.board, self._title, self._captions)
        return view if self._below is None else Group(view, self._below())


def render(board: Board, title: str = "", captions: Mapping[str, str] | None = None) -> RenderableType:
    """The board as something rich can draw."""
    done = max(board.history, default=0)
    parts: list[RenderableType] = [Text(title, style="bold"), ""] if title else []
    parts += [
        progress_row("rounds", done, board.rounds, _time_left(board, done)),
        _scores(board),
        _agents(board, captions or {}),
        Text(board.status, style="dim", overflow="ellipsis", no_wrap=True),
    ]
    if not board.is_connected and board.broker_problem:
        parts.append(Text(f"broker {board.broker}: {board.broker_problem}", style="red"))
    if board.events:
        parts.append(Text(board.events[-1], style="yellow"))
    return Group(*parts)


class Performance:
    """How the model does by round: on the test data, over all agents, and on each agent's own data.

    A column is a version: as many of the latest as there is room for. Agents score version r - 1 in round r, before they train
    from it; their training loss is of round r. Empty where no agent has reported.
    """

    def __init__(self, board: Board) -> None:
        self._board = board

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The widest table that fits."""
        if not self._board.agent_rounds:
            return
        unbounded = options.update(max_width=10_000)
        for num_columns in range(_NUM_COLUMNS, 0, -1):
            table = _performance_table(self._board, num_columns)
            if num_columns == 1 or Measurement.get(console, unbounded, table).maximum <= options.max_width:
                yield table
                return


def _performance_table(board: Board, num_columns: int) -> Table:
    by_agent = {
        agent_id: {number - 1: one.evaluation for number, one in rounds.items() if one.evaluation is not None}
        for agent_id, rounds in board.agent_rounds.items()
    }
    scores = [score for versions in by_agent.values() for score in versions.values()]
    metric = "accuracy" if scores and all("accuracy" in score.metrics for score in scores) else "loss"
    versions = sorted(set(board.history) | {number for each in by_agent.values() for number in each})[-num_columns:]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), title_justify="left", title_style="bold")
    table.title = f"{metric} of the global model after round"
    table.add_column("on the data of", no_wrap=True)
    for number in versions:
        table.add_column(str(number), justify="right", no_wrap=True)
    table.add_column("training loss", justify="right", no_wrap=True)
    for name, source in (("the test set", "central"), ("all agents", "federated")):
        globals_ = {number: getattr(board.history[number], source) for number in versions if number in board.history}
        if any(globals_.values()):
            table.add_row(name, *(_score(globals_.get(number), metric) for number in versions), "", style="bold")
    ordered = sorted(by_agent, key=_natural)
    for agent_id in ordered[:_MAX_AGENTS]:
        last = board.agent_rounds[agent_id][max(board.agent_rounds[agent_id])]
        loss = "" if last.training_loss is None else f"{last.training_loss:.4f}"
        table.add_row(agent_id, *(_score(by_agent[agent_id].get(number), metric) for number in versions), loss)
    if len(ordered) > _MAX_AGENTS:
        table.add_row(f"and {len(ordered) - _MAX_AGENTS} more")
    return table


def _score(score: Evaluation | None, metric: str) -> str:
    if score is None:
        return ""
    if metric == "loss":
        return f"{score.loss:.4f}"
    return f"{score.metrics[metric]:.1%}" if metric in score.metrics else ""


def progress_row(name: str, done: int, total: int, beside: str, width: int = 0) -> RenderableType:
    """A line with a bar, the name `width` characters wide."""
    row = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=max(total, 1), completed=done, width=30)
    row.add_row(Text(name.ljust(width), style="bold"), bar, f"{done}/{total}", beside)
    return row


def sparkline(values: list[float]) -> str:
    """The latest values as bars of eight heights, from the least to the greatest of all values."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    heights = [min(int((value - low) / span * len(_SPARKS)), len(_SPARKS) - 1) for value in values[-_NUM_SPARKS:]]
    return "".join(_SPARKS[height] for height in heights)


def _scores(board: Board) -> RenderableType:
    scored = [view.score for view in board.history.values() if view.score is not None]
    if not scored:
        return Text("no evaluation yet", style="dim")
    accuracies = [score.metrics["accuracy"] for score in scored if "accuracy" in score.metrics]
    text = Text(overflow="ellipsis", no_wrap=True)
    if "accuracy" in scored[-1].metrics:
        text.append(f"accuracy {accuracies[-1]:.1%} ", "bold green").append(sparkline(accuracies), "green").append("  ")
    text.append(f"loss {scored[-1].loss:.4f}")
    if board.best_value is not None:
        text.append(f"  best {board.best_value:.4f} in round {board.best_round}", "dim")
    return text


def _agents(board: Board, captions: Mapping[str, str]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    shown = sorted(board.agents.values(), key=lambda agent: _natural(agent.agent_id))
    for agent in shown[:_MAX_AGENTS]:
        caption = Text(captions.get(agent.agent_id, ""), style="dim")
        table.add_row(agent.agent_id, caption, _doing(agent), _bar(agent), Text(agent.detail[:60], style="dim"))
    if len(shown) > _MAX_AGENTS:
        table.add_row(f"and {len(shown) - _MAX_AGENTS} more", "", "", "", "")
    return table


def _natural(name: str) -> tuple[int, str]:
    """agent-10 comes after agent-9."""
    return len(name), name


def _doing(agent: AgentView) -> Text:
    if agent.quarantined_until:
        return Text("quarantined", style="red")
    word = _WORDS.get(agent.activity, agent.activity)
    return Text(word.ljust(_WORD_WIDTH), style=_STYLES.get(agent.activity, ""))


def _bar(agent: AgentView) -> RenderableType:
    if agent.activity not in ("training", "uploading", "fetching", "accepted"):
        return ""
    return ProgressBar(total=1.0, completed=agent.fraction, width=16, pulse=agent.activity == "fetching")


def _time_left(board: Board, done: int) -> str:
    durations = [view.duration_s for view in board.history.values() if view.round_num > 0]
    if not durations or done >= board.rounds:
        return ""
    # In the first round agents start their trainers, so it says little about those to come, but that they are shorter.
    word, typical_s = ("about", median(durations[1:][-5:])) if len(durations) > 1 else ("at most", durations[0])
    left_s = (board.rounds - done) * typical_s
    return f"{word} {left_s:.0f} s left" if left_s < 120 else f"{word} {left_s / 60:.0f} min left"
