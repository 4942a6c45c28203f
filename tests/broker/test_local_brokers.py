"""Brokers that we start ourselves, and the configuration that we give to others."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from midge.transport import brokers
from midge.transport.base import Connected, MessageReceived

ROOT = Path(__file__).parents[2]
PATIENCE_S = 15.0

PARENT = """
import sys, time
from pathlib import Path
from midge.transport.brokers import start_local_broker
broker = start_local_broker(sys.argv[1], directory=Path(sys.argv[2]))
print(broker.pid, flush=True)
time.sleep(60)
"""


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while lives(pid):
        assert time.monotonic() < deadline, f"process {pid} lives"
        time.sleep(0.02)


@pytest.mark.parametrize("kind", ["mosquitto", "embedded"])
def test_a_local_broker_says_where_it_is_and_ends(tmp_path, kind):
    with brokers.start_local_broker(kind, directory=tmp_path / "new" / "directory") as broker:
        assert broker.kind == kind
        assert broker.url == f"mqtt://127.0.0.1:{broker.port}"
        assert repr(broker) == f"LocalBroker({kind!r}, {broker.url!r}, pid {broker.pid}, running)"
        assert os.getsid(broker.pid) == broker.pid  # Ctrl-C in our terminal does not reach it
        socket.create_connection(("127.0.0.1", broker.port)).close()
    assert not broker.is_running()
    assert not lives(broker.pid)
    broker.stop()  # a second time does nothing


@pytest.mark.parametrize("kind", ["mosquitto", "embedded"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_local_broker_does_not_outlive_us_however_we_end(tmp_path, kind, number):
    command = [sys.executable, "-c", PARENT, kind, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        pid = int(parent.stdout.readline())
        assert lives(pid)
        parent.send_signal(number)
        wait_for_end(pid)


@pytest.mark.parametrize(("installed", "kind"), [(True, "mosquitto"), (False, "embedded")])
def test_auto_takes_mosquitto_where_it_is_installed(tmp_path, monkeypatch, installed, kind):
    if not installed:
        monkeypatch.setattr(brokers, "find_mosquitto", lambda: None)
    with brokers.start_local_broker(directory=tmp_path) as broker:
        assert broker.kind == kind


def test_mosquitto_that_is_not_installed_is_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setattr(brokers, "find_mosquitto", lambda: None)
    with pytest.raises(brokers.BrokerError, match="mosquitto is not installed: install it"):
        brokers.start_local_broker("mosquitto", directory=tmp_path)


@pytest.mark.parametrize("kind", ["mosquitto", "embedded"])
def test_a_broker_that_does_not_start_says_why(tmp_path, kind):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            brokers.BrokerError, match=rf"the {kind} broker did not start on port {port}\. It said: .*in use"
        ):
            brokers.start_local_broker(kind, directory=tmp_path, port=port)


def test_an_option_that_mosquitto_does_not_know_is_shown(tmp_path):
    with pytest.raises(brokers.BrokerError, match="no_such_option"):
        brokers.start_local_broker("mosquitto", directory=tmp_path, options=["no_such_option 1"])


def adapted(text: str, directory: Path, port: int) -> str:
    """The configuration for operators, moved to where a test may write."""
    text = re.sub(r"^listener 1883$", f"listener {port} 127.0.0.1", text, flags=re.MULTILINE)
    text = text.replace("/mosquitto/data/", f"{directory}/").replace("/mosquitto/config/", f"{directory}/")
    return text + ("user root\n" if os.geteuid() == 0 else "")


@pytest.fixture
def start_configured(tmp_path, free_port):
    """Start Mosquitto with a changed mosquitto.conf of this repository, and return its URL."""
    started = []

    def start(change=lambda text: text) -> str:
        config = tmp_path / "mosquitto.conf"
        config.write_text(adapted(change((ROOT / "mosquitto.conf").read_text()), tmp_path, free_port))
        with (tmp_path / "mosquitto.log").open("w") as log:
            command = [brokers.find_mosquitto(), "-c", str(config)]
            started.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
        return f"mqtt://127.0.0.1:{free_port}"

    yield start
    for process in started:
        process.terminate()
        process.wait(PATIENCE_S)


def test_the_configuration_for_operators_loads_and_its_limits_hold(start_configured, tmp_path, peer):
    agent = peer(start_configured(), "a")
    assert agent.seen[-1] == Connected("5", packet_limit_bytes=2_000_000)
    agent.sync()
    log = (tmp_path / "mosquitto.log").read_text()
    assert "Error" not in log
    assert "Unknown configuration" not in log


@pytest.fixture
def users(start_configured, tmp_path, peer):
    """Connect as a user of a broker with passwords and the shipped access list, for the federation `f`."""
    text = (ROOT / "mosquitto.conf").read_text()
    rules = re.findall(r"^#   ((?:user|topic|pattern) .*)$", text, re.MULTILINE)
    assert len(rules) >= 8
    (tmp_path / "acl").write_text("\n".join(rules).replace("FEDERATION", "f") + "\n")
    for create, user in ((["-c"], "coordinator"), ([], "pi-3"), ([], "pi-4")):
        passwords = [*create, str(tmp_path / "passwords"), user, "s3cret"]
        subprocess.run(["mosquitto_passwd", "-b", *passwords], check=True, capture_output=True)

    def protect(text: str) -> str:
        text = text.replace("allow_anonymous true", "allow_anonymous false")
        for key in ("password_file", "acl_file", "use_username_as_clientid"):
            text = text.replace(f"#{key}", key)
        return text

    url = start_configured(protect)
    return lambda name, client_id="": peer(url, client_id or name, security={"username": name, "password": "s3cret"})


@pytest.mark.fault(19, 31)
def test_its_access_list_lets_an_agent_do_what_it_must_and_no_more(users):
    coordinator, agent = users("coordinator"), users("pi-3")
    own, other = "midge/1/f/agent/pi-3", "midge/1/f/agent/pi-4"
    coordinator.transport.subscribe(["midge/1/f/#"])
    coordinator.sync("midge/1/f")
    agent.transport.subscribe(["midge/1/f/#"])
    allowed = [f"{own}/presence", f"{own}/outbox", f"{own}/update/0/7"]
    denied = [f"{own}/inbox", f"{other}/outbox", "midge/1/f/model/r/head", "midge/1/f/coordinator", "elsewhere"]
    tokens = [agent.transport.publish(topic, b"x") for topic in [*denied, *allowed]]
    agent.expect_published(tokens[-1])
    for topic in allowed:
        coordinator.expect_message(topic)
    readable = ["midge/1/f/model/r/0/3", "midge/1/f/coordinator", "midge/1/f/rollcall", f"{own}/inbox"]
    for topic in [f"{other}/inbox", *readable]:
        coordinator.transport.publish(topic, b"y")
    for topic in readable:
        assert agent.expect_message(topic).payload == b"y"
    assert {event.topic for event in agent.seen if isinstance(event, MessageReceived)} == set(readable)
    assert {
        event.topic for event in coordinator.seen if isinstance(event, MessageReceived) and event.payload == b"x"
    } == set(allowed)


@pytest.mark.fault(31)
@pytest.mark.parametrize(
    "pattern",
    ["#", "+/+/#", "midge/1/f/#", "midge/1/f/agent/+/update/#", "midge/1/f/agent/pi-4/inbox", "$share/all/midge/#"],
)
def test_a_rogue_subscription_yields_nothing_of_others(users, pattern):
    coordinator, other, rogue = users("coordinator"), users("pi-4"), users("pi-3")
    rogue.transport.subscribe([pattern])
    secrets = {f"midge/1/f/agent/pi-4/{name}": other for name in ("presence", "outbox", "update/0/0", "update/0/1")}
    secrets["midge/1/f/agent/pi-4/inbox"] = coordinator
    for topic, sender in secrets.items():
        sender.expect_published(sender.transport.publish(topic, b"not for pi-3", retain=True))
    own = "midge/1/f/agent/pi-3/inbox"
    coordinator.expect_published(coordinator.transport.publish(own, b"for pi-3", retain=True))
    rogue.transport.subscribe([pattern])  # once more: what is retained comes now, and before what is asked for next
    rogue.transport.subscribe([own])
    rogue.expect(MessageReceived, lambda event: event.topic == own and event.retained)
    assert not [event for event in rogue.seen if isinstance(event, MessageReceived) and event.topic in secrets]
    for topic in secrets:  # they are there, for whom they concern
        coordinator.transport.subscribe([topic])
        assert coordinator.expect_message(topic).payload == b"not for pi-3"


@pytest.mark.fault(17, 31)
def test_nobody_takes_the_place_of_anothers_connection(users):
    agent = users("pi-3")
    assert isinstance(agent.seen[-1], Connected)
    users("pi-4", client_id="pi-3")
    agent.watch(0.5)
    assert isinstance(agent.seen[-1], Connected)
