"""SIGTERM in the middle of whatever: the process says that it is offline, ends with 0, and goes on after a restart.

The promise is 10 s; a machine that tests share with others is given more.
"""

from __future__ import annotations

import json
import signal
from typing import Any

import psutil
import pytest

from edge_agent.journal import read_update
from midge.transport.base import MessageReceived
from tests.broker import tasks
from tests.broker.federation import Federation, Program, wait_until
from tests.broker.undisturbed import BATCHES, digests, findings, undisturbed

pytestmark = pytest.mark.usefixtures("unmeasured")

ENDED_S = 30.0
ROUNDS = 2
SETTINGS: dict[str, object] = {"rounds": ROUNDS, "min_agents": 2, **BATCHES}


class Lookout:
    """Hears who says that it is there, or that it is not."""

    def __init__(self, peer, url: str) -> None:
        self._peer = peer(url, "lookout")
        self._peer.transport.subscribe(["midge/1/test/coordinator", "midge/1/test/agent/+/presence"])
        self._peer.sync()

    def wait_for(self, topic: str, *, online: bool, timeout_s: float = ENDED_S) -> dict[str, Any]:
        """The next such word."""

        def is_it(event: MessageReceived) -> bool:
            return event.topic == f"midge/1/test/{topic}" and json.loads(event.payload)["online"] is online

        heard: dict[str, Any] = json.loads(self._peer.expect(MessageReceived, is_it, timeout_s).payload)
        return heard


def ends_well(program: Program) -> None:
    program.send_signal(signal.SIGTERM)
    assert program.wait(ENDED_S) == 0
    assert "Traceback" not in program.log()


def assert_undisturbed(federation: Federation, directory) -> None:
    models, expected = undisturbed(directory, 2, ROUNDS)
    assert digests(federation) == expected
    each_once = [tasks.fingerprint(model) for model in models[:ROUNDS]]
    assert federation.trainings("agent-0") == federation.trainings("agent-1") == each_once
    assert [federation.attempts(round_num)[0] for round_num in range(1, ROUNDS + 1)] == [1] * ROUNDS
    assert findings(federation) == []


@pytest.mark.fault(34)
@pytest.mark.long
def test_a_coordinator_asked_to_stop_in_any_phase_parks_the_round_and_goes_on(
    mosquitto, make_federation, peer, tmp_path, recovery
):
    federation = make_federation(mosquitto.url)
    lookout = Lookout(peer, mosquitto.url)

    # While the initial model is made: the process that makes it does not answer.
    coordinator = federation.start_coordinator(**SETTINGS)
    evaluator = wait_until(lambda: child_of(coordinator), "the evaluating process is there")
    evaluator.suspend()
    lookout.wait_for("coordinator", online=True)
    ends_well(coordinator)
    lookout.wait_for("coordinator", online=False)
    assert not evaluator.is_running()

    # While it waits for agents.
    coordinator = federation.start_coordinator(**SETTINGS)
    federation.wait_for_round(0)
    lookout.wait_for("coordinator", online=True)
    ends_well(coordinator)
    lookout.wait_for("coordinator", online=False)

    # While updates come in.
    federation.hold("agent-1", training=1)
    federation.start_agents(2, check_data="false")
    coordinator = federation.start_coordinator(**SETTINGS)
    federation.wait_for_update("agent-0", 1)
    ends_well(coordinator)
    assert "stopped by the operator; start it again to go on" in coordinator.log()
    lookout.wait_for("coordinator", online=False)
    federation.release("agent-1")

    # While it averages them, which takes for ever.
    coordinator = federation.start_coordinator(fail_point="coordinator.aggregation.block:1:hang", **SETTINGS)
    federation.wait_for_update("agent-1", 1)
    wait_until(lambda: "averaging" in federation.board()["status"], "it averages")
    ends_well(coordinator)
    assert "a computation did not end in time" in coordinator.log()
    lookout.wait_for("coordinator", online=False)

    with recovery.watch():
        coordinator = federation.start_coordinator(**SETTINGS)
        federation.wait_for_round(1)
    assert coordinator.wait() == 0
    recovery.tried(4)
    assert_undisturbed(federation, tmp_path / "undisturbed")


@pytest.mark.fault(34)
@pytest.mark.long
def test_an_agent_asked_to_stop_in_any_phase_says_so_and_goes_on(mosquitto, make_federation, peer, tmp_path, recovery):
    federation = make_federation(mosquitto.url)
    lookout = Lookout(peer, mosquitto.url)
    topic = "agent/agent-1/presence"

    # Idle.
    agent = federation.start_agent("agent-1", part=1, check_data="false")
    lookout.wait_for(topic, online=True)
    ends_well(agent)
    lookout.wait_for(topic, online=False, timeout_s=5.0)

    # While it waits for a receipt, which nobody gives: the coordinator is frozen.
    federation.hold("agent-1", training=1)
    federation.start_agent("agent-0", part=0, check_data="false")
    agent = federation.start_agent("agent-1", part=1, check_data="false")
    coordinator = federation.start_coordinator(**SETTINGS)
    federation.wait_for_training("agent-1", 1)
    federation.wait_for_update("agent-0", 1)
    coordinator.send_signal(signal.SIGSTOP)
    federation.release("agent-1")
    path = federation.journal("agent-1") / "update.bin"
    kept = wait_until(lambda: path.exists() and read_update(path), "its update is on disk")
    ends_well(agent)
    lookout.wait_for(topic, online=False)
    coordinator.send_signal(signal.SIGCONT)
    federation.hold("agent-1", training=2)
    with recovery.watch():
        agent = federation.start_agent("agent-1", part=1, check_data="false")
        federation.wait_for_round(1)
    assert federation.wait_for_update("agent-1", 1).update_digest == kept.update_digest

    # While it trains: that is cut short, and done anew.
    federation.wait_for_training("agent-1", 2)
    worker = agent.children()[0]
    ends_well(agent)
    lookout.wait_for(topic, online=False)
    assert not worker.is_running()
    federation.release("agent-1")
    with recovery.watch():
        federation.start_agent("agent-1", part=1, check_data="false")
        federation.wait_for_round(2)
    assert coordinator.wait() == 0
    recovery.tried(3)
    models, expected = undisturbed(tmp_path / "undisturbed", 2, ROUNDS)
    assert digests(federation) == expected
    first, second = (tasks.fingerprint(model) for model in models[:ROUNDS])
    assert federation.trainings("agent-0") == [first, second]
    assert federation.trainings("agent-1") == [first, second, second]
    assert [federation.attempts(round_num)[0] for round_num in (1, 2)] == [1, 1]


@pytest.mark.fault(34)
@pytest.mark.long
def test_without_a_broker_both_stop_all_the_same(make_federation, start_mosquitto):
    broker = start_mosquitto()
    federation = make_federation(broker.url)
    agent = federation.start_agent("agent-0", check_data="false")
    coordinator = federation.start_coordinator(**SETTINGS)
    for program in (agent, coordinator):
        program.wait_for_log("broker connected")
    broker.kill()
    for program in (agent, coordinator):
        program.wait_for_log("broker lost")
        ends_well(program)


def child_of(program: Program) -> psutil.Process | None:
    return next(iter(program.children()), None)
