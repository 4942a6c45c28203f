"""Live progress in the terminal: the round, what each agent is doing, how well the model does, and the time left."""

from __future__ import annotations

import time
from statistics import median
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from coordinator.board import AgentView, Board, RoundView, Shared

_REFRESH_S = 0.1
_SPARKS = "▁▂▃▄▅▆▇█"
_STYLES = {
    "training": "cyan",
    "uploading": "blue",
    "accepted": "cyan",
    "invited": "dim",
    "offline": "red",
    "lost": "red",
    "refused": "yellow",
    "rejected": "red",
}
_WORDS = {"accepted": "done", "fetching": "fetching the model", "idle": "waiting"}


class Display:
    """A live view of the board, drawn at most ten times a second.

    Args:
        shared: the board.
        console: where to draw.
        title: above it all.
    """

    def __init__(self, shared: Shared, console: Console, title: str = "") -> None:
        self._shared = shared
        self._title = title
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._drawn_at = 0.0

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._draw()
        self._live.stop()

    def refresh(self) -> None:
        """Draw, unless that was just done."""
        if time.monotonic() - self._drawn_at >= _REFRESH_S:
            self._draw()

    def _draw(self) -> None:
        self._drawn_at = time.monotonic()
        with self._shared.lock:
            view = render(self._shared.board, self._title)
        self._live.update(view, refresh=True)


def render(board: Board, title: str = "") -> RenderableType:
    """The board as something rich can draw."""
    done = max(board.history, default=0)
    header = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=max(board.rounds, 1), completed=done, width=36)
    header.add_row(Text("rounds", style="bold"), bar, f"{done}/{board.rounds}", _time_left(board, done))
    parts: list[RenderableType] = [Text(title, style="bold")] if title else []
    parts += [
        header,
        _scores(board),
        _agents(board),
        Text(board.status, style="dim", overflow="ellipsis", no_wrap=True),
    ]
    if not board.is_connected and board.broker_problem:
        parts.append(Text(f"broker {board.broker}: {board.broker_problem}", style="red"))
    if board.events:
        parts.append(Text(board.events[-1], style="yellow"))
    return Group(*parts)


def _scores(board: Board) -> RenderableType:
    scored = [view for view in board.history.values() if view.score is not None]
    if not scored:
        return Text("no evaluation yet", style="dim")
    last = scored[-1].score
    assert last is not None
    accuracy = last.metrics.get("accuracy")
    text = Text(f"loss {last.loss:.4f}")
    if accuracy is not None:
        text = Text(f"accuracy {accuracy:.1%}  ", style="bold green") + text
        values = [view.score.metrics["accuracy"] for view in scored if view.score and "accuracy" in view.score.metrics]
        text += Text("  " + _spark(values[-40:]), style="green")
    if board.best_value is not None:
        text += Text(f"  best {board.best_value:.4f} in round {board.best_round}", style="dim")
    return text


def _agents(board: Board) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    shown = sorted(board.agents.values(), key=lambda agent: agent.agent_id)
    for agent in shown[:12]:
        table.add_row(agent.agent_id, _doing(agent), _bar(agent), Text(agent.detail[:60], style="dim"))
    if len(shown) > 12:
        table.add_row(f"and {len(shown) - 12} more", "", "", "")
    return table


def _doing(agent: AgentView) -> Text:
    return Text(_WORDS.get(agent.activity, agent.activity), style=_STYLES.get(agent.activity, ""))


def _bar(agent: AgentView) -> RenderableType:
    if agent.activity not in ("training", "uploading", "fetching", "accepted"):
        return ""
    return ProgressBar(total=1.0, completed=agent.fraction, width=16)


def _spark(values: list[float]) -> str:
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(_SPARKS[min(int((value - low) / span * len(_SPARKS)), len(_SPARKS) - 1)] for value in values)


def _time_left(board: Board, done: int) -> str:
    durations = [
        view.duration_s for view in list(board.history.values())[-5:] if isinstance(view, RoundView) and view.round_num
    ]
    if not durations or done >= board.rounds:
        return ""
    left_s = (board.rounds - done) * median(durations)
    return f"about {left_s:.0f} s left" if left_s < 120 else f"about {left_s / 60:.0f} min left"
