"""The broker dies, forgets or is out of reach: both sides come back by themselves, and the round ends as ever."""

from __future__ import annotations

import pytest

from midge.transport.brokers import BrokerError
from tests.broker.federation import Federation, Program, wait_until
from tests.broker.proxy import Proxy
from tests.broker.test_disk_full import assert_as_undisturbed
from tests.broker.test_restart import BATCHES, digests, into_the_middle_of, undisturbed
from tests.fault_table import Recovery

pytestmark = pytest.mark.usefixtures("unmeasured")

WIDE = "tests.broker.tasks:wide"
MODEL_BYTES = 1_200_000
KEEPALIVE_S = 2


@pytest.fixture
def proxy(mosquitto):
    with Proxy(mosquitto.port) as one:
        yield one


def lost(federation: Federation, round_num: int, accepted: set[str]) -> int:
    """How many of the updates that had been accepted in a round are not counted in it."""
    return len(accepted - federation.updates(round_num).keys())


def finish(federation: Federation, coordinator: Program, recovery: Recovery, round_num: int = 2) -> None:
    """agent-1 goes on: this round is the next one that is committed, and what agent-0 had delivered counts in it."""
    federation.release("agent-1")
    federation.wait_for_round(round_num)
    recovery.lost(lost(federation, round_num, {"agent-0"}))
    assert coordinator.wait() == 0
    assert "Traceback" not in "".join(program.log() for program in federation.programs)


# The broker is killed.


@pytest.mark.long
@pytest.mark.fault(1)
def test_a_broker_killed_while_everyone_waits_is_found_again(mosquitto, make_federation, recovery, tmp_path):
    federation = make_federation(mosquitto.url)
    first = federation.start_agent("agent-0", part=0)
    coordinator = federation.start_coordinator(rounds=1, min_agents=2, **BATCHES)
    wait_until(lambda: "1 of 2 are there" in federation.board()["status"], "it waits for the other agent")
    mosquitto.kill()
    for program in (first, coordinator):
        program.wait_for_log("broker lost")
    assert federation.get("/readyz")[0] == 503
    mosquitto.start()
    with recovery.watch():
        federation.start_agent("agent-1", part=1)
        federation.wait_for_round(1)
    assert coordinator.wait() == 0
    assert digests(federation) == undisturbed(tmp_path / "undisturbed", 2, 1)[1]


@pytest.mark.long
@pytest.mark.fault(1)
@pytest.mark.parametrize("way", ["down", "up"])
def test_a_broker_killed_among_frames_of_model_or_update_costs_nothing_but_time(
    way, mosquitto, proxy, make_federation, recovery
):
    federation = make_federation(mosquitto.url, task=WIDE)
    federation.start_agent("agent-0", part=0)
    agent = federation.start_agent("agent-1", "--broker", proxy.url, part=1)
    agent.wait_for_log("broker connected")
    line = getattr(proxy, way)
    line.bytes_per_s = 300_000
    coordinator = federation.start_coordinator(rounds=2, min_agents=2)
    wait_until(lambda: line.num_bytes > MODEL_BYTES / 3, "a part of the frames came through")
    assert len(federation.versions()) == 1
    accepted = set(federation.updates(1))
    mosquitto.kill()
    for program in (agent, coordinator):
        program.wait_for_log("broker lost")
    with recovery.watch():
        mosquitto.start()
        line.bytes_per_s = 0
        federation.wait_for_round(1)
    recovery.lost(lost(federation, 1, accepted))
    assert coordinator.wait() == 0
    assert_as_undisturbed(federation, 2)


# The broker comes back with other contents than it had.


def damage(path, kind: str) -> None:
    if kind == "deleted":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    for place in range(40, len(content), 97):
        content[place] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.long
@pytest.mark.fault(2)
@pytest.mark.parametrize("kind", ["deleted", "flipped"])
def test_what_a_broker_forgets_or_keeps_damaged_is_put_there_again(
    kind, start_mosquitto, make_federation, peer, recovery, tmp_path
):
    kept = tmp_path / "kept"
    kept.mkdir()
    saves = [f"persistence_location {kept}/", "autosave_on_changes true", "autosave_interval 1"]
    mosquitto = start_mosquitto("persistence true", *saves)
    federation = make_federation(mosquitto.url)
    federation.hold("agent-1", training=2)
    federation.start_agents(2)
    coordinator = federation.start_coordinator(rounds=3, min_agents=2, **BATCHES)
    into_the_middle_of(federation, 2, coordinator)
    file = kept / "mosquitto.db"
    wait_until(
        lambda: file.exists() and federation.run_id().encode() in file.read_bytes(), "the broker saved its state"
    )
    mosquitto.kill()
    for program in federation.programs:
        program.wait_for_log("broker lost")
    damage(file, kind)
    with recovery.watch():
        try:
            mosquitto.start()
        except BrokerError:  # it will not start from such a file: who runs it takes the file away
            file.unlink()
            mosquitto.start()
        for program in federation.programs:
            program.wait_for_log("broker connected", times=2)
        looker = peer(mosquitto.url, "looker")
        expected = {f"agent/{agent_id}/presence" for agent_id in ("agent-0", "agent-1")} | {"coordinator"}
        expected |= {f"model/{federation.run_id()}/{name}" for name in ("head", "1/0")}
        wait_until(lambda: expected <= retained(looker), "what is retained is there again")
        finish(federation, coordinator, recovery)
    assert digests(federation) == undisturbed(tmp_path / "undisturbed", 2, 3)[1]


def retained(looker) -> set[str]:
    """The topics of the federation `test` that hold something now, without their prefix."""
    prefix = "midge/1/test/"
    looker.transport.subscribe([f"{prefix}#"])
    looker.sync()
    seen = {message.topic.removeprefix(prefix) for message in looker.messages() if message.payload}
    looker.transport.unsubscribe([f"{prefix}#"])
    return seen


# The network between is cut, or swallows everything.


@pytest.mark.long
@pytest.mark.fault(16)
@pytest.mark.parametrize("held", ["up", "down", "both"])
@pytest.mark.parametrize("who", ["agent-1", "coordinator"])
def test_a_black_hole_is_noticed_and_the_round_goes_on_after_it(
    who, held, mosquitto, proxy, make_federation, recovery, tmp_path
):
    federation = make_federation(mosquitto.url)
    federation.hold("agent-1", training=2)
    behind = ("--broker", proxy.url)
    federation.start_agent("agent-0", part=0)
    agent = federation.start_agent("agent-1", *(behind if who == "agent-1" else ()), part=1, keepalive_s=KEEPALIVE_S)
    options = behind if who == "coordinator" else ()
    coordinator = federation.start_coordinator(*options, rounds=2, min_agents=2, keepalive_s=KEEPALIVE_S, **BATCHES)
    into_the_middle_of(federation, 2, coordinator)
    cut_off = agent if who == "agent-1" else coordinator
    for name in ("up", "down") if held == "both" else (held,):
        getattr(proxy, name).is_held = True
    cut_off.wait_for_log("broker lost")
    with recovery.watch():
        proxy.let_go()
        finish(federation, coordinator, recovery)
    assert digests(federation) == undisturbed(tmp_path / "undisturbed", 2, 2)[1]
    assert federation.attempts(2)[0] == 1


@pytest.mark.long
@pytest.mark.fault(16)
@pytest.mark.parametrize("reset", [False, True])
def test_a_line_that_is_cut_again_and_again_among_frames_delivers_them_all(
    reset, mosquitto, proxy, make_federation, recovery
):
    federation = make_federation(mosquitto.url, task=WIDE)
    federation.start_agent("agent-0", part=0)
    federation.start_agent("agent-1", "--broker", proxy.url, part=1)
    proxy.up.bytes_per_s = proxy.down.bytes_per_s = 1_000_000
    coordinator = federation.start_coordinator(rounds=2, min_agents=2)
    num_cuts = 0
    for threshold in range(1, 9):
        seen = threshold * MODEL_BYTES / 4
        wait_until(lambda seen=seen: proxy.up.num_bytes + proxy.down.num_bytes > seen, f"{seen} bytes came through")
        num_cuts += proxy.cut(reset=reset)
    assert num_cuts >= 3
    recovery.tried(num_cuts)
    with recovery.watch():
        assert coordinator.wait() == 0
    assert_as_undisturbed(federation, 2)


@pytest.mark.long
@pytest.mark.fault(16)
def test_an_agent_whose_line_is_dead_is_marked_offline_and_its_round_goes_on_without_it(
    mosquitto, proxy, make_federation, recovery
):
    federation = make_federation(mosquitto.url)
    federation.hold("agent-1", training=1)
    federation.start_agent("agent-0", part=0)
    federation.start_agent("agent-1", "--broker", proxy.url, part=1, keepalive_s=KEEPALIVE_S)
    coordinator = federation.start_coordinator(rounds=2, min_agents=1, start_agents=2, **BATCHES)
    into_the_middle_of(federation, 1, coordinator)
    proxy.hold()
    with recovery.watch():  # the broker's patience, then the delay of the will: 1.5 x 2 s + 10 s
        federation.wait_for_round(1)
    assert federation.attempts(1)[1]["agent-1"] == "lost"
    recovery.lost(lost(federation, 1, {"agent-0"}))
    assert coordinator.wait() == 0
