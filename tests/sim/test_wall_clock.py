"""A wall clock that is wrong, and set back and forth, changes no order, no deadline and no version (fault 13).

Machines and drivers are handed monotonic time, and what they send holds durations, never a time. The wall clock is read where a
person or a dashboard wants to know when something was; the first test lists those places, so that a new one is looked at.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import deque
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from coordinator import run_events as ev
from coordinator.models import ModelStore
from coordinator.resume import resume, unfinished
from coordinator.round import MemberState, RoundConfig, RoundState
from coordinator.store import Store, rows, store
from tests.machines import digest
from tests.sim.agent_process import Behaviour
from tests.sim.federation import Federation, told
from tests.sim.scenario import FAULTS_S, draw
from tests.sim.wall import DAY_S, Wall

ROOT = Path(__file__).parents[2]
READS_IT = {
    "midge/log.py": "when a line was written",
    "coordinator/metrics.py": "when the last version was committed, as Prometheus has it",
    "coordinator/observer.py": "since when and until when something is waited for, as a person reads it",
    "coordinator/store/rows.py": "when a row was written; rows are ordered by their numbers",
    "coordinator/upkeep/backup.py": "when a file of an archive was made",
    "coordinator/trackers.py": "when a figure was noted, as TensorBoard and MLflow have it",
    "coordinator/experiment/compare_runner.py": "when a comparison ended, as its report says",
    "coordinator/experiment/compare_summary.py": "the same",
    "edge_agent/service.py": "the operator's hours: an agent takes no part outside them, in local time",
}
"""Every file that reads the wall clock, and what for: none decides what comes first, or how long to wait."""
_READING = re.compile(
    r"\btime\.(time|time_ns|localtime|gmtime|ctime|strftime)\b|\bdatetime\.(now|today|utcnow|fromtimestamp)\b"
    r"|\bfrom time import .*\b(time|time_ns|localtime|gmtime)\b"
)


def test_the_wall_clock_is_read_by_these_files_alone():
    packages = [path for name in ("midge", "coordinator", "edge_agent") for path in (ROOT / name).rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in packages if _READING.search(path.read_text(encoding="utf-8"))}
    found = {name for name in found if "templates" not in name}
    assert found == set(READS_IT), "say what for in READS_IT, if no order and no deadline depends on it"


def history(seed: int, wall: Wall, days: list[int]) -> tuple[str, list[str]]:
    """What happens in the federation of this seed while the clock is set at each of its first seconds."""
    federation = draw(seed).federation
    federation.history = deque()
    for second, number in enumerate(days):
        federation.at(float(second), lambda number=number: wall.jump(number * DAY_S))
    with told(federation, f"seed {seed}"):
        federation.start()
        federation.run(lambda: False, FAULTS_S + 20.0)
    return federation.story(), [row["digest"] for row in federation.store.version_rows]


@pytest.mark.no_cover
@pytest.mark.fault(13)
def test_a_history_is_the_same_on_a_wall_clock_that_jumps(monkeypatch, recovery):
    wall = Wall()
    wall.install(monkeypatch)
    for seed in range(4):
        jumps = [random.Random(seed).choice((-1, 1)) for _ in range(40)]
        still = history(seed, wall, [0] * 40)
        assert history(seed, wall, jumps) == still
        recovery.tried(40)
    assert wall.ahead_s != 0.0
    assert wall.num_read == 0, "something in the simulation reads the wall clock"


@pytest.mark.fault(13)
@pytest.mark.parametrize("leap_s", [60.0, DAY_S])
@pytest.mark.parametrize("who", ["coordinator", "agent-0"])
def test_a_machine_that_wakes_up_from_a_long_sleep_goes_on(who, leap_s, recovery):
    """Monotonic clocks never go back, but every deadline of one machine may have passed at once, between any two events."""
    for at_s in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0):
        bounds = RoundConfig(minimum=2, quorum=2, report_deadline_s=30.0)
        federation = Federation(13, [Behaviour(training_s=(1.0, 1.0))] * 2, round_config=bounds, is_strict=True)
        sleeper = next(process for process in federation.processes if process.name == who)
        federation.at(at_s, lambda sleeper=sleeper: sleeper.leap(leap_s))
        with told(federation, f"{who} leaps by {leap_s} s at {at_s} s"):
            federation.start()
            federation.run(lambda: False, at_s)
            before, leapt_at = federation.num_committed, federation.now
            assert federation.run(lambda: federation.num_committed > before or federation.is_done, 200.0), "I6"  # noqa: B023
            recovery.took_virtual(federation.now - leapt_at)
            assert federation.run(lambda: federation.is_done, 400.0), "I6"  # noqa: B023
            federation.auditor.check()
        recovery.tried(1)


@pytest.mark.fault(13)
def test_a_run_is_found_again_though_every_row_is_older_than_the_one_before(tmp_path, monkeypatch):
    """Each row is written an hour earlier than the last: rows are ordered by their numbers, never by their times."""
    hours = itertools.count()

    def earlier() -> str:
        return (datetime(2030, 1, 1, tzinfo=UTC) - timedelta(hours=next(hours))).isoformat()

    monkeypatch.setattr(rows, "utc_now", earlier)
    monkeypatch.setattr(store, "utc_now", earlier)
    opened, models = Store(tmp_path), ModelStore(tmp_path / "models")
    assert [opened.raise_epoch() for _ in range(3)] == [1, 2, 3]
    run_ids = [
        opened.create_run(federation="lab", task="digits", fingerprint="f", definition={}, rounds=9) for _ in range(2)
    ]
    assert [row["run_id"] for row in unfinished(opened.runs(), "lab", but=None)] == run_ids[::-1]
    opened.set_framing(run_ids[1], 4, 3)
    made = None
    for round_num in range(3):
        parent, made = made, models.save_state({"w": np.full(10, round_num, np.float32)})
        opened.save(run_ids[1], [ev.SaveVersion(round_num, made, parent)])
    members = {"a": MemberState.INVITED}
    for attempt in (1, 2):
        opened.save(run_ids[1], [ev.SaveAttempt(3, attempt, RoundState.COLLECTING, digest("seed"), members)])
    found = resume(opened, models, run_ids[1])
    assert found is not None
    assert (found.version.round_num, found.version.digest, found.attempt) == (2, made, 2)
    opened.close()
