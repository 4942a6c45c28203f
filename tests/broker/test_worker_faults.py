"""Whatever goes wrong in one agent's training costs that agent one round, has its reason told, and costs nobody else anything.

All of it goes wrong at once, in the first round of one federation: each agent has a trouble of its own, one has none. Then the
troubles end, and everybody takes part in the second round, by the same connection as before. The tests ask what was seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pytest

from midge.transport.brokers import start_local_broker
from tests.broker.federation import Federation, Program, call, wait_until

REFUSALS = {
    "raise": ("worker", "ValueError: the sensor [/red] is broken"),
    "memory": ("memory", "out of memory while training"),
    "killed": ("worker", "the process was killed (SIGKILL): most likely out of memory"),
    "no-data": ("data", "no examples in "),
    "wider": ("layout", "state has weight (1, 5) float32: expected weight"),
    "asleep": ("hours", "this agent trains only in the hours "),
}
REJECTIONS = {
    "nan": ("not_finite", "NaN or infinite elements: training diverged; lower learning_rate"),
    "far": ("norm", "at most 100 is allowed (norm_bound)"),
    "boast": ("num_examples", "1000000 examples, expected 1 to 1000"),
}
HEALTHY = ("healthy", "slow", "last")
OPTIONS: dict[str, dict[str, object]] = {
    "memory": {"max_memory_mb": 1024},
    "slow": {"keepalive_s": 2},
    "healthy": {"worker_idle_s": 0.5},
}


@dataclass
class Seen:
    """What was seen of the troubled federation."""

    federation: Federation
    agents: dict[str, Program]
    coordinator: Program
    views: dict[str, dict[str, Any]] = field(default_factory=dict)
    status: str = ""
    metrics: str = ""
    idle_worker_ended: bool = False
    broker_log: str = ""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    directory = tmp_path_factory.mktemp("troubled")
    with start_local_broker("mosquitto", directory=directory / "broker") as broker:
        federation = Federation(directory, broker.url)
        try:
            yield troubled(federation, broker)
        finally:
            federation.end()


def troubled(federation: Federation, broker) -> Seen:
    """Two rounds: the first in trouble, the second without."""
    agents = start_agents(federation)
    coordinator = federation.start_coordinator(
        rounds=2, min_agents=len(agents), quorum=1, learning_rate=0.01, norm_bound=100, max_examples=1000
    )
    seen = Seen(federation, agents, coordinator)
    federation.wait_for_training("killed", 1)
    agents["killed"].children()[0].kill()
    federation.wait_for_update("healthy", 1)
    wait_until(lambda: not agents["healthy"].children(), "the idle worker of the healthy agent is ended")
    seen.idle_worker_ended = agents["healthy"].is_running
    wait_until(lambda: all_told(federation), "every trouble is told")
    seen.views = federation.agent_views()
    seen.status = call("coordinator", "status", "--state-dir", str(federation.state_dir()), COLUMNS="200").stdout
    seen.metrics = federation.get("/metrics")[1]
    federation.wait_for_update("slow", 1)
    for agent_id in agents:
        (federation.control(agent_id) / "fault").unlink(missing_ok=True)
    federation.release("last")
    assert coordinator.wait() == 0
    seen.broker_log = broker.log()
    return seen


def start_agents(federation: Federation) -> dict[str, Program]:
    for agent_id in ("killed", "last"):  # one until its worker is killed, the other until everything was seen
        federation.hold(agent_id, training=1)
    hour = (datetime.now().hour + 2) % 24  # noqa: DTZ005  the rule is in local time
    agents = {}
    for agent_id in (*REFUSALS, *REJECTIONS, *HEALTHY):
        if agent_id not in {"killed", "asleep", "healthy", "last"}:
            (federation.control(agent_id) / "fault").write_text(agent_id)
        options = {"hours": f"{hour}-{hour + 1}"} if agent_id == "asleep" else OPTIONS.get(agent_id, {})
        agents[agent_id] = federation.start_agent(agent_id, **options)
    return agents


def all_told(federation: Federation) -> bool:
    views = federation.agent_views()
    told = [views[agent_id]["activity"] for agent_id in (*REFUSALS, *REJECTIONS) if agent_id in views]
    return len(told) == len(REFUSALS) + len(REJECTIONS) and set(told) <= {"refused", "rejected"}


@pytest.mark.parametrize("agent_id", REFUSALS)
def test_a_training_that_fails_is_a_refusal_whose_reason_the_coordinator_shows(seen, agent_id):
    reason, words = REFUSALS[agent_id]
    assert seen.views[agent_id]["activity"] == "refused"
    assert seen.views[agent_id]["presence"] == "online"
    assert words in seen.views[agent_id]["detail"]
    lines = [line for line in seen.coordinator.log().splitlines() if f"agent={agent_id} " in line]
    assert any("agent refused" in line and f"reason={reason} " in line and words in line for line in lines)
    assert words in seen.status.replace("\n", "")
    assert f"round refused  run={seen.federation.run_id()} round=1 agent={agent_id}" in seen.agents[agent_id].log()


@pytest.mark.parametrize("agent_id", REJECTIONS)
def test_an_update_that_fails_a_gate_is_rejected_and_its_agent_is_told(seen, agent_id):
    reason, words = REJECTIONS[agent_id]
    assert seen.views[agent_id]["activity"] == "rejected"
    assert words in seen.views[agent_id]["detail"]
    (told,) = [line for line in seen.agents[agent_id].log().splitlines() if "update rejected" in line]
    assert f"round=1 agent={agent_id} reason={reason} " in told
    assert words in told
    assert seen.federation.tallies()["rejected", reason] == 1


def test_every_reason_is_counted(seen):
    reasons = [reason for reason, _ in REFUSALS.values()]
    run = f'run="{seen.federation.run_id()}"'
    for reason in set(reasons):
        (line,) = [
            line
            for line in seen.metrics.splitlines()
            if line.startswith("midge_refusals_total{") and run in line and f'reason="{reason}"' in line
        ]
        assert float(line.split()[-1]) == reasons.count(reason)


def test_no_trouble_costs_anyone_else_the_round_and_each_troubled_agent_takes_the_next(seen):
    assert sorted(seen.federation.updates(1)) == sorted(HEALTHY)
    assert sorted(seen.federation.updates(2)) == sorted(set(seen.agents) - {"asleep"})
    for agent_id, agent in seen.agents.items():
        assert agent.is_running, agent_id
        assert agent.log().count("broker connected") == 1, agent_id
        assert "broker lost" not in agent.log(), agent_id
    assert seen.federation.trainings("asleep") == []


@pytest.mark.fault(26)
def test_training_longer_than_the_keep_alive_does_not_cost_the_connection(seen):
    assert seen.federation.updates(1)["slow"].training_s > 1.5 * 2  # what Mosquitto allows for a keep-alive of 2 s
    assert "timeout" not in seen.broker_log


def test_a_worker_without_work_ends_and_the_next_round_starts_another(seen):
    assert seen.idle_worker_ended
    assert len(seen.federation.trainings("healthy")) == 2
