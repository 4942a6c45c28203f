"""The doctor: one line for each thing, and what to do where it is not well. The broker is played by the test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from edge_agent import doctor
from edge_agent.config import Settings
from edge_agent.doctor import Finding, examine
from edge_agent.journal import Journal
from midge import PROTOCOL, __version__
from midge.eventqueue import EventQueue
from midge.transport.address import Address
from midge.transport.base import (
    Connected,
    Disconnected,
    MessageReceived,
    Published,
    SubscriptionDenied,
    TransportEvent,
)
from midge.wire.layout import TensorSpec
from midge.wire.messages import CoordinatorStatus, Head, encode

ROOT = Path(__file__).parents[2]
COORDINATOR = "midge/1/lab/coordinator"
HEAD = "midge/1/lab/model/digits-1/head"


def status(*, online: bool = True, protocol: int = PROTOCOL) -> bytes:
    return encode(CoordinatorStatus(online=online, epoch=1, instance="i", protocol=protocol, version="0.9"))


def head(num_elements: int, task: str = "tests.unit.tiny_tasks:tiny", epoch: int = 1) -> bytes:
    return encode(
        Head(
            run_id="digits-1",
            epoch=epoch,
            round_num=0,
            slot=0,
            model_digest="ab" * 32,
            layout=(TensorSpec("w", (num_elements,), "float32"),),
            frame_elements=16_384,
            codec="float32",
            counters=(),
            task=task,
        )
    )


class FakeBroker:
    """What the broker answers, and a transport to it."""

    def __init__(self) -> None:
        self.opening: list[TransportEvent] = [Connected("5", 262_144)]
        self.retained: dict[str, bytes] = {}
        self.denied: tuple[str, ...] = ()
        self.takes_messages = True
        self.client_ids: list[str] = []
        self.published: list[str] = []
        self.num_stopped = 0
        self.queue: EventQueue[TransportEvent] = EventQueue()

    def __call__(self, address: Address, client_id: str, queue: EventQueue[TransportEvent], **_) -> FakeBroker:
        self.queue = queue
        self.client_ids.append(client_id)
        return self

    def start(self) -> None:
        for event in self.opening:
            self.queue.put(event)

    def subscribe(self, topics: Sequence[str], *, qos: int = 1) -> None:
        for topic, payload in self.retained.items():
            self.queue.put(MessageReceived(topic, payload, retained=True))
        if self.denied:
            self.queue.put(SubscriptionDenied(self.denied))

    def publish(self, topic: str, payload: bytes, **_) -> int:
        self.published.append(topic)
        if self.takes_messages:
            self.queue.put(Published(1))
        return 1

    def stop(self) -> None:
        self.num_stopped += 1


@pytest.fixture
def broker(monkeypatch) -> FakeBroker:
    made = FakeBroker()
    monkeypatch.setattr(doctor, "MqttTransport", made)
    monkeypatch.setattr(doctor, "_LISTEN_S", 0.01)
    return made


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(
        agent_id="pi-1", federation="lab", state_dir=str(tmp_path / "state"), task="tests.unit.tiny_tasks:tiny", index=1
    )


@pytest.fixture
def without_processes(monkeypatch):
    """No torch is imported and no data are loaded: that is for tests of their own."""

    def run(command, **_) -> subprocess.CompletedProcess[str]:
        says = "2.9.1 1\n" if "torch" in command[2] else "downloading...\n1797 examples, labels 0:178\n"
        return subprocess.CompletedProcess(command, 0, says, "")

    monkeypatch.setattr(subprocess, "run", run)


def looked(settings: Settings, timeout_s: float = 0.05) -> dict[str, Finding]:
    found = list(examine(settings, Address.parse("mqtt://broker:1883"), timeout_s))
    for finding in found:
        assert finding.text, finding
        assert "\n" not in finding.text, finding
    return {finding.what: finding for finding in found}


@pytest.mark.usefixtures("without_processes")
def test_where_all_is_well_each_thing_is_looked_at_and_says_so(broker, settings):
    broker.retained = {COORDINATOR: status(), HEAD: head(2**18)}
    found = looked(settings)
    assert list(found) == [
        "version",
        "state directory",
        "broker",
        "topics",
        "coordinator",
        "run",
        "memory",
        "torch",
        "task and data",
    ]
    assert all(finding.is_well for finding in found.values()), found
    assert f"Midge {__version__}, protocol {PROTOCOL}" in found["version"].text
    assert found["broker"].text == "mqtt://broker:1883: connected, MQTT 5, packets up to 262144 bytes"
    assert found["coordinator"].text == "Midge 0.9, online"
    # 2^18 elements are 1 MiB, of which a round holds 6 copies.
    assert found["memory"].text.startswith("the model of digits-1 needs about 6 MB, ")
    assert found["torch"].text == "2.9.1, 1 threads"
    assert found["task and data"].text == "tests.unit.tiny_tasks:tiny: 1797 examples, labels 0:178"


@pytest.mark.usefixtures("without_processes")
def test_it_neither_cuts_off_the_agent_nor_says_anything_that_counts(broker, settings):
    looked(settings)
    assert broker.client_ids == ["pi-1-doctor"]
    assert broker.published == ["midge/1/lab/agent/pi-1/outbox"]
    assert broker.num_stopped == 1


@pytest.mark.usefixtures("without_processes")
@pytest.mark.parametrize(
    ("opening", "text"),
    [
        ([Disconnected("mqtt://broker:1883: connection refused: is a broker running there?")], "is a broker running"),
        ([], "mqtt://broker:1883: no answer within 0.05 s"),
    ],
)
def test_a_broker_that_cannot_be_reached_is_one_finding_and_the_rest_is_looked_at(broker, settings, opening, text):
    broker.opening = opening
    found = looked(settings)
    assert not found["broker"].is_well
    assert text in found["broker"].text
    assert not {"topics", "coordinator", "memory"} & set(found)
    assert found["task and data"].is_well
    assert broker.num_stopped == 1


@pytest.mark.usefixtures("without_processes")
def test_topics_that_are_denied_are_named(broker, settings):
    broker.denied = (COORDINATOR,)
    finding = looked(settings)["topics"]
    assert not finding.is_well
    assert finding.text == f"the broker denies {COORDINATOR}: give this agent the rights that docs/operations.md lists"


@pytest.mark.usefixtures("without_processes")
def test_a_broker_that_takes_no_message_is_not_well(broker, settings):
    broker.takes_messages = False
    finding = looked(settings)["topics"]
    assert (finding.is_well, finding.text) == (False, "the broker did not take a message; is it overloaded?")


@pytest.mark.usefixtures("without_processes")
@pytest.mark.parametrize(
    ("payload", "is_well", "text"),
    [
        (None, True, "none was ever seen here; an agent waits for it"),
        (status(online=False), True, "Midge 0.9, offline; an agent waits for it"),
        (status(protocol=PROTOCOL + 1), False, f"speaks protocol {PROTOCOL + 1}, this agent {PROTOCOL}"),
        (b"garbage", False, "its presence cannot be read: "),
    ],
)
def test_what_the_coordinator_says_of_itself_is_told(broker, settings, payload, is_well, text):
    broker.retained = {} if payload is None else {COORDINATOR: payload}
    finding = looked(settings)["coordinator"]
    assert finding.is_well is is_well
    assert text in finding.text


@pytest.mark.usefixtures("without_processes")
def test_a_model_that_needs_more_memory_than_is_allowed_is_not_well(broker, settings, tmp_path):
    broker.retained = {HEAD: head(10 * 2**18)}  # 10 MiB
    tight = Settings(agent_id="pi-1", federation="lab", state_dir=str(tmp_path), max_memory_mb=59)
    finding = looked(tight)["memory"]
    assert (finding.is_well, finding.text) == (False, "the model of digits-1 needs about 60 MB, 59 MB are there")
    enough = Settings(agent_id="pi-1", federation="lab", state_dir=str(tmp_path), max_memory_mb=60)
    assert looked(enough)["memory"].is_well


@pytest.mark.usefixtures("without_processes")
def test_a_run_of_another_task_is_not_well_since_the_agent_would_never_be_invited(broker, settings):
    broker.retained = {COORDINATOR: status(), HEAD: head(10, task="two_workers.py")}
    finding = looked(settings)["run"]
    assert not finding.is_well
    assert finding.text.startswith("digits-1 has task two_workers.py, this agent tests.unit.tiny_tasks:tiny, so ")
    broker.retained = {COORDINATOR: status(), HEAD: head(10)}
    assert looked(settings)["run"] == Finding("run", is_well=True, text="digits-1 has this agent's task")


@pytest.mark.usefixtures("without_processes")
@pytest.mark.parametrize("said", [status(online=False), b"garbage"])
def test_a_head_that_an_earlier_coordinator_left_says_nothing_of_the_run(broker, settings, said):
    broker.retained = {COORDINATOR: said, HEAD: head(10, task="another")}
    assert "run" not in looked(settings)
    broker.retained = {COORDINATOR: status(), HEAD: head(10, task="another", epoch=0)}
    assert "run" not in looked(settings)


@pytest.mark.usefixtures("without_processes")
def test_a_small_model_does_not_need_nothing(broker, settings):
    broker.retained = {HEAD: head(10)}
    assert looked(settings)["memory"].text.startswith("the model of digits-1 needs less than 1 MB, ")


@pytest.mark.usefixtures("without_processes")
def test_a_head_that_cannot_be_read_is_no_model(broker, settings):
    broker.retained = {HEAD: b"garbage"}
    assert looked(settings)["memory"].text.endswith(" MB are there; no model is published yet")


@pytest.mark.usefixtures("without_processes")
def test_a_state_directory_in_which_the_agent_is_running_is_well(broker, settings, tmp_path):
    journal = Journal(tmp_path / "state" / "lab" / "pi-1")
    finding = looked(settings)["state directory"]
    journal.close()
    assert finding.is_well
    assert finding.text.endswith("is in use by a running agent")
    assert looked(settings)["state directory"].is_well


def test_data_are_loaded_as_the_agent_would_whatever_is_printed_meanwhile(settings, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = doctor._examine_data(settings)
    assert found == Finding("task and data", is_well=True, text="tests.unit.tiny_tasks:tiny: 2 examples")


def test_data_that_are_missing_are_told_in_the_tasks_own_words(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    settings = Settings(agent_id="pi-1", task="tests.unit.tiny_tasks:dataless", data_dir="/data")
    found = doctor._examine_data(settings)
    assert found == Finding("task and data", is_well=False, text="no examples in /data: put some there")


def test_without_torch_it_says_how_to_install_it(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = doctor._examine_torch()
    assert not found.is_well
    assert found.text == (
        "cannot be imported (ImportError: libgomp.so.1: cannot open shared object file): "
        "pip install 'midge[torch]', or use a task without it"
    )


def test_memory_is_found_where_there_is_no_proc_too(monkeypatch):
    seen = doctor._available_mb()
    assert 0 < seen <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(OSError))
    assert doctor._available_mb() >= seen


def test_what_says_nothing_has_no_last_line():
    assert doctor._last_line("a\nb\n\n") == "b"
    assert doctor._last_line(" \n") == "no reason given"
    assert sys.version.split()[0] in next(iter(examine(Settings(agent_id="a"), Address.parse("mqtt://b"), 0.1))).text
