"""The disk is full, for coordinators and agents as processes: they stay up, say so, and go on with the same round.

A limit on the size of files (RLIMIT_FSIZE), which another process can set and lift again, stands for a disk that is full; where
the tests may mount, a small file system really is.
"""

from __future__ import annotations

import contextlib
import resource
import subprocess
import time

import pytest

from tests.broker import tasks
from tests.broker.federation import Federation, Program, call, call_json, federated, wait_until
from tests.broker.test_restart import into_the_middle_of

pytestmark = pytest.mark.usefixtures("unmeasured")

LIMIT_BYTES = 400_000
"""Below the 1.2 MB of a model of the task `wide`, above a log and a small database."""
ROOM_BYTES = 128 << 20


@pytest.fixture
def federation(mosquitto, make_federation):
    return make_federation(mosquitto.url, task="tests.broker.tasks:wide")


def limit_files(program: Program, size_bytes: int) -> None:
    resource.prlimit(program.pid, resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))


def lift_limit(program: Program) -> None:
    limit_files(program, resource.RLIM_INFINITY)


def metric(federation: Federation, name: str) -> float:
    lines = federation.get("/metrics")[1].splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[-1])


def wait_until_parked(federation: Federation, coordinator: Program, reason: str) -> None:
    coordinator.wait_for_log("the disk fails; the run waits")
    wait_until(lambda: federation.get("/readyz")[0] == 503, "it says that it is not ready")
    assert reason in federation.get("/readyz")[1]
    assert federation.get("/healthz")[0] == 200
    assert metric(federation, "midge_disk_failed") == 1
    assert metric(federation, "midge_disk_failures_total") >= 1
    assert "waiting for the disk for" in federation.board()["status"]
    assert reason in federation.board()["status"]


def assert_as_undisturbed(federation: Federation, rounds: int) -> None:
    """Every version is that of a run that nothing happened to, and nobody trained twice."""
    models = federated(tasks.wide, {"agent-0": 0, "agent-1": 1}, rounds)
    each_once = [tasks.fingerprint(model) for model in models[:rounds]]
    for agent_id in ("agent-0", "agent-1"):
        assert federation.trainings(agent_id) == each_once
    for round_num in range(rounds + 1):
        assert tasks.fingerprint(federation.model(round_num)) == tasks.fingerprint(models[round_num])
    assert [federation.attempts(round_num)[0] for round_num in range(1, rounds + 1)] == [1] * rounds
    assert call_json("coordinator", "verify", str(federation.state_dir()))["findings"] == []


def test_a_coordinator_whose_disk_is_full_in_mid_round_waits_and_goes_on_when_there_is_room(federation):
    federation.hold("agent-1", training=2)
    agents = federation.start_agents(2)
    coordinator = federation.start_coordinator(rounds=3, min_agents=2)
    into_the_middle_of(federation, 2, coordinator)
    limit_files(coordinator, LIMIT_BYTES)
    federation.release("agent-1")  # its update comes, and cannot be stored
    wait_until_parked(federation, coordinator, "File too large")
    assert len(federation.versions()) == 2
    assert coordinator.log().count("the disk fails; the run waits") == 1
    assert "Traceback" not in coordinator.log()
    assert federation.updates(2).keys() == {"agent-0"}  # what was accepted stays so
    closed = call("coordinator", "round", "close", "--state-dir", str(federation.state_dir()))
    assert closed.returncode == 1
    assert closed.stdout.startswith("nothing to close: waiting for the disk for ")

    lift_limit(coordinator)
    assert coordinator.wait() == 0
    assert "the disk can be written again; the run goes on" in coordinator.log()
    assert_as_undisturbed(federation, 3)
    assert all(agent.is_running for agent in agents)


@pytest.mark.long
@pytest.mark.fault(14, 34)
def test_a_coordinator_that_waits_for_its_disk_ends_when_asked_and_goes_on_when_started_again(federation):
    federation.hold("agent-1", training=1)
    federation.start_agents(2)
    coordinator = federation.start_coordinator(rounds=2, min_agents=2)
    into_the_middle_of(federation, 1, coordinator)
    limit_files(coordinator, LIMIT_BYTES)
    federation.release("agent-1")
    wait_until_parked(federation, coordinator, "File too large")
    began = time.monotonic()
    assert coordinator.stop() == 0
    assert time.monotonic() - began < 10
    assert "goes on when it is started again" in coordinator.log()
    assert "Traceback" not in coordinator.log()
    assert federation.start_coordinator(rounds=2, min_agents=2).wait() == 0
    assert_as_undisturbed(federation, 2)


def test_an_agent_whose_disk_is_full_refuses_for_that_reason_and_takes_part_when_there_is_room(federation):
    agents = federation.start_agents(2)
    agents[1].wait_for_log("broker connected")
    limit_files(agents[1], LIMIT_BYTES)
    coordinator = federation.start_coordinator(rounds=1, min_agents=2, max_attempts=20)
    coordinator.wait_for_log("agent refused")
    assert 'reason=disk detail="File too large; free some space, or choose another --state-dir"' in coordinator.log()
    run = federation.run_id()
    refusals = f'midge_refusals_total{{federation="test",reason="disk",run="{run}"}}'
    assert metric(federation, refusals) >= 1
    assert agents[1].is_running
    lift_limit(agents[1])
    assert coordinator.wait() == 0
    assert federation.versions()[1]["num_updates"] == 2
    assert "Traceback" not in agents[1].log()


# A file system that is really full.


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 MiB, and how to fill it."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={ROOM_BYTES}", "midge-test", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"this user may not mount: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(path) -> None:
    """Leave no room at all."""
    with (path / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size_bytes in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size_bytes))


def test_a_file_system_without_a_free_byte_is_outlived_at_any_moment_of_a_run(small_disk, mosquitto, make_federation):
    federation = make_federation(mosquitto.url, task="tests.broker.tasks:wide")
    federation.state_dir = lambda state="coordinator": small_disk / state
    rounds = 4
    for agent_id in ("agent-0", "agent-1"):
        federation.hold(agent_id, training=1)
    federation.start_agents(2)
    coordinator = federation.start_coordinator(rounds=rounds, min_agents=2, max_attempts=1)
    for number in range(1, rounds + 1):
        for agent_id in ("agent-0", "agent-1"):
            federation.wait_for_training(agent_id, number)
        fill(small_disk)
        for agent_id in ("agent-0", "agent-1"):
            if number < rounds:
                federation.hold(agent_id, training=number + 1)
            else:
                federation.release(agent_id)
        wait_until(lambda number=number: said_full(coordinator) == number, "it says that the disk is full")
        wait_until(lambda: federation.get("/readyz")[0] == 503, "it says that it is not ready")
        assert coordinator.is_running
        (small_disk / "ballast").unlink()
        wait_until(lambda number=number: said_well(coordinator) == number, "it goes on")
    assert coordinator.wait() == 0
    assert "Traceback" not in coordinator.log()
    assert_as_undisturbed(federation, rounds)


def test_a_coordinator_that_is_started_on_a_full_disk_says_so_and_may_be_started_again(
    small_disk, mosquitto, make_federation
):
    federation = make_federation(mosquitto.url)
    federation.state_dir = lambda state="coordinator": small_disk / state
    for state in ("new", "coordinator"):
        if state == "coordinator":
            (small_disk / "ballast").unlink()
            stopped = federation.start_coordinator(state=state, min_agents=1)
            stopped.wait_for_log("broker connected")
            stopped.kill()
        fill(small_disk)
        refused = federation.start_coordinator(state=state, min_agents=1)
        assert refused.wait() == 1  # not 2: systemd starts it again
        assert "Traceback" not in refused.log()
        assert "restore" not in refused.log()
    (small_disk / "ballast").unlink()
    federation.start_agents(1)
    assert federation.start_coordinator(min_agents=1, rounds=1).wait() == 0


def said_full(coordinator: Program) -> int:
    return coordinator.log().count("the disk fails; the run waits")


def said_well(coordinator: Program) -> int:
    return coordinator.log().count("the disk can be written again; the run goes on")
