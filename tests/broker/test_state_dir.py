"""The state directory of a coordinator at work: verified beside it, copied beside it, and the copy brought back.

Training gives the same bits each time here, so what an undisturbed run gives says what every version must be.
"""

from __future__ import annotations

import json
import tarfile

import pytest

from tests.broker import tasks
from tests.broker.federation import call, call_json, wait_until
from tests.broker.test_restart import BATCHES, digests, into_the_middle_of, undisturbed
from tests.broker.test_strategies import fedadam_in_numpy, flat

pytestmark = pytest.mark.usefixtures("unmeasured")

KEPT_OF_ROUND_2 = {"agent-0.2.safetensors", "agent-1.2.safetensors"}


def verified(path) -> dict:
    """The report of `coordinator verify`, which must find nothing."""
    report = call_json("coordinator", "verify", str(path))
    assert report["findings"] == []
    return report


def presences(peer_of_broker, federation) -> dict[str, int]:
    """The epoch that each agent's retained presence carries."""
    found = {}
    for message in peer_of_broker.messages():
        if message.topic.endswith("/presence") and message.payload:
            found[message.topic.split("/")[4]] = json.loads(message.payload)["epoch"]
    return found


def test_a_directory_is_sound_in_mid_round_and_after_a_kill_and_says_so_at_once(mosquitto, make_federation):
    federation = make_federation(mosquitto.url, task="tests.broker.tasks:wide")
    federation.hold("agent-1", training=2)
    federation.start_agents(2)
    coordinator = federation.start_coordinator(rounds=3, min_agents=2, **BATCHES)
    into_the_middle_of(federation, 2, coordinator)
    state = federation.state_dir()
    beside = verified(state)
    assert (beside["is_running"], beside["versions"], beside["updates"]) == (True, 2, 1)
    refused = call("coordinator", "verify", str(state), "--repair")
    assert refused.returncode == 2
    assert "a coordinator is running in it; stop it, then repair" in refused.stderr

    coordinator.kill()
    said = call("coordinator", "verify", str(state))
    assert said.returncode == 0
    assert "sound: " in said.stdout
    assert "1 accepted update of rounds under way" in said.stdout

    # One byte of the update that was accepted: the spool has lost it, and verify says whose it is.
    (segment,) = state.glob("spool/*/2.spool")
    content = bytearray(segment.read_bytes())
    content[content.index(b"agent-0") + 200] ^= 1
    segment.write_bytes(content)
    damaged = call("coordinator", "verify", str(state))
    assert damaged.returncode == 1
    assert "damage    spool/" in damaged.stdout
    assert ", agent-0: 1 of the " in damaged.stdout


def test_a_copy_of_a_round_under_way_goes_on_and_commits_above_every_epoch_that_was_seen(
    mosquitto, make_federation, tmp_path, peer
):
    federation = make_federation(mosquitto.url)
    federation.hold("agent-1", training=2)
    federation.start_agents(2)
    coordinator = federation.start_coordinator(rounds=4, min_agents=2, **BATCHES)
    into_the_middle_of(federation, 2, coordinator)
    copy = federation.state_dir("copy")
    done = call("coordinator", "backup", str(federation.state_dir()), "--to", str(copy))
    assert done.returncode == 0, done.stderr
    assert "1 accepted update" in done.stdout
    assert verified(copy)["updates"] == 1

    # The original goes on past the copy, is started again, and dies in round 4: what came after the copy is lost with it.
    federation.hold("agent-1", training=4)
    into_the_middle_of(federation, 4, coordinator)
    coordinator.kill()
    coordinator = federation.start_coordinator(rounds=4, min_agents=2, **BATCHES)
    coordinator.wait_for_log("broker connected")
    seen = federation.epoch()
    wait_until(lambda: federation.agent_views()["agent-1"]["activity"] in ("training", "fetching"), "agent-1 is back")
    lost = digests(federation)
    coordinator.kill()

    again = federation.start_coordinator(state="copy", rounds=4, min_agents=2, **BATCHES)
    again.wait_for_log("run goes on")
    assert federation.epoch("copy") > seen
    (federation.control("agent-1") / "hold").unlink()
    assert again.wait() == 0
    expected = undisturbed(tmp_path / "undisturbed", 2, 4)[1]
    assert [version["digest"] for version in federation.versions("copy")] == expected
    assert lost == expected[:4]  # the rounds that were done again gave what they had given
    verified(copy)
    looker = peer(mosquitto.url, "looker")
    looker.transport.subscribe(["midge/1/test/agent/+/presence"])
    looker.sync()
    assert set(presences(looker, federation).values()) == {federation.epoch("copy")}


def test_what_a_strategy_remembers_base_models_and_agents_models_are_in_a_copy_that_goes_on(mosquitto, make_federation):
    federation = make_federation(mosquitto.url)
    settings = {"rounds": 4, "min_agents": 2, "strategy": "fedadam", "learning_rate": 0.05}
    pushed = call(
        *("coordinator", "models", "push", "spare", "--task", "tests.broker.tasks:linear", "--seed", "7"),
        *("--state-dir", str(federation.state_dir())),
    )
    assert pushed.returncode == 0, pushed.stderr
    federation.hold("agent-1", training=3)
    federation.start_agents(2)
    coordinator = federation.start_coordinator(**settings, keep_agent_models="true")
    into_the_middle_of(federation, 3, coordinator)
    kept = federation.state_dir() / "agent-models" / federation.run_id()
    wait_until(lambda: {path.name for path in kept.iterdir()} == KEPT_OF_ROUND_2, "both agents' models are kept")
    beside = verified(federation.state_dir())
    assert (beside["models"], beside["agent_models"], beside["is_running"]) == (5, 2, True)  # 0 to 2, a state, spare
    copy = federation.state_dir("copy")
    made = call_json("coordinator", "backup", str(federation.state_dir()), "--to", str(copy))
    assert (made["models"], made["agent_models"]) == (5, 2)
    coordinator.kill()

    repaired = call_json("coordinator", "verify", str(copy), "--repair")
    assert (repaired["findings"], repaired["removed"]) == ([], [])
    (base,) = json.loads(call("coordinator", "models", "bases", "--state-dir", str(copy), "--json").stdout)
    assert (base["name"], (copy / "models" / f"{base['digest']}.safetensors").exists()) == ("spare", True)
    again = federation.start_coordinator(state="copy", **settings, keep_agent_models="true")
    again.wait_for_log("run goes on")
    federation.release("agent-1")
    assert again.wait() == 0
    for round_num, expected in enumerate(fedadam_in_numpy(2, 4)):
        assert flat(federation.model(round_num, "copy")).tobytes() == flat(expected).tobytes(), round_num
    after = call_json("coordinator", "verify", str(copy), "--repair")
    assert (after["findings"], after["agent_models"], after["versions"]) == ([], 2, 5)


@pytest.mark.long
@pytest.mark.fault(2)
def test_a_copy_is_brought_back_after_the_broker_lost_everything_too(mosquitto, make_federation, tmp_path):
    """Nothing retained tells the coordinator of the epochs that its agents have seen."""
    federation = make_federation(mosquitto.url)
    federation.hold("agent-1", training=2)
    agents = federation.start_agents(2)
    coordinator = federation.start_coordinator(rounds=3, min_agents=2, **BATCHES)
    into_the_middle_of(federation, 2, coordinator)
    archive = tmp_path / "copy.tar.gz"
    done = call_json("coordinator", "backup", str(federation.state_dir()), "--to", str(archive))
    assert done["standing"] == {federation.run_id(): 1}
    for _ in range(2):  # its epochs grow past the copy's
        coordinator.kill()
        coordinator = federation.start_coordinator(rounds=3, min_agents=2, **BATCHES)
        coordinator.wait_for_log("broker connected")
    coordinator.kill()
    mosquitto.kill()
    for program in agents:
        program.wait_for_log("broker lost")
    mosquitto.start()

    with tarfile.open(archive) as packed:
        packed.extractall(federation.state_dir("restored"), filter="data")
    federation.release("agent-1")
    again = federation.start_coordinator(state="restored", rounds=3, min_agents=2, **BATCHES)
    assert again.wait() == 0
    assert federation.epoch("restored") > federation.epoch()
    models, expected = undisturbed(tmp_path / "undisturbed", 2, 3)
    assert [version["digest"] for version in federation.versions("restored")] == expected
    # Nothing came after the copy but starts: what was accepted counts, and no training was done twice.
    assert federation.trainings("agent-0") == [tasks.fingerprint(model) for model in models[:3]]
