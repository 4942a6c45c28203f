"""Two hundred agents come back at once, and the coordinator takes it calmly."""

from __future__ import annotations

import json
import sys
from collections import Counter
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from tests.broker.federation import Program, wait_until

pytestmark = pytest.mark.usefixtures("unmeasured")

NUM_AGENTS = 200
_MIB = 1 << 20


def connections(logs: list[Path]) -> list[list[float]]:
    """When each agent connected, in seconds."""
    return [
        [
            datetime.fromisoformat(line["ts"]).timestamp()
            for line in map(json.loads, log.read_text().splitlines())
            if line["event"] == "broker connected"
        ]
        for log in logs
    ]


def num_online(federation) -> int:
    lines = federation.get("/metrics")[1].splitlines()
    (line,) = [line for line in lines if line.startswith("midge_agents{") and 'state="online"' in line]
    return int(float(line.split()[-1]))


@pytest.mark.long
@pytest.mark.fault(28)
def test_two_hundred_agents_that_lost_their_broker_are_all_back_and_the_round_commits(
    mosquitto, make_federation, recovery, tmp_path
):
    federation = make_federation(mosquitto.url)
    coordinator = federation.start_coordinator(
        rounds=2, min_agents=10, start_agents=NUM_AGENTS, cohort=10, over_select=1, round_deadline_s=120
    )
    federation.http_url()
    arguments = ["--broker", mosquitto.url, "--federation", "test", "--task", "tests.broker.tasks:linear"]
    arguments += ["--set", "check_data=false"]
    # One fewer than the first round waits for, so that the broker's end finds everybody at rest.
    directory = tmp_path / "herd"
    herd = Program("herd", "tests.broker.herd", [str(NUM_AGENTS - 1), str(directory), *arguments], tmp_path / "logs")
    federation.programs.append(herd)
    wait_until(lambda: num_online(federation) == NUM_AGENTS - 1, "all agents but one are there")
    process = psutil.Process(coordinator.pid)
    rss_before, cpu_before = process.memory_info().rss, sum(process.cpu_times()[:2])

    mosquitto.kill()
    logs = sorted(directory.glob("*.log"))
    assert len(logs) == NUM_AGENTS - 1
    wait_until(lambda: all("broker lost" in log.read_text() for log in logs), "all have lost their broker")
    mosquitto.start()
    with recovery.watch():
        wait_until(lambda: num_online(federation) == NUM_AGENTS - 1, "all are there again")
        federation.start_agent("last")
        federation.wait_for_round(1)
    grown_bytes = process.memory_info().rss - rss_before if coordinator.is_running else 0
    cpu_s = sum(process.cpu_times()[:2]) - cpu_before if coordinator.is_running else 0.0
    assert coordinator.wait() == 0
    assert grown_bytes < 64 * _MIB
    times = connections(logs)
    assert {len(each) for each in times} == {2}, "each connected once more, and stayed"
    back = sorted(each[1] for each in times)
    spread_s = back[-1] - back[0]
    most = max(Counter(int(moment * 10) for moment in back).values())
    told = f"{len(back)} agents came back within {spread_s:.2f} s, at most {most} in a tenth of a second; "
    told += f"the coordinator took {cpu_s:.2f} s of CPU and {grown_bytes / _MIB:.1f} MiB more\n"
    sys.stdout.write(told)
    assert most < NUM_AGENTS / 2, f"they came back as one: {told}"
