"""What the coordinator's commands say of a state directory, with a coordinator at work in it and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator import commands
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
