"""What the commands do, once their options are read. Each returns its exit code: 0 done, 1 the run failed, 2 wrong use."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from coordinator import base_models
from coordinator.base_models import BaseModelError
from coordinator.client import AwayError, RefusedError, Running
from coordinator.config import Settings, load_settings
from coordinator.display import Above, Display
from coordinator.driver import SupersededError
from coordinator.exports import ExportError, choose_agent, choose_version, find_run
from coordinator.http import HttpError
from coordinator.models import ModelError, ModelStore
from coordinator.models import export as export_model
from coordinator.run import RunState
from coordinator.scoring import training_metrics
from coordinator.service import Service
from coordinator.store import DATABASE, Store, StoreError
from coordinator.tracking import TrackerError
from midge import failpoints, log
from midge.failpoints import FailPointError
from midge.settings import SettingsError
from midge.tasks.errors import TaskError
from midge.tasks.references import check_source
from midge.transport.address import Address, AddressError
from midge.wire.errors import TopicError
from midge.wire.messages import Evaluation

_console = Console()
_errors = Console(stderr=True, highlight=False)


def run(config: Path | None, assignments: Sequence[str], options: Mapping[str, Any], *, as_json: bool) -> int:
    """`coordinator run`."""
    loaded = _load(config, assignments, options)
    if loaded is None:
        return 2
    settings, address = loaded
    try:
        check_source(settings.task)  # before a run is recorded that could only fail
    except TaskError as error:
        return _wrong(error)
    show = sys.stderr.isatty() and not as_json
    level = "warning" if show and settings.log_level == "info" else settings.log_level
    log.setup(settings.log_format, level, Above(_errors) if show else None)
    try:
        failpoints.arm("coordinator")
        service = Service(settings, address)
        word = service.begin_run()
    except (StoreError, HttpError, ModelError, BaseModelError, TrackerError, FailPointError, OSError) as error:
        return _cannot_start(error, settings)
    if not as_json:
        _errors.print(f"run [bold]{service.run_id}[/] {word}; metrics and status at {service.http_url}", soft_wrap=True)
    code = _work(service, Display(service.shared, _errors) if show else None)
    _report(service, as_json=as_json)
    return code


def serve(config: Path | None, assignments: Sequence[str], options: Mapping[str, Any], run_config: Path | None) -> int:
    """`coordinator serve`."""
    if config is not None and run_config is not None:
        return _wrong("give the configuration as CONFIG or with --run, not both")
    loaded = _load(run_config or config, assignments, options)
    if loaded is None:
        return 2
    settings, address = loaded
    log.setup(settings.log_format, settings.log_level)
    try:
        if run_config is not None:
            check_source(settings.task)
        failpoints.arm("coordinator")
        service = Service(settings, address, keep_serving=True)
        if run_config is not None:
            service.begin_run(again=False)
    except (
        TaskError,
        StoreError,
        HttpError,
        ModelError,
        BaseModelError,
        TrackerError,
        FailPointError,
        OSError,
    ) as error:
        return _cannot_start(error, settings)
    code = _work(service, None)
    return 0 if code == 1 and service.state is None else code  # it served, and was asked to stop


def status(state_dir: Path, *, as_json: bool) -> int:
    """`coordinator status`."""
    try:
        board = _ask_running(state_dir)
    except RefusedError as error:
        return _wrong(error)
    if board is None:
        return _look(state_dir, lambda store: _show_stopped(store, as_json=as_json))
    if as_json:
        _print_json(board)
        return 0
    if board["run_id"]:
        _console.print(f"[bold]{board['run_id']}[/] {escape(board['task'])}: {escape(board['status'])}", soft_wrap=True)
    else:
        _console.print("the coordinator is up and has no run; `coordinator serve --run FILE` begins one")
    if board["waiting_for"]:
        _console.print(f"  {_wait_line(board)}", soft_wrap=True)
    if not board["is_connected"]:
        _console.print(escape(f"broker {board['broker']}: {board['broker_problem'] or 'connecting'}"))
    for event in board["events"][-5:]:
        _console.print(escape(f"  {event}"), soft_wrap=True)
    _show_agents(board["agents"])
    return 0


def _wait_line(board: Mapping[str, Any]) -> str:
    """What a coordinator waits for: since when, until when, what is missing."""
    since, until = (board[key][11:19] for key in ("waiting_since", "waiting_until"))
    end = f"until {until} at most" if until else "as long as it takes"
    missing = f", {board['num_missing']} missing" if board["num_missing"] else ""
    return f"waits for {board['waiting_for']} since {since} UTC, {end}{missing}"


def agents(state_dir: Path, *, as_json: bool) -> int:
    """`coordinator agents`."""
    try:
        board = _ask_running(state_dir)
    except RefusedError as error:
        return _wrong(error)

    def show(store: Store) -> int:
        rows = store.agents()
        for row in rows:
            row.update(_agent_now(row, board))
        if as_json:
            _print_json(rows)
        else:
            _show_agents(rows)
        return 0

    return _look(state_dir, show)


def runs(state_dir: Path, *, as_json: bool) -> int:
    """`coordinator runs`."""

    def show(store: Store) -> int:
        rows = [_run_view(row) for row in store.runs()]
        if as_json:
            _print_json(rows)
            return 0
        table = Table(
            Column("run", no_wrap=True), "task", "state", "round", "best (round)", Column("began", no_wrap=True)
        )
        for row in rows:
            best = row["best"]
            shown = "" if best is None else f"{best['value']:.4f} ({best['round_num']})"
            table.add_row(
                row["run_id"],
                escape(row["task"]),
                row["state"],
                f"{row['round_num']}/{row['rounds']}",
                shown,
                row["created_at"][:16].replace("T", " "),
            )
        _console.print(table)
        return 0

    return _look(state_dir, show)


def models(state_dir: Path, run_id: str | None, *, as_json: bool) -> int:
    """`coordinator models`."""

    def show(store: Store) -> int:
        try:
            row = find_run(store, run_id or "latest", with_model=True)
        except ExportError as error:
            return _wrong(error)
        kept = ModelStore(state_dir / "models").digests()
        versions = [_version_view(version, kept) for version in store.versions(row["run_id"])]
        if as_json:
            training = training_metrics(store.kept_updates(row["run_id"]))
            _print_json([{**version, "training": training.get(version["round_num"])} for version in versions])
            return 0
        table = Table("round", "digest", "updates", "examples", "loss", "accuracy", "seconds", "file")
        for version in versions:
            score = version["central"] or version["federated"] or {}
            table.add_row(
                str(version["round_num"]),
                version["digest"][:12],
                str(version["num_updates"]),
                str(version["num_examples"]),
                _number(score.get("loss")),
                _number(score.get("metrics", {}).get("accuracy")),
                f"{version['duration_s']:.2f}",
                "kept" if version["is_kept"] else "pruned",
            )
        _console.print(f"run {row['run_id']}, {row['state']}{_reason(row)}", markup=False, soft_wrap=True)
        _console.print(table)
        return 0

    return _look(state_dir, show)


def push_model(name: str, task: str, file: Path | None, seed: int, state_dir: Path, *, as_json: bool) -> int:
    """`coordinator models push`."""

    def push(store: Store) -> int:
        digest = base_models.push(store, ModelStore(state_dir / "models"), name, task=task, seed=seed, file=file)
        row = store.base_model(name)
        if as_json:
            _print_json(row)
        else:
            text = f"registered {name}, {digest[:12]}: begin a run from it with base_model = {name}, or --set base_model={name}"
            _console.print(escape(text), soft_wrap=True)
        return 0

    return _change(state_dir, push)


def list_base_models(state_dir: Path, *, as_json: bool) -> int:
    """`coordinator models bases`."""

    def show(store: Store) -> int:
        rows = store.base_models()
        if as_json:
            _print_json(rows)
            return 0
        table = Table("name", "digest", "task", "from", "elements", "registered")
        for row in rows:
            named = (row["name"], row["digest"][:12], escape(row["task"]), escape(row["source"]))
            table.add_row(*named, str(row["num_elements"]), row["created_at"][:19])
        _console.print(table)
        return 0

    return _look(state_dir, show)


def remove_model(name: str, state_dir: Path) -> int:
    """`coordinator models remove`."""

    def remove(store: Store) -> int:
        is_gone = base_models.remove(store, ModelStore(state_dir / "models"), name)
        _console.print(
            f"removed {name}" + ("" if is_gone else "; its file stays, as a run's version or another name has it")
        )
        return 0

    return _change(state_dir, remove) if (state_dir / DATABASE).exists() else _look(state_dir, remove)


def export(run_id: str, which: str, agent_id: str | None, path: Path, state_dir: Path) -> int:
    """`coordinator export`."""

    def write(store: Store) -> int:
        try:
            chosen = choose_version(store, run_id, which) if agent_id is None else choose_agent(store, run_id, agent_id)
            with chosen.model as model:
                export_model(model, path)
        except (ExportError, ModelError, OSError) as error:
            return _wrong(error)
        _errors.print(escape(f"wrote {chosen.what} to {path}"), soft_wrap=True)
        return 0

    return _look(state_dir, write)


def close_round(state_dir: Path, *, as_json: bool) -> int:
    """`coordinator round close`."""
    try:
        closed = Running.find(state_dir).post("/api/v1/round/close")
    except (AwayError, RefusedError) as error:
        return _wrong(error)
    if as_json:
        _print_json(closed)
    else:
        _console.print(escape(closed["text"]), soft_wrap=True)
    return 0 if closed["outcome"] == "closed" else 1


def _work(service: Service, display: Display | None) -> int:
    """Run the service until it is over or a signal says stop."""

    def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        service.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    try:
        with display or nullcontext():
            service.run()
    except SupersededError as error:
        _wrong(error)
        return 1
    except MemoryError:
        _wrong(f"{service.settings.state_dir}: out of memory; start it again, with more, to go on")
        return 1
    except (StoreError, OSError) as error:
        what = (isinstance(error, OSError) and error.strerror) or error
        _wrong(f"{service.settings.state_dir}: {what}; start it again to go on")
        return 1
    return 1 if service.state in (RunState.FAILED, None) else 0


def _report(service: Service, *, as_json: bool) -> None:
    """How the run ended, for a person or a program."""
    board = service.shared.snapshot()
    if as_json:
        keys = ("run_id", "task", "state", "reason", "best_round", "best_value", "history")
        _print_json({key: board[key] for key in keys})
        return
    match service.state:
        case RunState.DONE:
            best = (
                f", best {board['best_value']:.4f} in round {board['best_round']}"
                if board["best_round"] is not None
                else ""
            )
            _errors.print(f"[green]done[/]: {board['rounds']} rounds of {board['run_id']}{best}", soft_wrap=True)
            directory = (
                f" --state-dir {service.settings.state_dir}" if service.settings.state_dir != "midge-state" else ""
            )
            command = f"coordinator export {board['run_id']}{directory} --to model.safetensors"
            _errors.print(escape(f"next: {command}"), soft_wrap=True)
        case RunState.STOPPED:
            _errors.print(
                f"stopped: run {board['run_id']} goes on when it is started again in the same way", soft_wrap=True
            )
        case RunState.FAILED:
            _errors.print(f"[red]failed[/]: {escape(board['reason'])}", soft_wrap=True)
        case _:
            pass


def _load(
    config: Path | None, assignments: Sequence[str], options: Mapping[str, Any]
) -> tuple[Settings, Address] | None:
    given = {key: value for key, value in options.items() if value is not None}
    try:
        settings = load_settings(file=config, environ=os.environ, options=given, assignments=assignments)
        address = Address.parse(
            settings.broker,
            username=settings.username or None,
            password=settings.read_password() or None,
            ca_file=settings.ca_file or None,
            cert_file=settings.cert_file or None,
            key_file=settings.key_file or None,
        )
    except (SettingsError, AddressError) as error:
        _wrong(error)
        return None
    return settings, address


def _wrong(error: object) -> int:
    _errors.print(f"coordinator: {error}", markup=False, soft_wrap=True)
    return 2


def _cannot_start(error: Exception, settings: Settings) -> int:
    """2 for what the operator got wrong; 1 for a disk that fails: started again later, it may work."""
    if not isinstance(error, OSError):
        return _wrong(error)
    _wrong(f"{error.filename or settings.state_dir}: {error.strerror}" if error.strerror else error)
    return 1


def _look(state_dir: Path, show: Callable[[Store], int]) -> int:
    try:
        store = Store(state_dir, read_only=True)
    except StoreError as error:
        return _wrong(error)
    try:
        return show(store)
    finally:
        store.close()


def _change(state_dir: Path, change: Callable[[Store], int]) -> int:
    """Like `_look`, but writing; a coordinator may be at work in the directory."""
    try:
        store = Store(state_dir)
    except StoreError as error:
        return _wrong(error)
    try:
        return change(store)
    except (BaseModelError, ModelError, TopicError, StoreError) as error:
        return _wrong(error)
    finally:
        store.close()


def _ask_running(state_dir: Path) -> dict[str, Any] | None:
    """The board of the coordinator that runs in this directory; None where none answers.

    Raises:
        RefusedError: one may run here, and this user may not know.
    """
    try:
        board: dict[str, Any] = Running.find(state_dir).get("/api/v1/status")
    except AwayError:
        return None
    return board


def _show_stopped(store: Store, *, as_json: bool) -> int:
    rows = store.runs()
    latest = _run_view(rows[0]) if rows else None
    if as_json:
        _print_json({"state": "stopped", "run": latest})
    elif latest is None:
        _console.print("no coordinator is running here, and there was no run")
    else:
        round_of = f"round {latest['round_num']} of {latest['rounds']}"
        state = f"{latest['state']}: {round_of}{_reason(latest)}"
        text = f"no coordinator is running here; the latest run, {latest['run_id']}, is {state}"
        _console.print(text, markup=False, soft_wrap=True)
    return 0


def _reason(run: Mapping[str, Any]) -> str:
    """Why a run failed, to be added to a line that says so; empty for one that did not."""
    return f": {run['reason']}" if run["state"] == "failed" and run["reason"] else ""


def _run_view(row: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("run_id", "task", "state", "reason", "round_num", "rounds", "created_at", "updated_at")
    best = None if row["best_round"] is None else {"round_num": row["best_round"], "value": row["best_value"]}
    return {**{key: row[key] for key in keys}, "best": best}


def _version_view(version: Mapping[str, Any], kept: set[str]) -> dict[str, Any]:
    scores = {source: _score_view(version[source]) for source in ("central", "federated")}
    plain = {key: value for key, value in version.items() if key not in scores and key != "run_id"}
    return {**plain, **scores, "is_kept": version["digest"] in kept}


def _score_view(score: Evaluation | None) -> dict[str, Any] | None:
    return None if score is None else msgspec.to_builtins(score)


def _agent_now(row: Mapping[str, Any], board: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is known of an agent now, of its row in the database and the board of the coordinator, where one runs."""
    seen = {} if board is None else {agent["agent_id"]: agent for agent in board["agents"]}.get(row["agent_id"], {})
    activity, detail = seen.get("activity", ""), seen.get("detail", "")
    if "presence" in seen or row["state"] == "offline":
        now = {"presence": seen.get("presence", row["state"]), "activity": activity, "detail": detail}
        return now | {key: seen[key] for key in ("quarantined_until", "quarantine") if key in seen}
    if board is not None:  # it has not been heard of since that coordinator started
        return {"presence": "silent", "activity": "", "detail": ""}
    at = row["changed_at"][:16].replace("T", " ")
    return {"presence": "unknown", "activity": "", "detail": f"no coordinator runs; it came at {at} UTC"}


def _doing(row: Mapping[str, Any]) -> tuple[str, str]:
    """What an agent does, and what there is to say of it."""
    if row.get("quarantined_until"):
        return "quarantined", row["quarantine"].removeprefix("quarantined ")
    return row["activity"], row.get("detail", "")


def _show_agents(rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        _console.print("no agent was heard of yet")
        return
    table = Table("agent", "presence", "doing", "detail")
    for row in rows:
        # The detail is an agent's own text: without `escape`, brackets in it would be taken for markup.
        activity, detail = _doing(row)
        table.add_row(row["agent_id"], row["presence"], activity, escape(detail))
    _console.print(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _print_json(content: Any) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(content), indent=2).decode() + "\n")
