"""Whatever is killed, in the middle of whatever: the round goes on, and no accepted update is trained again.

Each test compares the final model with what an undisturbed run gives, which plain NumPy computes.
"""

from __future__ import annotations

import psutil
import pytest

from edge_agent.journal import read_update
from tests.broker import tasks
from tests.broker.federation import Federation, Program, wait_until
from tests.broker.undisturbed import BATCHES, digests, undisturbed

pytestmark = pytest.mark.usefixtures("unmeasured")

embedded_in_faults = pytest.mark.parametrize(
    "broker", ["mosquitto", pytest.param("embedded", marks=pytest.mark.long)], indirect=True
)
"""With the embedded broker too, but only where `make faults` asks for it."""


def into_the_middle_of(federation: Federation, round_num: int, coordinator: Program) -> None:
    """agent-0 has reported in this round, and agent-1, which a test has told to hold, still trains."""
    federation.wait_for_update("agent-0", round_num)
    federation.wait_for_training("agent-1", round_num)
    assert coordinator.is_running
    assert len(federation.versions()) == round_num


@embedded_in_faults
@pytest.mark.fault(3)
def test_a_coordinator_killed_in_mid_round_goes_on_and_nothing_is_trained_again(federation, tmp_path):
    federation.hold("agent-1", training=2)
    federation.start_agents(2)
    coordinator = federation.start_coordinator(rounds=3, min_agents=2, **BATCHES)
    into_the_middle_of(federation, 2, coordinator)
    run_id, epoch, attempt = federation.run_id(), federation.epoch(), federation.attempts(2)[0]
    coordinator.kill()

    again = federation.start_coordinator(rounds=3, min_agents=2, **BATCHES)
    again.wait_for_log("run goes on")
    again.wait_for_log("broker connected")
    federation.release("agent-1")
    assert again.wait() == 0
    assert [run["run_id"] for run in federation.runs()] == [run_id]
    assert federation.attempts(2)[0] == attempt == 1
    assert federation.epoch() > epoch
    models, expected = undisturbed(tmp_path / "undisturbed", 2, 3)
    assert digests(federation) == expected
    each_once = [tasks.fingerprint(model) for model in models[:3]]
    assert federation.trainings("agent-0") == federation.trainings("agent-1") == each_once


@pytest.mark.fault(1, 2)
def test_a_broker_killed_in_mid_round_forgets_everything_and_the_round_commits(broker, federation, tmp_path):
    federation.hold("agent-1", training=1)
    agents = federation.start_agents(2)
    coordinator = federation.start_coordinator(rounds=2, min_agents=2, **BATCHES)
    into_the_middle_of(federation, 1, coordinator)
    broker.kill()
    for program in (coordinator, *agents):
        program.wait_for_log("broker lost")
    broker.start()
    federation.release("agent-1")
    assert coordinator.wait() == 0
    models, expected = undisturbed(tmp_path / "undisturbed", 2, 2)
    assert digests(federation) == expected
    each_once = [tasks.fingerprint(model) for model in models[:2]]
    assert federation.trainings("agent-0") == federation.trainings("agent-1") == each_once


@embedded_in_faults
@pytest.mark.fault(4)
def test_an_agent_killed_while_it_trains_trains_again_after_its_restart(federation, tmp_path):
    federation.hold("agent-1", training=1)
    agents = federation.start_agents(2)
    coordinator = federation.start_coordinator(rounds=2, min_agents=2, **BATCHES)
    into_the_middle_of(federation, 1, coordinator)
    workers = agents[1].children()
    assert len(workers) == 1
    agents[1].kill()
    assert not psutil.wait_procs(workers, timeout=10)[1]  # a worker does not outlive its agent
    federation.start_agent("agent-1", part=1)
    assert coordinator.wait() == 0
    assert digests(federation) == undisturbed(tmp_path / "undisturbed", 2, 2)[1]
    assert len(federation.trainings("agent-0")) == 2
    assert len(federation.trainings("agent-1")) == 3
    assert federation.attempts(1)[0] == 1


@embedded_in_faults
@pytest.mark.fault(3, 4)
def test_finished_work_outlives_the_coordinators_absence_and_the_agents_own_death(federation, tmp_path):
    for agent_id in ("agent-0", "agent-1"):
        federation.hold(agent_id, training=1)
    agents = federation.start_agents(2)
    coordinator = federation.start_coordinator(rounds=2, min_agents=2, **BATCHES)
    for agent_id in ("agent-0", "agent-1"):
        federation.wait_for_training(agent_id, 1)
    coordinator.kill()
    kept = {}
    for agent_id in ("agent-0", "agent-1"):
        federation.release(agent_id)
        path = federation.journal(agent_id) / "update.bin"
        kept[agent_id] = wait_until(lambda path=path: path.exists() and read_update(path), f"the update of {agent_id}")
    agents[0].kill()
    federation.start_agent("agent-0", part=0)
    assert agents[1].is_running

    again = federation.start_coordinator(rounds=2, min_agents=2, **BATCHES)
    sent = {agent_id: federation.wait_for_update(agent_id, 1).update_digest for agent_id in kept}
    assert sent == {agent_id: update.update_digest for agent_id, update in kept.items()}
    assert again.wait() == 0
    models, expected = undisturbed(tmp_path / "undisturbed", 2, 2)
    assert digests(federation) == expected
    each_once = [tasks.fingerprint(model) for model in models[:2]]
    assert federation.trainings("agent-0") == federation.trainings("agent-1") == each_once


def test_a_stopped_run_goes_on_only_with_its_own_configuration_and_a_finished_one_is_begun_anew(
    mosquitto, make_federation, tmp_path, peer
):
    federation = make_federation(mosquitto.url)
    federation.hold("agent-0", training=2)
    federation.start_agents(1)
    coordinator = federation.start_coordinator(rounds=3, min_agents=1, **BATCHES)
    federation.wait_for_training("agent-0", 2)
    assert coordinator.stop() == 0
    assert "goes on when it is started again" in coordinator.log()
    first = federation.runs()[0]
    assert (first["state"], first["round_num"]) == ("stopped", 1)

    # Another learning rate is another run: the agent drops what it holds, the first run stays as it is.
    other = {**BATCHES, "learning_rate": 0.02}
    coordinator = federation.start_coordinator(rounds=2, min_agents=1, **other)
    assert coordinator.wait() == 0
    assert f'run={first["run_id"]} differs_in="rounds, learning_rate"' in coordinator.log()
    second, left = federation.runs()
    assert left == {**first, "is_published": False}
    assert (second["state"], second["round_num"]) == ("done", 2)
    assert digests(federation) == undisturbed(tmp_path / "other", 1, 2, learning_rate=0.02)[1]

    # The first one's own configuration goes on with it, from round 2.
    assert federation.start_coordinator(rounds=3, min_agents=1, **BATCHES).wait() == 0
    latest, finished = federation.runs()
    assert latest == {**second, "is_published": False}
    assert (finished["run_id"], finished["state"], finished["round_num"]) == (first["run_id"], "done", 3)
    expected = undisturbed(tmp_path / "undisturbed", 1, 3)[1]
    assert [version["digest"] for version in federation.versions(run_id=first["run_id"])] == expected

    # It is finished: the same configuration begins a run of its own, with the same result.
    assert federation.start_coordinator(rounds=3, min_agents=1, **BATCHES).wait() == 0
    assert len(federation.runs()) == 3
    assert federation.run_id() not in {first["run_id"], second["run_id"]}
    assert digests(federation) == expected

    # The broker keeps nothing of any run but the last.
    looker = peer(mosquitto.url, "looker")
    looker.transport.subscribe(["midge/1/test/model/#"])
    looker.sync()
    retained = {message.topic.split("/")[4] for message in looker.messages() if message.topic.startswith("midge/")}
    assert retained == {federation.run_id()}


@pytest.mark.fault(29)
def test_of_two_coordinators_the_older_steps_down_and_one_state_directory_serves_only_one(mosquitto, make_federation):
    federation = make_federation(mosquitto.url)
    older = federation.start_coordinator(min_agents=1)
    older.wait_for_log("broker connected")
    intruder = federation.start_coordinator(min_agents=1)
    assert intruder.wait() == 2
    assert "another coordinator is running in it; stop it, or give this one its own state_dir" in intruder.log()
    assert older.is_running

    newer = federation.start_coordinator(min_agents=1, state="newer")
    assert older.wait() == 1
    assert "another coordinator of federation test started" in older.log()
    assert "give each its own federation, or stop the other" in older.log()
    newer.wait_for_log("broker connected")
    assert newer.is_running
    federation.start_agents(1)
    wait_until(lambda: len(federation.versions("newer")) > 2, "the newer one works on")
