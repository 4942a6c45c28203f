"""What the broker, or the machine, does not give: packets of a size, descriptors, memory. It is said, and it may come back."""

from __future__ import annotations

import itertools
import re
import resource
from pathlib import Path

import psutil
import pytest

from tests.broker.federation import Federation, Program, wait_until
from tests.broker.test_disk_full import assert_as_undisturbed
from tests.broker.test_restart import into_the_middle_of

pytestmark = pytest.mark.usefixtures("unmeasured")

WIDE = "tests.broker.tasks:wide"


def in_mid_round(federation: Federation, rounds: int = 3, **settings) -> tuple[Program, list[Program]]:
    """Coordinator and agents in round 2: agent-0 has reported, agent-1 trains until it is released."""
    federation.hold("agent-1", training=2)
    agents = federation.start_agents(2)
    coordinator = federation.start_coordinator(rounds=rounds, min_agents=2, **settings)
    into_the_middle_of(federation, 2, coordinator)
    return coordinator, agents


# Packets.


@pytest.mark.long
@pytest.mark.fault(9)
def test_frames_shrink_to_what_the_broker_takes(start_mosquitto, make_federation, recovery):
    broker = start_mosquitto("max_packet_size 9000")
    federation = make_federation(broker.url, task=WIDE)
    federation.start_agents(2)
    with recovery.watch():
        assert federation.start_coordinator(rounds=2, min_agents=2).wait() == 0
    assert federation.runs()[0]["num_frames"] >= 1_200_000 / 9000
    assert_as_undisturbed(federation, 2)
    assert "not sent" not in "".join(program.log() for program in federation.programs)


@pytest.mark.long
@pytest.mark.fault(9)
def test_a_limit_that_is_lowered_under_a_run_is_named_and_the_run_goes_on_once_it_is_raised_again(
    start_mosquitto, make_federation, recovery
):
    broker = start_mosquitto()
    federation = make_federation(broker.url, task=WIDE)
    coordinator, agents = in_mid_round(federation)
    broker.kill()
    broker._options = ["max_packet_size 30000"]
    broker.start()
    for program in federation.programs:
        program.wait_for_log("broker connected", times=2)
    coordinator.wait_for_log("model not published")
    wait_until(lambda: "the model cannot be published: " in federation.board()["status"], "the status says so")
    assert "the broker takes 30000" in federation.board()["status"]
    assert federation.get("/readyz")[0] == 503
    federation.release("agent-1")
    agents[1].wait_for_log("message not sent")
    assert "the broker takes 30000: send smaller frames, or raise the limit on the broker" in agents[1].log()
    assert all(program.log().count("broker connected") == 2 for program in federation.programs)  # nobody was cut off
    broker.kill()
    broker._options = []
    broker.start()
    with recovery.watch():
        federation.wait_for_round(2)
    recovery.lost(len({"agent-0"} - federation.updates(2).keys()))
    assert coordinator.wait() == 0
    assert agents[1].log().count("message not sent") == 1
    assert_as_undisturbed(federation, 3)


@pytest.mark.long
@pytest.mark.fault(9)
def test_a_limit_that_the_broker_does_not_tell_is_guessed_and_the_run_ends_with_its_reason(
    start_mosquitto, make_federation
):
    broker = start_mosquitto("message_size_limit 50000")
    federation = make_federation(broker.url, task=WIDE)
    federation.start_agents(2)
    bounds = {"start_deadline_s": 40, "round_deadline_s": 4, "max_attempts": 2}
    coordinator = federation.start_coordinator(rounds=1, min_agents=2, **bounds)
    coordinator.wait_for_log("has the broker a limit that it does not tell (in Mosquitto message_size_limit)?")
    assert coordinator.wait() == 1
    # Each frame costs its sender the connection: whether both were ever there at once is chance.
    assert re.search(r"round 1 was abandoned 2 times|of 2 agents came within", coordinator.log())
    assert coordinator.log().count("broker connected") < 20  # it waits longer and longer


# Descriptors and memory.


def limit(program: Program, what: int, value: int) -> None:
    resource.prlimit(program.pid, what, (value, resource.prlimit(program.pid, what)[1]))


def first_free(program: Program, *, without_sockets: bool) -> int:
    """The least descriptor that it does not use, or that only a connection of its own uses."""
    used = {int(path.name) for path in Path(f"/proc/{program.pid}/fd").iterdir()}
    if without_sockets:
        used -= {connection.fd for connection in psutil.Process(program.pid).net_connections("tcp")}
    return next(number for number in itertools.count() if number not in used)


def lift(program: Program, what: int) -> None:
    limit(program, what, resource.prlimit(program.pid, what)[1])


@pytest.mark.long
@pytest.mark.fault(35)
def test_a_coordinator_without_descriptors_waits_says_so_and_goes_on(mosquitto, make_federation, recovery):
    federation = make_federation(mosquitto.url, task=WIDE)
    coordinator, _ = in_mid_round(federation)
    limit(coordinator, resource.RLIMIT_NOFILE, psutil.Process(coordinator.pid).num_fds())
    mosquitto.kill()
    mosquitto.start()
    federation.release("agent-1")
    coordinator.wait_for_log('reason="Too many open files"')
    assert coordinator.is_running
    lift(coordinator, resource.RLIMIT_NOFILE)
    with recovery.watch():
        federation.wait_for_round(2)
    recovery.lost(len({"agent-0"} - federation.updates(2).keys()))
    assert coordinator.wait() == 0
    assert "Traceback" not in coordinator.log()
    assert_as_undisturbed(federation, 3)


@pytest.mark.long
@pytest.mark.fault(35)
def test_a_coordinator_without_memory_waits_or_ends_says_so_and_goes_on(mosquitto, make_federation, recovery):
    """Where memory ends is not ours to choose: where it can wait, it does; else it ends, to be started again."""
    federation = make_federation(mosquitto.url, task=WIDE)
    coordinator, _ = in_mid_round(federation)
    limit(coordinator, resource.RLIMIT_AS, psutil.Process(coordinator.pid).memory_info().vms)
    federation.release("agent-1")
    said = ('reason="Cannot allocate memory"', "out of memory; start it again, with more, to go on")
    wait_until(lambda: any(words in coordinator.log() for words in said), "it says that it has no memory")
    if said[1] in coordinator.log():
        assert coordinator.wait() == 1
        coordinator = federation.start_coordinator(rounds=3, min_agents=2)
    else:
        lift(coordinator, resource.RLIMIT_AS)
    with recovery.watch():
        federation.wait_for_round(2)
    recovery.lost(len({"agent-0"} - federation.updates(2).keys()))
    assert coordinator.wait() == 0
    assert_as_undisturbed(federation, 3)


@pytest.mark.long
@pytest.mark.fault(35)
@pytest.mark.parametrize("moment", ["connecting", "starting a worker"])
def test_an_agent_without_descriptors_refuses_for_that_reason_and_takes_part_later(
    moment, mosquitto, make_federation, recovery
):
    federation = make_federation(mosquitto.url)
    if moment == "connecting":
        coordinator, agents = in_mid_round(federation, max_attempts=20)
    else:
        agents = federation.start_agents(2)
        for agent in agents:
            agent.wait_for_log("broker connected")
    limit(agents[1], resource.RLIMIT_NOFILE, first_free(agents[1], without_sockets=moment == "connecting"))
    if moment == "connecting":
        mosquitto.kill()
        mosquitto.start()
        agents[1].wait_for_log("Too many open files")
        federation.release("agent-1")
    else:
        coordinator = federation.start_coordinator(rounds=3, min_agents=2, max_attempts=20)
        coordinator.wait_for_log("agent refused")
        assert "Too many open files" in coordinator.log()
        assert "free some space" not in coordinator.log()
    assert agents[1].is_running
    committed = len(federation.versions()) - 1
    lift(agents[1], resource.RLIMIT_NOFILE)
    with recovery.watch():
        federation.wait_for_round(committed + 1)
    assert coordinator.wait() == 0
    assert federation.versions()[3]["num_updates"] == 2
    assert "Traceback" not in agents[1].log()
