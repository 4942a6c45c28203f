"""What the coordinator's commands say of a state directory, with a coordinator at work in it and without."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from coordinator import commands
from coordinator import run_events as ev
from coordinator.board import Board, Shared
from coordinator.exports import ExportError, choose_version, find_run
from coordinator.store import AgentRow, Store


@pytest.fixture
def state_dir(tmp_path) -> Path:
    """That a coordinator left behind which two agents had come to, of which one had left."""
    store = Store(tmp_path / "state")
    rows = [AgentRow("one", "online", "digits", {}, "0.1"), AgentRow("two", "offline", "digits", {}, "0.1")]
    store.save("", [], rows)
    store.close()
    return tmp_path / "state"


def listed(state_dir: Path, capsys) -> dict[str, dict[str, Any]]:
    assert commands.agents(state_dir, as_json=True) == 0
    return {row["agent_id"]: row for row in json.loads(capsys.readouterr().out)}


def test_without_a_coordinator_nobody_knows_whether_an_agent_is_online(state_dir, capsys):
    rows = listed(state_dir, capsys)
    assert {agent_id: row["presence"] for agent_id, row in rows.items()} == {"one": "unknown", "two": "offline"}
    assert rows["one"]["detail"].startswith("no coordinator runs; it came at 20")


def test_a_coordinator_that_has_not_heard_of_an_agent_does_not_call_it_online(state_dir, capsys, monkeypatch):
    board: dict[str, Any] = {"agents": []}
    monkeypatch.setattr(commands, "_ask_running", lambda _: board)
    assert listed(state_dir, capsys)["one"]["presence"] == "silent"
    board["agents"] = [{"agent_id": "one", "presence": "online", "activity": "idle", "detail": "low battery"}]
    row = listed(state_dir, capsys)["one"]
    assert (row["presence"], row["activity"], row["detail"]) == ("online", "idle", "low battery")


# A run that never came to a model.


@pytest.fixture
def two_runs(tmp_path) -> Store:
    """Of a run with a model, and a later one that failed before it had one."""
    store = Store(tmp_path / "state")
    for task in ("digits", "digist"):
        run_id = store.create_run(federation="lab", task=task, fingerprint=task, definition={}, rounds=3)
        if task == "digits":
            store.save(run_id, [ev.SaveVersion(0, "ab" * 32, None), ev.SaveRun("done", "", 3, None, None)])
        else:
            store.save(run_id, [ev.SaveRun("failed", "task 'digist': not known", 0, None, None)])
    return store


def test_the_latest_run_whose_model_is_wanted_is_one_that_has_a_model(two_runs, capsys):
    state_dir = two_runs.path.parent
    assert find_run(two_runs, "latest")["task"] == "digist"
    assert find_run(two_runs, "latest", with_model=True)["task"] == "digits"
    assert commands.models(state_dir, None, as_json=False) == 0
    assert capsys.readouterr().out.startswith("run digits-")


def test_a_run_without_a_model_says_so_and_why(two_runs):
    run_id = find_run(two_runs, "latest")["run_id"]
    with pytest.raises(ExportError, match=f"run {run_id} has no model; it is failed: task 'digist': not known"):
        choose_version(two_runs, run_id, "best")


def test_the_status_of_a_failed_run_has_its_reason(two_runs, capsys):
    state_dir = two_runs.path.parent
    assert commands.status(state_dir, as_json=False) == 0
    assert "is failed: round 0 of 3: task 'digist': not known\n" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["digist", "./digist.py", "midge.tasks.digist:X", "midge.tasks.digits:DigitTask"])
def test_a_task_that_cannot_be_is_refused_before_a_run_is_recorded(tmp_path, capsys, task):
    options = {"task": task, "state_dir": str(tmp_path / "state"), "broker": "mqtt://localhost:1"}
    assert commands.run(None, (), options, as_json=False) == 2
    assert "coordinator: task " in capsys.readouterr().err
    assert not (tmp_path / "state").exists()


# What a person sees.


def test_a_coordinator_without_a_run_and_without_agents_says_both(tmp_path, capsys, monkeypatch):
    board = Shared(Board(federation="lab", broker="mqtt://broker:1883", is_connected=True))
    monkeypatch.setattr(commands, "_ask_running", lambda _: board.snapshot())
    assert commands.status(tmp_path, as_json=False) == 0
    assert capsys.readouterr().out.splitlines() == [
        "the coordinator is up and has no run; `coordinator serve --run FILE` begins one",
        "no agent was heard of yet",
    ]


def test_when_a_run_began_can_be_told_in_a_terminal_of_80_columns(two_runs, capsys, monkeypatch):
    two_runs.save(find_run(two_runs, "latest")["run_id"], [ev.SaveRun("done", "", 30, 23, 0.9444)])
    monkeypatch.setattr(commands, "_console", Console(width=80))
    assert commands.runs(two_runs.path.parent, as_json=False) == 0
    said = capsys.readouterr().out
    assert len(re.findall(r" 20\d\d-\d\d-\d\d \d\d:\d\d ", said)) == 2
    assert "0.9444 (23)" in said


def test_a_directory_that_no_agent_came_to_says_so(two_runs, capsys):
    assert commands.agents(two_runs.path.parent, as_json=False) == 0
    assert capsys.readouterr().out == "no agent was heard of yet\n"
