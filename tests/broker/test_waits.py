"""What a wait looks like from outside, and what outlives one: over a real Mosquitto."""

from __future__ import annotations

import signal

import pytest

from tests.broker.federation import call, wait_until
from tests.broker.undisturbed import BATCHES

pytestmark = pytest.mark.usefixtures("unmeasured")

KEEPALIVE_S = 2


@pytest.mark.fault(26)
@pytest.mark.long
def test_a_worker_that_burns_longer_than_the_keep_alive_costs_no_connection(mosquitto, make_federation, recovery):
    federation = make_federation(mosquitto.url)
    (federation.control("agent-0") / "fault").write_text("burn")
    agent = federation.start_agent("agent-0", keepalive_s=KEEPALIVE_S, check_data="false")
    coordinator = federation.start_coordinator(rounds=2, min_agents=1, **BATCHES)
    with recovery.watch():
        federation.wait_for_round(1)
    assert coordinator.wait() == 0
    assert federation.updates(2)["agent-0"].training_s > 1.5 * KEEPALIVE_S  # what Mosquitto allows
    assert agent.log().count("broker connected") == 1
    assert "broker lost" not in agent.log()
    assert "timeout" not in mosquitto.log()


@pytest.mark.fault(27)
@pytest.mark.long
def test_a_quorum_that_is_never_reached_is_in_the_log_the_status_and_the_metrics(mosquitto, make_federation, recovery):
    federation = make_federation(mosquitto.url)
    federation.hold("agent-1", training=1)
    agents = federation.start_agents(2, check_data="false")
    bounds = {"round_deadline_s": 15.0, "max_attempts": 2, "selection_deadline_s": 5.0}
    coordinator = federation.start_coordinator(rounds=2, min_agents=2, **bounds, **BATCHES)
    federation.wait_for_update("agent-0", 1)
    wait_until(lambda: federation.board()["waiting_for"] == "updates", "it waits for updates")
    said = call("coordinator", "status", "--state-dir", str(federation.state_dir()), COLUMNS="200").stdout
    assert "waits for updates since " in said
    assert " at most, 1 missing" in said
    assert 'midge_wait_since_timestamp_seconds{federation="test",reason="updates"' in federation.get("/metrics")[1]
    coordinator.wait_for_log("still waiting")
    agents[1].stop()
    coordinator.wait_for_log("round abandoned")
    wait_until(lambda: "attempt 1 abandoned" in str(federation.board()["events"]), "the board says so")
    run = federation.run_id()
    line = f'midge_rounds_total{{federation="test",outcome="abandoned",run="{run}"}} 1.0'
    assert line in federation.get("/metrics")[1]
    assert coordinator.wait() == 1
    assert "1 update, quorum is 2, after 15 s: agent-1 lost (offline)" in coordinator.log()
    assert "round 1 was abandoned 2 times, the last time: 1 of 2 agents were there after 5 s" in coordinator.log()
    assert federation.runs()[0]["state"] == "failed"
    recovery.tried(1)


@pytest.mark.fault(27)
@pytest.mark.long
def test_an_agent_that_waits_for_its_receipt_says_so_and_neither_side_spins(mosquitto, make_federation, recovery):
    federation = make_federation(mosquitto.url)
    federation.hold("agent-0", training=1)
    agent = federation.start_agent("agent-0", check_data="false")
    coordinator = federation.start_coordinator(rounds=1, min_agents=1, **BATCHES)
    federation.wait_for_training("agent-0", 1)
    coordinator.send_signal(signal.SIGSTOP)
    federation.release("agent-0")
    agent.wait_for_log("still waiting")
    assert "waits_for=receipt" in agent.log() or "waits_for=credit" in agent.log()
    coordinator.send_signal(signal.SIGCONT)
    with recovery.watch():
        federation.wait_for_round(1)
    assert coordinator.wait() == 0
