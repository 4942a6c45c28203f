"""The doctor: can this agent work? Each finding is one line, with what to do where it is not well."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from edge_agent.config import Settings
from edge_agent.journal import Journal, JournalError, JournalInUseError
from midge import PROTOCOL, __version__
from midge.eventqueue import EventQueue
from midge.settings.words import plain_name
from midge.transport.address import Address
from midge.transport.base import (
    Connected,
    Disconnected,
    MessageReceived,
    Published,
    SubscriptionDenied,
    TransportEvent,
)
from midge.transport.mqtt import MqttTransport
from midge.wire.errors import WireError
from midge.wire.identifiers import task_name
from midge.wire.messages import CoordinatorStatus, Head, Progress, decode, encode
from midge.wire.topics import Topics

_M = TypeVar("_M", CoordinatorStatus, Head)
_LISTEN_S = 1.0
_COPIES = 6
"""A round holds about so many copies of a model in memory at once: global, local, gradients, momentum, update, slack."""
_LOADING = """
import json, sys
from pathlib import Path
from midge.tasks.base import DataSpec, TaskError
from midge.tasks.inspection import summarize
from midge.tasks.registry import find_task
reference, options = sys.argv[1], json.loads(sys.argv[2])
options["data_dir"] = Path(options["data_dir"]) if options["data_dir"] else None
options["classes"] = tuple(options["classes"])
try:
    task = find_task(reference)
    print(summarize(task, task.load_data(DataSpec(**options)), max_read=2000).line())
except TaskError as error:
    sys.exit(str(error))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, whether it is well, and what was seen or must be done."""

    what: str
    is_well: bool
    text: str


def examine(settings: Settings, address: Address, timeout_s: float) -> Iterator[Finding]:
    """Look at everything that an agent with these settings needs."""
    yield Finding(
        "version", is_well=True, text=f"Midge {__version__}, protocol {PROTOCOL}, Python {sys.version.split()[0]}"
    )
    yield _examine_state_dir(settings)
    yield from _examine_broker(settings, address, timeout_s)
    yield _examine_torch()
    yield _examine_data(settings)


def _examine_state_dir(settings: Settings) -> Finding:
    path = Path(settings.state_dir) / settings.federation / settings.agent_id
    try:
        Journal(path).close()
    except JournalInUseError:
        return Finding("state directory", is_well=True, text=f"{path} is in use by a running agent")
    except JournalError as error:
        return Finding("state directory", is_well=False, text=str(error))
    return Finding("state directory", is_well=True, text=f"{path} can be written")


def _examine_broker(settings: Settings, address: Address, timeout_s: float) -> Iterator[Finding]:
    queue: EventQueue[TransportEvent] = EventQueue()
    # Another client id than the agent's own, which may be at work: the broker would cut it off.
    transport = MqttTransport(address, f"{settings.agent_id[:55]}-doctor", queue, clean_start=True)
    transport.start()
    try:
        opened = _first(queue, (Connected, Disconnected), timeout_s)
        if not isinstance(opened, Connected):
            reason = (
                opened.reason if isinstance(opened, Disconnected) else f"{address}: no answer within {timeout_s:g} s"
            )
            yield Finding("broker", is_well=False, text=reason)
            return
        limit = f", packets up to {opened.packet_limit_bytes} bytes" if opened.packet_limit_bytes else ""
        yield Finding("broker", is_well=True, text=f"{address}: connected, MQTT {opened.version}{limit}")
        yield from _examine_topics(settings, transport, queue, timeout_s)
    finally:
        transport.stop()


def _examine_topics(
    settings: Settings, transport: MqttTransport, queue: EventQueue[TransportEvent], timeout_s: float
) -> Iterator[Finding]:
    topics = Topics(settings.federation)
    heads = f"{topics.prefix}/model/+/head"
    transport.subscribe([topics.coordinator, topics.rollcall, topics.inbox(settings.agent_id), heads])
    harmless = Progress(run_id="doctor", epoch=0, round_num=0, attempt=0, phase="fetching", fraction=0.0)
    transport.publish(topics.outbox(settings.agent_id), encode(harmless))
    events = list(_listen(queue, _LISTEN_S))
    denied = [topic for event in events if isinstance(event, SubscriptionDenied) for topic in event.topics]
    if denied:
        text = f"the broker denies {', '.join(denied)}: give this agent the rights that docs/operations.md lists"
        yield Finding("topics", is_well=False, text=text)
    elif not any(isinstance(event, Published) for event in events) and _first(queue, (Published,), timeout_s) is None:
        yield Finding("topics", is_well=False, text="the broker did not take a message; is it overloaded?")
    else:
        yield Finding("topics", is_well=True, text=f"can publish and read in federation {settings.federation}")
    messages = [event for event in events if isinstance(event, MessageReceived)]
    yield _examine_coordinator(messages, topics)
    yield from _examine_task(messages, settings, topics)
    yield _examine_memory(messages, settings)


def _examine_coordinator(messages: list[MessageReceived], topics: Topics) -> Finding:
    for message in messages:
        if message.topic == topics.coordinator:
            try:
                status = decode(message.payload, CoordinatorStatus)
            except WireError as error:
                return Finding("coordinator", is_well=False, text=f"its presence cannot be read: {error}")
            if status.protocol != PROTOCOL:
                text = f"speaks protocol {status.protocol}, this agent {PROTOCOL}: install the same Midge on both"
                return Finding("coordinator", is_well=False, text=text)
            state = "online" if status.online else "offline; an agent waits for it"
            return Finding("coordinator", is_well=True, text=f"Midge {status.version}, {state}")
    return Finding("coordinator", is_well=True, text="none was ever seen here; an agent waits for it")


def _examine_task(messages: list[MessageReceived], settings: Settings, topics: Topics) -> Iterator[Finding]:
    """Compare the agent's task with those of the coordinator that is online; nothing where it has published no run."""
    statuses = _decoded(messages, CoordinatorStatus, topics.coordinator)
    epochs = {status.epoch for status in statuses if status.online}
    heads = [head for head in _decoded(messages, Head, "/head") if head.epoch in epochs]
    if not heads:
        return
    own = task_name(settings.task)
    for head in heads:
        if head.task == own:
            yield Finding("run", is_well=True, text=f"{head.run_id} has this agent's task")
            return
    run_id, task = heads[0].run_id, plain_name(heads[0].task)
    text = f"{run_id} has task {task}, this agent {own}, so it would never be invited: start it with the run's --task"
    yield Finding("run", is_well=False, text=text)


def _decoded(messages: list[MessageReceived], kind: type[_M], ending: str) -> list[_M]:
    """The messages whose topics end so; without those that cannot be read, which others complain about."""
    found: list[_M] = []
    for message in messages:
        with contextlib.suppress(WireError):
            found += [decode(message.payload, kind)] if message.topic.endswith(ending) else []
    return found


def _examine_memory(messages: list[MessageReceived], settings: Settings) -> Finding:
    available_mb = _available_mb()
    if settings.max_memory_mb:
        available_mb = min(available_mb, settings.max_memory_mb)
    for head in _decoded(messages, Head, "/head"):
        needed_mb = _COPIES * 4 * sum(t.num_elements for t in head.layout if t.is_float) / 2**20
        needed = f"about {needed_mb:.0f} MB" if needed_mb >= 1 else "less than 1 MB"
        text = f"the model of {head.run_id} needs {needed}, {available_mb} MB are there"
        return Finding("memory", is_well=needed_mb <= available_mb, text=text)
    return Finding("memory", is_well=True, text=f"{available_mb} MB are there; no model is published yet")


def _examine_torch() -> Finding:
    code = "import torch; print(torch.__version__, torch.get_num_threads())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        text = f"cannot be imported ({_last_line(done.stderr)}): pip install 'midge[torch]', or use a task without it"
        return Finding("torch", is_well=False, text=text)
    version, threads = _last_line(done.stdout).split()
    return Finding("torch", is_well=True, text=f"{version}, {threads} threads")


def _examine_data(settings: Settings) -> Finding:
    options = {
        "data_dir": settings.data_dir or None,
        "classes": settings.classes,
        "sel_prob": settings.sel_prob,
        "def_prob": settings.def_prob,
        "partition": settings.partition,
        "part": settings.index,
        "num_parts": settings.of,
        "seed": settings.data_seed,
        "download": settings.download,
    }
    command = [sys.executable, "-c", _LOADING, settings.task, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return Finding("task and data", is_well=False, text=_last_line(done.stderr))
    return Finding("task and data", is_well=True, text=f"{settings.task}: {_last_line(done.stdout)}")


def _available_mb() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) // 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20


def _first(
    queue: EventQueue[TransportEvent], kinds: tuple[type[TransportEvent], ...], timeout_s: float
) -> TransportEvent | None:
    """The first event of these kinds; None if there is none in time."""
    for event in _listen(queue, timeout_s):
        if isinstance(event, kinds):
            return event
    return None


def _listen(queue: EventQueue[TransportEvent], timeout_s: float) -> Iterator[TransportEvent]:
    """What comes in this time, and all that has come when it is over: on a slow device one may be late to look."""
    end = time.monotonic() + timeout_s
    while events := queue.take(max(0.0, end - time.monotonic()), max_events=1):
        yield from events


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
