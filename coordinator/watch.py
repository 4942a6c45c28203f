"""`coordinator watch`: a running coordinator, seen live from another terminal or another machine."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape

from coordinator.board import Board, RoundView, from_snapshot
from coordinator.client import AwayError, RefusedError, Running
from coordinator.display import FRAMES_PER_SECOND, Performance, render
from coordinator.run import RunState
from coordinator.store import Store, StoreError

_TRY_AGAIN_S = 1.0
T = TypeVar("T")
_EXIT_CODES = {RunState.DONE: 0, RunState.STOPPED: 0, RunState.FAILED: 1}

_console = Console()
_errors = Console(stderr=True, highlight=False)


def watch(state_dir: Path, url: str | None, *, once: bool, as_json: bool) -> int:
    """Show a coordinator until its run is over; 0 where that is done or stopped, 1 where it failed, 130 after Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    watcher = _Watcher(state_dir, url, as_json=as_json)
    try:
        return watcher.once() if once else watcher.follow()
    except KeyboardInterrupt:
        return 130
    except (RefusedError, msgspec.ValidationError) as error:
        _errors.print(f"coordinator: {error}", markup=False, soft_wrap=True)
        return 2


def view(board: Board) -> RenderableType:
    """All that a person wants to see of a board."""
    title = f"{board.run_id or 'no run'}  {board.task}  {board.broker}"
    return Group(render(board, title), Performance(board))


class _Watcher:
    def __init__(self, state_dir: Path, url: str | None, *, as_json: bool) -> None:
        self._state_dir = state_dir
        self._url = url
        self._as_json = as_json
        self._board: Board | None = None
        self._before = self._newest_run()
        self._said = ""
        self._shown: object = None

    def once(self) -> int:
        try:
            snapshot = self._find().get("/api/v1/status")
        except AwayError as error:
            _errors.print(f"coordinator: {error}", markup=False, soft_wrap=True)
            return 2
        board = from_snapshot(snapshot)
        if self._as_json:
            _print_line(snapshot)
        else:
            _console.print(view(board))
        return 1 if board.state == RunState.FAILED else 0

    def follow(self) -> int:
        is_live = _console.is_terminal and not self._as_json
        live = Live(console=_console, get_renderable=self._view, refresh_per_second=FRAMES_PER_SECOND)
        with live if is_live else nullcontext():
            while True:
                try:
                    for line in self._find().lines("/api/v1/watch"):
                        self._take(msgspec.json.decode(line), is_live=is_live)
                except AwayError as error:
                    self._wait(error)
                code = self._exit_code()
                if code is not None:
                    return code
                time.sleep(_TRY_AGAIN_S)

    def _find(self) -> Running:
        return Running.find(self._state_dir) if self._url is None else Running(self._url)

    def _view(self) -> RenderableType:
        return view(self._board) if self._board is not None else ""

    def _take(self, snapshot: dict[str, Any], *, is_live: bool) -> None:
        self._said = ""
        self._board = board = from_snapshot(snapshot)
        scored = max((number for number, one in board.history.items() if one.score is not None), default=None)
        newest = max(board.history, default=None)
        seen = (board.run_id, board.state, newest, scored, board.events[-1:], board.is_connected)
        if is_live or seen == self._shown:
            return
        self._shown = seen
        if self._as_json:
            _print_line(snapshot)
        else:
            _console.print(_line(board, None if scored is None else board.history[scored]), soft_wrap=True)

    def _wait(self, error: AwayError) -> None:
        text = f"{error}; waiting for one (Ctrl-C ends this)"
        if text != self._said:
            _errors.print(escape(text), soft_wrap=True)
        self._said = text

    def _exit_code(self) -> int | None:
        """How the run that was watched ended, as it said, or as its database says where it could not say any more."""
        if self._board is None:
            return self._missed()
        state = self._board.state
        if state not in _EXIT_CODES:
            state = self._stored_state(self._board.run_id) or state
        return _EXIT_CODES.get(state)  # type: ignore[call-overload,no-any-return]

    def _missed(self) -> int | None:
        """How a run ended that began and was over between two looks; None where there was none."""
        newest = self._newest_run()
        if newest is None or (self._before is not None and newest["run_id"] == self._before["run_id"]):
            return None
        code = _EXIT_CODES.get(newest["state"])
        if code is not None:
            _errors.print(escape(f"{newest['run_id']}  {newest['state']} before it could be watched"), soft_wrap=True)
        return code

    def _newest_run(self) -> dict[str, Any] | None:
        rows = self._look(lambda store: store.runs())
        return rows[0] if rows else None

    def _stored_state(self, run_id: str) -> str | None:
        row = self._look(lambda store: store.run(run_id))
        return None if row is None else str(row["state"])

    def _look(self, read: Callable[[Store], T]) -> T | None:
        """What `read` finds in the database; None where there is none, or it is elsewhere."""
        if self._url is not None:
            return None
        try:
            store = Store(self._state_dir, read_only=True)
        except StoreError:
            return None
        try:
            return read(store)
        finally:
            store.close()


def _line(board: Board, scored: RoundView | None) -> str:
    """The board in a line, for a log."""
    parts = [board.run_id or "no run", board.status]
    score = None if scored is None else scored.score
    if scored is not None and score is not None:
        accuracy = f"accuracy {score.metrics['accuracy']:.1%}, " if "accuracy" in score.metrics else ""
        parts.append(f"after round {scored.round_num}: {accuracy}loss {score.loss:.4f}")
    if not board.is_connected:
        parts.append(f"broker: {board.broker_problem or 'connecting'}")
    return escape("  ".join(parts))


def _print_line(snapshot: dict[str, Any]) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(snapshot) + b"\n")
    sys.stdout.buffer.flush()
