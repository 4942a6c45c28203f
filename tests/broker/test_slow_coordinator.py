"""A coordinator that does not read, or whose network thread is dead: nothing is lost, and it is seen."""

from __future__ import annotations

import signal

import pytest

from tests.broker.federation import Program, wait_until
from tests.broker.test_disk_full import assert_as_undisturbed

pytestmark = pytest.mark.usefixtures("unmeasured")

WIDE = "tests.broker.tasks:wide"


@pytest.mark.long
@pytest.mark.fault(15)
@pytest.mark.parametrize("limit", ["queue", "keep-alive"])
def test_what_a_broker_dropped_while_the_coordinator_was_frozen_is_sent_again(
    limit, start_mosquitto, make_federation, recovery
):
    """Its queue holds 10 of 38 frames; or it gives the coordinator up, and drops all."""
    small = ["max_queued_messages 10", "max_inflight_messages 5"] if limit == "queue" else []
    broker = start_mosquitto(*small)
    federation = make_federation(broker.url, task=WIDE)
    agents = federation.start_agents(2)
    for agent_id in ("agent-0", "agent-1"):
        federation.hold(agent_id, training=2)
    coordinator = federation.start_coordinator(rounds=3, min_agents=2, keepalive_s=30 if limit == "queue" else 2)
    for agent_id in ("agent-0", "agent-1"):
        federation.wait_for_training(agent_id, 2)
    coordinator.send_signal(signal.SIGSTOP)
    try:
        for agent_id in ("agent-0", "agent-1"):
            federation.release(agent_id)
        for agent in agents:
            wait_until(lambda agent=agent: agent.log().count("trained") == 2, f"{agent.name} has trained")
        said = "being dropped for client coordinator" if limit == "queue" else "has exceeded timeout"
        wait_until(lambda: said in broker.log(), f"the broker says {said!r}")
        assert len(federation.versions()) == 2
    finally:
        coordinator.send_signal(signal.SIGCONT)
    with recovery.watch():
        federation.wait_for_round(2)
    assert coordinator.wait() == 0
    assert_as_undisturbed(federation, 3)


@pytest.mark.long
@pytest.mark.fault(25)
def test_a_dead_network_thread_turns_the_coordinators_health_red_and_a_restart_goes_on(
    mosquitto, make_federation, recovery, tmp_path
):
    federation = make_federation(mosquitto.url)
    federation.hold("agent-0", training=2)
    federation.start_agents(1)
    settings = ["--set", "http_port=0", "--set", "min_agents=1", "--set", "rounds=3"]
    common = ["--broker", mosquitto.url, "--federation", "test", "--task", "tests.broker.tasks:linear"]
    arguments = ["run", *common, "--state-dir", str(federation.state_dir()), *settings]
    command = [str(tmp_path / "die"), "coordinator", *arguments]
    deaf = Program("deaf", "tests.broker.deaf", command, tmp_path / "logs")
    federation.programs.append(deaf)
    federation.wait_for_training("agent-0", 2)
    assert federation.get("/healthz")[0] == 200
    (tmp_path / "die").touch()
    wait_until(lambda: federation.get("/healthz")[0] == 503, "its health is red")
    assert "the network thread is dead or stuck" in federation.get("/healthz")[1]
    with recovery.watch():  # as a supervisor does that looks at /healthz
        deaf.kill()
        federation.release("agent-0")
        coordinator = federation.start_coordinator(min_agents=1, rounds=3)
        federation.wait_for_round(2)
    assert coordinator.wait() == 0
    assert len(federation.trainings("agent-0")) == 3


@pytest.mark.long
@pytest.mark.fault(25)
def test_an_agent_whose_network_thread_died_ends_says_so_and_keeps_its_work(
    mosquitto, make_federation, recovery, tmp_path
):
    federation = make_federation(mosquitto.url)
    federation.hold("agent-0", training=1)
    arguments = ["--broker", mosquitto.url, "--federation", "test", "--task", "tests.broker.tasks:linear"]
    arguments += ["--agent-id", "agent-0", "--state-dir", str(federation.journal("x").parents[1])]
    arguments += ["--data-dir", str(federation.control("agent-0"))]
    command = [str(tmp_path / "die"), "edge_agent", "run", *arguments]
    deaf = Program("deaf", "tests.broker.deaf", command, tmp_path / "logs")
    federation.programs.append(deaf)
    coordinator = federation.start_coordinator(min_agents=1, rounds=2)
    federation.wait_for_training("agent-0", 1)
    (tmp_path / "die").touch()
    federation.release("agent-0")
    assert deaf.wait() == 1
    assert "agent agent-0: the network thread died: start it again" in deaf.log()
    with recovery.watch():
        federation.start_agent("agent-0")
        federation.wait_for_round(1)
    assert coordinator.wait() == 0
