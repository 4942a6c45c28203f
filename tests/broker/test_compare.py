"""`coordinator compare` as a person runs it: what it writes, that it goes on where it was killed, what it refuses."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest

from coordinator.store import Store
from tests.environment import unmeasured

PATIENCE_S = 240.0
PNG = b"\x89PNG\r\n\x1a\n"
LINEAR = ("--task", "tests.broker.tasks:TestedLinearTask", "--set", "learning_rate=0.05")
"""A task without torch: what takes time is what is asked about."""
CONFIG = """
task = "digits"
rounds = 3
local_epochs = 2

[compare]
arms = ["federated", "fedsgd", "centralized", "alone:agent-2", "local-average"]
seeds = 1
classes = [[1, 2, 3, 4], [5, 6, 7, 8, 9, 0]]
def_prob = 0.1
fedsgd_rounds = 5
"""


def compare(out: Path, *options: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "coordinator", "compare", "--out", str(out), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment if environment is not None else unmeasured(),
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit status, what it printed, and what it complained of."""
    printed, complaint = process.communicate(timeout=PATIENCE_S)
    return process.returncode, printed, complaint


def wait_until(condition, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, f"it ended with {process.returncode}: {process.communicate()[1]}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_arm_makes_the_steps_that_the_budget_gives_it_and_everything_is_written(tmp_path):
    config, out = tmp_path / "experiment.toml", tmp_path / "out"
    config.write_text(CONFIG)
    status, printed, complaint = ended(compare(out, str(config), "--json"))
    assert (status, complaint) == (0, "")
    found = json.loads(printed)
    assert found == json.loads((out / "compare.json").read_text())

    arms = {arm["arm"]: arm for arm in found["arms"]}
    assert list(arms) == ["federated", "fedsgd", "centralized", "alone:agent-2", "local-average"]
    steps = {agent["agent_id"]: agent["steps_a_round"] for agent in found["agents"]}
    sizes = {agent["agent_id"]: agent["held"]["num_examples"] for agent in found["agents"]}
    assert steps == {name: 2 * -(-size // 10) for name, size in sizes.items()}  # two passes in batches of 10
    total = 3 * sum(steps.values())
    assert found["budget"] == arms["federated"]["num_steps"] == arms["centralized"]["num_steps"] == total
    assert arms["local-average"]["num_steps"] == total
    assert arms["alone:agent-2"]["num_steps"] == 3 * steps["agent-2"]
    assert (arms["fedsgd"]["rounds"], arms["fedsgd"]["num_steps"]) == (5, 10)  # bounded: one step an agent and round
    assert arms["fedsgd"]["budget"] == total
    for arm in arms.values():
        assert len(arm["accuracy"]["values"]) == 1
        assert [one["round"] for one in arm["by_round"]] == list(range(arm["rounds"] + 1))
    # All start from the same model: what they score before any training is the same.
    assert len({arm["by_round"][0]["accuracy"]["mean"] for arm in arms.values()}) == 1

    # Agent 2 has all of 5 to 9 and 0, and a tenth of the others; together they know all.
    alone, together = arms["alone:agent-2"], arms["federated"]
    assert alone["by_label"]["7"]["mean"] > alone["by_label"]["2"]["mean"]
    assert arms["centralized"]["accuracy"]["mean"] > alone["accuracy"]["mean"]
    assert set(together["by_agent"]) == {"agent-1", "agent-2"}
    assert set(alone["by_agent"]) == {"agent-2"}
    own = [agent["alone"]["mean"] for agent in found["agents"]]
    assert arms["local-average"]["accuracy"]["mean"] == pytest.approx(sum(own) / 2)

    rounds = rows_of(out / "rounds.csv")
    assert len(rounds) == (3 + 1) * 4 + (5 + 1)  # federated, centralized, two agents alone; fedsgd
    assert rounds[3]["num_steps"] == str(total)
    assert {row["label"] for row in rows_of(out / "classes.csv")} == set("0123456789")
    assert len(rows_of(out / "arms.csv")) == 5
    assert rows_of(out / "agents.csv")
    assert (out / "curves.png").read_bytes().startswith(PNG)
    assert (out / "classes.png").read_bytes().startswith(PNG)
    page = (out / "compare.html").read_text()
    outside = [url for url in re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')>\s]+)", page) if url]
    assert outside == []
    assert "<script" not in page
    for word in ("FedSGD", "agent-2 alone", "torch", "fedsgd_rounds", f"{total:,}"):
        assert word in page


@pytest.mark.long
@pytest.mark.fault(3, 4)
def test_killed_it_leaves_no_process_behind_and_goes_on_in_the_round_where_it_was(tmp_path):
    out = tmp_path / "out"
    options = (*LINEAR, "--agents", "2", "--rounds", "40", "--seeds", "1", "--arms", "federated,alone")
    first = compare(out, *options)
    attendance = out / "work" / "federated-seed-0" / "state" / "attendance.jsonl"
    wait_until(lambda: len(lines_of(attendance)) >= 3, first)
    below = psutil.Process(first.pid).children(recursive=True)
    assert len(below) >= 6  # a broker and its watcher, two agents and their workers
    first.kill()
    first.communicate()
    deadline = time.monotonic() + PATIENCE_S
    while alive := [one for one in below if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, f"left behind: {alive}"
        time.sleep(0.02)
    noted = lines_of(attendance)
    assert 3 <= len(noted) < 40

    status, _, complaint = ended(compare(out, *options))
    assert status == 0, complaint
    assert lines_of(attendance)[: len(noted)] == noted
    assert len(lines_of(attendance)) == 40
    store = Store(attendance.parent, read_only=True)
    try:
        assert [run["state"] for run in store.runs()] == ["done"]  # one run, which went on
    finally:
        store.close()
    result = json.loads((out / "results" / "federated-seed-0.json").read_text())
    assert [one["num_updates"] for one in result["rounds"]] == [0] + [2] * 40

    # Another configuration is refused with what differs; another arm is added to what is there.
    status, _, complaint = ended(compare(out, *options, "--rounds", "41"))
    assert status == 2
    assert "another comparison was begun here, which differs in\n  rounds: 40 there, 41 here" in complaint
    before = (out / "results" / "federated-seed-0.json").stat().st_mtime_ns
    status, _, complaint = ended(compare(out, *options[:-1], "federated,centralized"))
    assert status == 0, complaint
    assert "federated, seed 0: " in complaint
    assert "done before" in complaint
    assert (out / "results" / "federated-seed-0.json").stat().st_mtime_ns == before
    assert (out / "results" / "centralized-seed-0.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_says_how_to_go_on(tmp_path, number):
    out = tmp_path / "out"
    process = compare(out, *LINEAR, "--agents", "2", "--rounds", "1000")
    wait_until((out / "work" / "federated-seed-0" / "logs" / "agent-2.log").exists, process)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    status, printed, complaint = ended(process)
    assert status == 128 + number
    assert printed == ""
    assert "nothing is left running" in complaint
    assert "Start it again in the same way, and it goes on where it was" in complaint
    assert "Traceback" not in complaint
    assert [one for one in below if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []


def test_a_task_with_neither_accuracy_nor_steps_is_compared_by_its_loss(tmp_path):
    out = tmp_path / "out"
    options = (*LINEAR, "--agents", "2", "--rounds", "4", "--seeds", "2")
    status, printed, complaint = ended(compare(out, *options, "--json", environment=dict(os.environ)))
    assert (status, complaint) == (0, "")
    found = json.loads(printed)
    assert found["metric"] == "loss"
    assert [arm["accuracy"] for arm in found["arms"]] == [None] * 4
    assert {len(arm["loss"]["values"]) for arm in found["arms"]} == {2}, "one of each seed"
    steps = {arm["arm"]: arm["num_steps"] for arm in found["arms"]}
    assert steps == {
        "federated": 8,
        "centralized": 8,
        "alone:agent-1": 4,
        "local-average": 8,
    }  # 4 and 7 examples, B = 10
    assert not (out / "classes.png").exists()
    page = (out / "compare.html").read_text()
    assert "By label" not in page
    assert "accuracy" not in page.lower()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--arms", "federated,local"), "arm 'local': expected any of federated, centralized"),
        (("--arms", "alone:agent-9"), "arm 'alone:agent-9': no such agent; there are agent-1, agent-2, agent-3"),
        (
            ("--partition", "shards:0"),
            "partition 'shards:0': expected iid, contiguous, shards:2, dirichlet:0.3 or quantity:0.5",
        ),
        (("--classes", "1,2", "--classes", "12"), "no example is labelled 12; the labels are 0 to 9"),
        (("--set", "cohort=4"), "cohort is 4: expected at most 3, as many as agents"),
        (("--set", "rounds=0", "--seeds", "0"), "--set rounds: rounds is '0': expected a whole number"),
        (("--task", "tests.broker.tasks:LinearTask"), "it has no test data, without which nothing can be compared"),
        (("--task", "nothing.here:Task"), "no module 'nothing' is found"),
    ],
)
def test_wrong_use_is_told_without_a_traceback_before_anything_trains(tmp_path, options, complaint):
    status, _, said = ended(compare(tmp_path / "out", *options))
    assert status == 2
    assert complaint in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("out/results/*"))


def test_two_comparisons_cannot_share_a_directory(tmp_path):
    out = tmp_path / "out"
    first = compare(out, *LINEAR, "--rounds", "1000")
    wait_until((out / "plan.json").exists, first)
    status, _, complaint = ended(compare(out, *LINEAR, "--rounds", "1000"))
    assert status == 2
    assert "another comparison is running in it" in complaint
    first.send_signal(signal.SIGINT)
    assert ended(first)[0] == 130


def test_a_torn_result_is_named_and_not_taken(tmp_path):
    out = tmp_path / "out"
    options = (*LINEAR, "--arms", "alone", "--seeds", "1", "--rounds", "1")
    assert ended(compare(out, *options))[0] == 0
    result = out / "results" / "alone-agent-1-seed-0.json"
    whole = msgspec.json.decode(result.read_bytes())
    result.write_bytes(result.read_bytes()[:-100])
    status, _, complaint = ended(compare(out, *options))
    assert status == 2
    assert "alone-agent-1-seed-0.json" in complaint
    result.unlink()
    assert ended(compare(out, *options))[0] == 0
    again = msgspec.json.decode(result.read_bytes())
    assert again["tested"] == whole["tested"]
