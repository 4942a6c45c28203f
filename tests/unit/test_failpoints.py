"""Fail points: what sets one, what it does, and that every one that is named is somewhere in the code, and on the page."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from midge import failpoints
from midge.failpoints import FailPointError, fail_point

ROOT = Path(__file__).parents[2]
PREFIX = re.compile(r"coordinator\.(sent|saving|saved)\.")


@pytest.fixture(autouse=True)
def disarmed(monkeypatch):
    monkeypatch.setattr(failpoints, "_armed", None)


@pytest.fixture
def arm(monkeypatch):
    """Set a point in this process; it notes that it was set off."""
    done: list[str] = []

    def act(text: str, process: str = "coordinator") -> list[str]:
        monkeypatch.setattr(failpoints, "_ACTIONS", {key: lambda key=key: done.append(key) for key in ("kill", "stop")})
        monkeypatch.setenv("MIDGE_FAIL_POINT", text)
        failpoints.arm(process)
        return done

    return act


def test_without_the_variable_nothing_happens(monkeypatch):
    monkeypatch.delenv("MIDGE_FAIL_POINT", raising=False)
    failpoints.arm("coordinator")
    assert not failpoints.is_armed()
    for name in failpoints.POINTS:
        fail_point(name)


def test_a_point_acts_at_its_nth_passing_and_only_then(arm, caplog):
    done = arm("coordinator.frame.stored:2")
    assert "fail point set" in caplog.text
    fail_point("coordinator.frame.stored")
    fail_point("coordinator.spool.synced")
    assert done == []
    fail_point("coordinator.frame.stored")
    assert done == ["kill"]
    fail_point("coordinator.frame.stored")
    assert done == ["kill"]


def test_the_action_can_be_named(arm):
    done = arm("agent.frame.sent:1:stop", "agent")
    fail_point("agent.frame.sent")
    assert done == ["stop"]


def test_a_point_of_another_process_is_left_to_that(arm):
    arm("worker.update.written", "agent")
    assert not failpoints.is_armed()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("coordinator.nowhere", "there is no point coordinator.nowhere"),
        ("coordinator.frame.stored:0", "expected NAME"),
        ("coordinator.frame.stored:x", "expected NAME"),
        ("coordinator.frame.stored:1:explode", "expected NAME"),
    ],
)
def test_what_is_not_understood_is_refused(arm, text, why):
    with pytest.raises(FailPointError, match=re.escape(f"MIDGE_FAIL_POINT={text}: {why}")):
        arm(text)


def test_the_process_is_killed():
    script = (
        "from midge.failpoints import arm, fail_point; arm('agent'); fail_point('agent.frame.sent'); print('alive')"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "MIDGE_FAIL_POINT": "agent.frame.sent"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environ, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")


def passed_in_the_code() -> set[str]:
    found = set()
    for package in ("midge", "coordinator", "edge_agent"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("fail_point"):
                    found |= {word.value for word in node.args if isinstance(word, ast.Constant)}
    return found


def test_the_points_are_those_in_the_code():
    assert passed_in_the_code() == {name for name in failpoints.POINTS if not PREFIX.match(name)}


def test_the_page_lists_every_point():
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `((?:coordinator|agent|worker)\.[\w.-]+)` \| (.+) \|$", page, re.MULTILINE)
    assert rows == list(failpoints.POINTS.items())
