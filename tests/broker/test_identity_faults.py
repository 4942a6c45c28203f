"""Two of one kind at once, other versions, and what strangers leave at the broker: who leads is clear, and rounds go on."""

from __future__ import annotations

import pytest

from midge import PROTOCOL
from midge.wire.messages import CoordinatorStatus, Invitation, TrainingConfig, encode
from tests.broker.federation import Program, wait_until
from tests.broker.proxy import Proxy
from tests.broker.test_network_faults import KEEPALIVE_S, finish
from tests.broker.test_restart import BATCHES, digests, into_the_middle_of, undisturbed

pytestmark = pytest.mark.usefixtures("unmeasured")

PREFIX = "midge/1/test"


# One id, two agents.


@pytest.mark.long
@pytest.mark.fault(17)
def test_two_agents_with_one_id_wait_longer_and_longer_are_named_and_the_run_is_done(
    mosquitto, make_federation, recovery, tmp_path
):
    federation = make_federation(mosquitto.url)
    federation.hold("agent-0", training=2)
    federation.start_agent("agent-0", part=0)
    one = federation.start_agent("agent-1", part=1)
    coordinator = federation.start_coordinator(rounds=3, min_agents=2, **BATCHES)
    federation.wait_for_training("agent-0", 2)
    other = federation.start_agent("agent-1", "--state-dir", str(tmp_path / "other"), part=1)
    for twin in (one, other):
        twin.wait_for_log("is our client id, an agent's id, in use by another connection to this broker?")
    coordinator.wait_for_log("two processes use one agent id")
    assert federation.agent_views()["agent-1"]["detail"].startswith("two processes use this agent id in turn")
    assert 'midge_agent_id_conflicts_total{federation="test"} 0' not in federation.get("/metrics")[1]
    with recovery.watch():
        federation.release("agent-0")
        federation.wait_for_round(2)
    assert coordinator.wait() == 0
    assert digests(federation) == undisturbed(tmp_path / "undisturbed", 2, 3)[1]
    assert all("Traceback" not in program.log() for program in federation.programs)


# Two coordinators.


@pytest.mark.long
@pytest.mark.fault(29)
def test_a_coordinator_that_was_cut_off_steps_down_for_the_one_that_took_its_place(
    mosquitto, make_federation, recovery
):
    federation = make_federation(mosquitto.url)
    federation.start_agents(1)
    with Proxy(mosquitto.port) as proxy:
        older = federation.start_coordinator(
            "--broker", proxy.url, min_agents=1, rounds=10_000, keepalive_s=KEEPALIVE_S
        )
        federation.wait_for_round(2)
        proxy.hold()
        older.wait_for_log("broker lost")
        newer = federation.start_coordinator(state="newer", min_agents=1, rounds=10_000)
        federation.wait_for_round(1, "newer")
        proxy.let_go()
        assert older.wait() == 1
        committed = len(federation.versions("newer"))
        with recovery.watch():
            federation.wait_for_round(committed + 2, "newer")
    assert "another coordinator of federation test started" in older.log()
    assert "give each its own federation, or stop the other" in older.log()
    assert newer.is_running
    assert federation.epoch("newer") > federation.epoch()


# Another version.


@pytest.mark.long
@pytest.mark.fault(30)
@pytest.mark.parametrize("protocol", [PROTOCOL - 1, PROTOCOL + 1])
def test_an_agent_of_another_protocol_is_told_and_not_invited_and_others_go_on(
    protocol, mosquitto, make_federation, recovery, tmp_path
):
    federation = make_federation(mosquitto.url)
    arguments = ["--broker", mosquitto.url, "--federation", "test", "--task", "tests.broker.tasks:linear"]
    arguments += ["--agent-id", "stranger", "--state-dir", str(tmp_path / "stranger"), "--set", "check_data=false"]
    command = [str(protocol), "edge_agent", "run", *arguments]
    stranger = Program("stranger", "tests.broker.skewed", command, tmp_path / "logs")
    federation.programs.append(stranger)
    stranger.wait_for_log("broker connected")
    coordinator = federation.start_coordinator(rounds=2, min_agents=1, **BATCHES)
    says = f"stranger speaks protocol {protocol}, this coordinator {PROTOCOL}: install the same Midge on both"
    wait_until(lambda: says in federation.board()["status"], "the status names the agent")
    assert "agent cannot take part" in coordinator.log()
    assert federation.agent_views()["stranger"]["detail"].startswith(f"speaks protocol {protocol}")
    stranger.wait_for_log("the coordinator is of another protocol")
    assert f"the coordinator speaks protocol {PROTOCOL} (Midge " in stranger.log()
    assert f"this agent {protocol} (Midge 9.9.9): install the same Midge on both" in stranger.log()
    with recovery.watch():
        federation.start_agents(1)
        federation.wait_for_round(1)
    assert coordinator.wait() == 0
    assert set(federation.updates(2)) == {"agent-0"}
    assert stranger.is_running
    assert stranger.log().count("the coordinator is of another protocol") == 1


# Retained poison.

ABSURD = Invitation(
    run_id="elsewhere",
    epoch=2**53,
    round_num=1,
    attempt=1,
    model_digest="ab" * 32,
    task="tests.broker.tasks:linear",
    training=TrainingConfig(),
    seed=0,
    credit=1,
    deadline_s=0.0,
)
GARBAGE = (b"\xff\x00\xfe", b"{}", b'{"type":"head"}', b"[" * 5000, b"\x80\x04\x95pickle")
POISONED = (
    *("coordinator", "rollcall", "agent/agent-0/inbox", "agent/agent-0/presence", "agent/agent-0/outbox"),
    *("agent/agent-0/update/0/0", "agent/nobody/presence", "agent/agent-1/update/7/7", "model/elsewhere/head", "other"),
)


def poison(rogue, messages: dict[str, bytes]) -> None:
    for topic, payload in messages.items():
        rogue.expect_published(rogue.transport.publish(f"{PREFIX}/{topic}", payload, retain=True))


@pytest.mark.long
@pytest.mark.fault(20)
@pytest.mark.parametrize("number", range(len(GARBAGE)))
def test_garbage_retained_everywhere_costs_a_line_in_the_log_and_no_crash_at_any_connection(
    number, mosquitto, make_federation, peer, recovery, tmp_path
):
    poison(peer(mosquitto.url, "rogue"), dict.fromkeys(POISONED, GARBAGE[number]))
    federation = make_federation(mosquitto.url)
    federation.hold("agent-1", training=2)
    with Proxy(mosquitto.port) as proxy:
        behind = ("--broker", proxy.url)
        for part in range(2):
            federation.start_agent(f"agent-{part}", *behind, part=part)
        coordinator = federation.start_coordinator(*behind, rounds=3, min_agents=2, **BATCHES)
        into_the_middle_of(federation, 2, coordinator)
        for connection in (2, 3):
            proxy.cut()
            for program in federation.programs:
                program.wait_for_log("broker connected", times=connection)
        with recovery.watch():
            finish(federation, coordinator, recovery)
    assert "message refused" in coordinator.log()
    assert coordinator.log().count("message refused") <= 4 * len(POISONED)
    assert digests(federation) == undisturbed(tmp_path / "undisturbed", 2, 3)[1]


@pytest.mark.long
@pytest.mark.fault(20)
@pytest.mark.parametrize("when", ["before", "amid"])
def test_an_epoch_that_cannot_be_keeps_nobody_from_working(when, mosquitto, make_federation, peer, recovery, tmp_path):
    absurd = CoordinatorStatus(online=True, epoch=2**53, instance="rogue", protocol=PROTOCOL, version="9")
    messages = {"coordinator": encode(absurd), "agent/agent-0/inbox": encode(ABSURD)}
    rogue = peer(mosquitto.url, "rogue")
    federation = make_federation(mosquitto.url)
    federation.hold("agent-1", training=2)
    if when == "before":
        poison(rogue, messages)
    agents = federation.start_agents(2)
    for agent in agents:
        agent.wait_for_log("broker connected")
    coordinator = federation.start_coordinator(rounds=3, min_agents=2, **BATCHES)
    into_the_middle_of(federation, 2, coordinator)
    if when == "amid":
        poison(rogue, messages)
        coordinator.wait_for_log("message refused")
    with recovery.watch():
        finish(federation, coordinator, recovery)
    assert digests(federation) == undisturbed(tmp_path / "undisturbed", 2, 3)[1]


@pytest.mark.long
@pytest.mark.fault(20)
def test_a_frame_of_the_model_that_was_overwritten_is_published_again(
    mosquitto, make_federation, peer, recovery, tmp_path
):
    """The round whose agents cannot get the model is abandoned; the next attempt finds it whole."""
    rogue = peer(mosquitto.url, "rogue")
    federation = make_federation(mosquitto.url)
    coordinator = federation.start_coordinator(rounds=1, min_agents=2, round_deadline_s=3, **BATCHES)
    wait_until(lambda: "0 of 2 are there" in federation.board()["status"], "the model is published")
    poison(rogue, {f"model/{federation.run_id()}/0/0": b"garbage"})
    federation.start_agents(2)
    coordinator.wait_for_log("round abandoned")
    with recovery.watch():
        federation.wait_for_round(1)
    assert coordinator.wait() == 0
    assert federation.attempts(1)[0] > 1
    assert digests(federation) == undisturbed(tmp_path / "undisturbed", 2, 1)[1]
