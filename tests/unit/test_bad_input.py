"""Bad input, as a matrix: each kind of it in each type of message, at the driver that reads that type.

Each cell is refused with a reason, counted, and changes nothing: not what the process is doing, not what it says, not its disk.
Then the work that it interrupted goes to its end. What a header of an update may claim, and what frames may add up to, is in
test_admission.py and test_attempt.py; that the counts are metrics, in test_observer.py and tests/broker/test_long_runs.py.
"""

from __future__ import annotations

import copy
import gzip
import json
import pickle
import re
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent.agent import AgentState
from edge_agent.journal import Journal
from midge.transport.mqtt import MAX_INCOMING_BYTES
from midge.wire.errors import MessageError
from midge.wire.frames import FLOAT32, encode_frame
from midge.wire.messages import (
    MAX_MESSAGE_BYTES,
    Acceptance,
    Credit,
    Message,
    Presence,
    Progress,
    Receipt,
    Refusal,
    RollCall,
    decode,
    decode_to_agent,
    decode_to_coordinator,
    encode,
)
from tests.machines import presence
from tests.unit import test_agent_driver as agents
from tests.unit import test_coordinator_driver as coordinators

EXECUTED: list[str] = []


def execute(word: str) -> None:
    EXECUTED.append(word)


class Poison:
    """What runs code in whoever unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return execute, ("unpickled",)


# The two sides, each in the middle of its work.


class Coordinator:
    """It collects: the update of `a` is announced, and a frame of it is here."""

    def __init__(self, directory: Path) -> None:
        self.talk = coordinators.Talk(directory)
        self.talk.to_collecting()
        self.talk.say("a", self.talk.header())
        self.talk.send_frames("a", 0)
        self.talk.turn()
        address = self.talk.address
        outbox, topics = coordinators.TOPICS.outbox("a"), coordinators.TOPICS
        self.messages: dict[str, tuple[str, bytes]] = {
            "coordinator": (topics.coordinator, coordinators.status(coordinators.EPOCH - 1)),
            "presence": (topics.presence("a"), encode(presence())),
            "acceptance": (outbox, encode(Acceptance(**address))),
            "refusal": (outbox, encode(Refusal(**address, reason="busy"))),
            "progress": (outbox, encode(Progress(**address, phase="training", fraction=0.5))),
            "update header": (outbox, encode(self.talk.header())),
            "update frame": (topics.update_frame("a", 0, 1), coordinators.frame(1)),
        }

    @property
    def num_refused(self) -> int:
        return sum(self.talk.observer.num_refused.values())

    def hear(self, name: str, payload: bytes) -> list[Any]:
        """What it says then; but its own presence, which it says again where something else is retained, is no answer."""
        self.talk.hear(self.messages[name][0], payload, retained=True)
        return [each for each in self.talk.turn() if each.topic != coordinators.TOPICS.coordinator]

    def state(self) -> object:
        run = self.talk.driver.run
        kept = (run.state, run.epoch, run.attempt.round.members, run.tallies.counts, run.attempt.uplink.transfers)
        return copy.deepcopy((kept, self.talk.driver.fleet.agents, self.talk.spool.frames, self.talk.store.agents))

    def finish(self) -> None:
        self.talk.send_frames("a", 1, 2)
        assert coordinators.told(self.talk.turn(), Receipt)["a"].accepted


class Agent:
    """It fetches a model, of which a frame is here; its own update is yet to come."""

    def __init__(self, directory: Path) -> None:
        self.journal = Journal(directory)
        self.talk = agents.Talk(self.journal)
        self.talk.to_fetching()
        self.talk.frame(2)
        told = agents.ADDRESS
        self.messages: dict[str, tuple[str, bytes]] = {
            "coordinator status": (agents.TOPICS.coordinator, encode(agents.status())),
            "roll call": (agents.TOPICS.rollcall, encode(RollCall(epoch=1, spread_s=1.0))),
            "head": (agents.TOPICS.head("r1"), encode(agents.HEAD)),
            "model frame": (agents.FRAMES[0], agents.frame(0)),
            "invitation": (agents.INBOX, encode(msgspec.structs.replace(agents.INVITATION, attempt=2))),
            "credit": (agents.INBOX, encode(Credit(**told, missing=((0, 3),), credit=2))),
            "receipt": (agents.INBOX, encode(Receipt(**told, update_digest="ab" * 32, accepted=True))),
            "cancel": (agents.INBOX, encode(agents.Cancel(**told, reason="closed"))),
        }

    @property
    def num_refused(self) -> int:
        return self.talk.driver.num_invalid

    def hear(self, name: str, payload: bytes) -> list[Any]:
        return self.talk.hear(self.messages[name][0], payload, retained=True)

    def state(self) -> object:
        agent = self.talk.agent
        kept = (agent.work, agent.epoch, agent.invitation, agent.head, agent.update, len(self.talk.trainer.trainings))
        files = {path.name: path.read_bytes() for path in self.journal.path.iterdir()}
        return copy.deepcopy((kept, sorted(agent._pull.arrived), files))

    def finish(self) -> None:
        for index in (0, 1):
            self.talk.frame(index)
        assert self.talk.agent.work is AgentState.TRAINING


@pytest.fixture
def sides(tmp_path):
    (tmp_path / "coordinator").mkdir()
    agent = Agent(tmp_path / "agent")
    yield Coordinator(tmp_path / "coordinator"), agent
    agent.journal.close()


# Kinds of bad input. Each makes something bad of a valid payload.


def with_field(payload: bytes, value: bytes) -> bytes:
    """A field that nobody knows, which a receiver ignores if it can be read at all."""
    return payload[:-1] + b',"surplus":' + value + b"}"


def with_other(payload: bytes, pattern: bytes, value: bytes) -> bytes:
    """The first match of a pattern replaced."""
    changed, count = re.subn(pattern, lambda _: value, payload, count=1)
    assert count == 1
    return changed


NUMBER = rb"(?<=:)-?\d+(\.\d+)?"
MESSAGES: dict[str, Any] = {
    "nothing but spaces": (8, lambda _: b"   "),
    "cut in the middle": (8, lambda p: p[: len(p) // 2]),
    "cut by one byte": (8, lambda p: p[:-1]),
    "twice in one": (8, lambda p: p + p),
    "not UTF-8": (8, lambda p: with_other(p, rb'(?<="type":")', b"\xff\xfe")),
    "above 4 MiB": (9, lambda p: with_field(p, b'"' + b"x" * MAX_MESSAGE_BYTES + b'"')),
    "NaN": (10, lambda p: with_field(p, b"NaN")),
    "infinity": (10, lambda p: with_field(p, b"[1e3,-Infinity]")),
    "of a type that there is not": (11, lambda p: with_other(p, rb'(?<="type":")[a-z]+', b"object")),
    "an array of the fields": (11, lambda p: json.dumps(list(json.loads(p).values())).encode()),
    "no field at all": (11, lambda p: b'{"type":"%s"}' % json.loads(p)["type"].encode()),
    "a number that is text": (12, lambda p: with_other(p, NUMBER, b'"1e18"')),
    "a number that is true": (12, lambda p: with_other(p, NUMBER, b"true")),
    "a negative number": (12, lambda p: with_other(p, NUMBER, b"-1")),
    "a number of 1e18": (12, lambda p: with_other(p, NUMBER, b"1" + b"0" * 18)),
    "compressed by zstd": (21, lambda p: b"\x28\xb5\x2f\xfd\x04\x00" + p),
    "a gzip of 256 KiB of it": (21, lambda p: gzip.compress(p + b" " * 262_144)),
    "deflated": (21, zlib.compress),
    "a pickle": (22, lambda _: pickle.dumps(Poison())),
    "a pickle in a field": (22, lambda p: with_field(p, pickle.dumps(Poison(), 0))),
    "an array of objects": (
        22,
        lambda _: b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    ),
    "an array of 8e9 elements": (24, lambda _: b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'shape': (8000000000,), }"),
    "msgpack of 2^32 elements": (24, lambda _: b"\xdd\xff\xff\xff\xff"),
    "nested a million deep": (24, lambda p: with_field(p, b"[" * 1_000_000)),
    "nested deep, and closed": (24, lambda p: with_field(p, b"[" * 100_000 + b"]" * 100_000)),
    "objects nested deep": (24, lambda p: with_field(p, b'{"a":' * 100_000 + b"1" + b"}" * 100_000)),
    "a number of a million digits": (24, lambda p: with_other(p, NUMBER, b"9" * 1_000_000)),
    "a number of 1e999999": (24, lambda p: with_other(p, NUMBER, b"1e999999")),
}
"""By name: the number of the fault, and what makes it."""


def with_checksum(frame: bytes) -> bytes:
    """Whoever makes frames makes their checksums too."""
    return frame[:36] + struct.pack("<I", zlib.crc32(frame[40:], zlib.crc32(frame[:36]))) + frame[40:]


def with_header(frame: bytes, at: int, form: str, value: int) -> bytes:
    return with_checksum(frame[:at] + struct.pack(form, value) + frame[at + struct.calcsize(form) :])


def with_body(frame: bytes, body: bytes) -> bytes:
    return with_checksum(frame[:24] + struct.pack("<I", len(body)) + frame[28:40] + body)


FRAMES: dict[str, Any] = {
    "cut in its header": (8, lambda f: f[:30]),
    "cut in its body": (8, lambda f: f[:-1]),
    "a byte too many": (8, lambda f: f + b"\0"),
    "a bit of its body changed": (8, lambda f: f[:-1] + bytes([f[-1] ^ 1])),
    "a bit of its checksum changed": (8, lambda f: f[:36] + bytes([f[36] ^ 1]) + f[37:]),
    "of another version": (8, lambda f: with_header(f, 2, "B", 2)),
    "of codec 0": (21, lambda f: with_header(f, 3, "B", 0)),
    "of codec 2, which is not yet": (21, lambda f: with_header(f, 3, "B", 2)),
    "of codec 1 with a flag": (21, lambda f: with_header(f, 3, "B", 0x81)),
    "a body that was compressed": (21, lambda f: with_body(f, zlib.compress(bytes(1_000_000)))),
    "a body of zstd": (21, lambda f: with_body(f, b"\x28\xb5\x2f\xfd" + bytes(8))),
    "a body of 1 MiB": (9, lambda f: with_body(f, bytes(2**20))),
    "a body that is a pickle": (22, lambda f: with_body(f, pickle.dumps(Poison()))),
    "2^32 - 1 elements": (24, lambda f: with_header(f, 20, "<I", 2**32 - 1)),
    "a length of 4 GiB": (24, lambda f: with_header(f, 24, "<I", 2**32 - 1)),
    "no body": (24, lambda f: with_body(f, b"")),
    "a pickle": (22, lambda _: pickle.dumps(Poison())),
    "JSON": (11, lambda _: encode(RollCall(epoch=1))),
}


def cases(table: dict[str, Any]) -> list[Any]:
    return [pytest.param(name, make, id=name, marks=pytest.mark.fault(fault)) for name, (fault, make) in table.items()]


def check(sides: tuple[Coordinator, Agent], make: Callable[[bytes], bytes], names: Callable[[str], bool]) -> int:
    """Put it into all messages of these names, at whoever reads them; how many those are."""
    num_cells = 0
    for side in sides:
        for name, (_, payload) in side.messages.items():
            if not names(name):
                continue
            before, num_refused = side.state(), side.num_refused
            assert side.hear(name, make(payload)) == [], name
            assert side.num_refused == num_refused + 1, name
            assert side.state() == before, name
            num_cells += 1
        side.finish()
    assert EXECUTED == []
    return num_cells


@pytest.mark.parametrize(("name", "make"), cases(MESSAGES))
def test_a_bad_message_of_any_type_is_refused_counted_and_changes_nothing(sides, recovery, name, make):
    assert check(sides, make, lambda kind: "frame" not in kind) == 13
    recovery.tried(13)


@pytest.mark.parametrize(("name", "make"), cases(FRAMES))
def test_a_bad_frame_of_a_model_or_an_update_is_refused_counted_and_changes_nothing(sides, recovery, name, make):
    assert check(sides, make, lambda kind: "frame" in kind) == 2
    recovery.tried(2)


@pytest.mark.fault(22)
def test_the_pickle_of_these_tests_would_run_code_in_whoever_reads_it():
    pickle.loads(pickle.dumps(Poison()))  # noqa: S301
    assert EXECUTED.pop() == "unpickled"


@pytest.mark.fault(19)
def test_a_message_on_the_topic_of_another_kind_is_refused(sides):
    coordinator, agent = sides
    for name in ("invitation", "credit", "receipt", "cancel"):
        for topic in ("acceptance", "presence", "coordinator"):
            assert coordinator.hear(topic, agent.messages[name][1]) == []
    assert coordinator.num_refused == 12
    for name in ("acceptance", "refusal", "progress", "update header", "presence"):
        for topic in ("invitation", "coordinator status", "head", "roll call"):
            assert agent.hear(topic, coordinator.messages[name][1]) == []
    assert agent.num_refused == 20
    coordinator.finish()
    agent.finish()


@pytest.mark.fault(19)
def test_who_an_agent_is_the_topic_says_and_nothing_else(sides):
    """An update of `a` that comes from `b` counts as one of `b`; of a stranger, as none, and it is told why."""
    talk = sides[0].talk
    before = dict(talk.driver.run.attempt.uplink.transfers["a"].frames)
    talk.send_frames("stranger", 1)
    talk.say("stranger", talk.header(num_examples=9))
    receipt = coordinators.told(talk.turn(), Receipt)["stranger"]
    assert (receipt.accepted, receipt.reason) == (False, "identity")
    assert talk.driver.run.attempt.uplink.transfers["a"].frames == before
    sides[0].finish()


@pytest.mark.fault(18)
def test_whatever_was_said_in_a_round_changes_nothing_when_it_is_said_again_in_the_next(sides):
    talk = sides[0].talk
    recorded = [talk.header(), Acceptance(**talk.address), Progress(**talk.address, phase="training", fraction=0.1)]
    frames = [coordinators.frame(index) for index in range(3)]
    sides[0].finish()
    talk.update("b")
    talk.turn()
    digest = talk.models.save_state({"w": coordinators.np.ones(10, coordinators.np.float32)})
    talk.driver.step(coordinators.ev.UpdatesAggregated(digest, 1.0, None), talk.now)
    talk.turn()
    assert talk.driver.run.current_round == 2
    before = copy.deepcopy((talk.driver.run.attempt.round.members, talk.spool.frames))
    for agent_id in "ab":
        for message in recorded:
            talk.say(agent_id, message)
        for index, payload in enumerate(frames):
            talk.hear(coordinators.TOPICS.update_frame(agent_id, 0, index), payload)
    sent = talk.turn()
    assert {cancel.round_num for cancel in coordinators.told(sent, coordinators.Cancel).values()} == {1}
    assert (talk.driver.run.attempt.round.members, talk.spool.frames) == before
    assert talk.driver.run.tallies.counts["late", "stale"] == 2


# Bombs: what they ask for is never made room for.


@pytest.mark.fault(21, 24)
@pytest.mark.parametrize(
    "read", [decode_to_agent, decode_to_coordinator, lambda p: decode(p, Presence)], ids=["inbox", "outbox", "presence"]
)
def test_no_message_takes_memory_out_of_proportion(read):
    bombs = [
        b'{"type":"credit","missing":[' + b"[0,1]," * 50_000 + b"[0,1]]}",
        b'{"type":"update","counters":[' + b"1," * 150_000 + b"1]}",
        b'{"type":"update","metrics":{' + b",".join(b'"%07d":1' % n for n in range(30_000)) + b"}}",
        b'{"type":"refusal","detail":"' + b"\\u0041" * 50_000 + b'"}',
    ]
    for bomb in bombs:
        assert len(bomb) < MAX_MESSAGE_BYTES
        tracemalloc.start()
        try:
            with pytest.raises(MessageError):
                read(bomb)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak_bytes < 32 * len(bomb)


@pytest.mark.fault(21, 24)
def test_a_frame_takes_no_memory_at_all_before_its_size_is_known_to_be_right(sides):
    """Bounded by the layout: what the header claims is compared with what came, and nothing is made room for."""
    coordinator, agent = sides
    frame = encode_frame(
        codec=FLOAT32,
        run_tag=coordinators.run_tag(coordinators.RUN_ID),
        round_num=1,
        index=1,
        num_elements=2**32 - 1,
        content_tag=coordinators.content_tag(coordinators.DIGEST),
        body=bytes(16),
    )
    tracemalloc.start()
    try:
        coordinator.hear("update frame", frame)
        agent.hear("model frame", frame)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2**20


@pytest.mark.fault(9)
def test_a_packet_above_what_any_message_may_be_is_not_even_taken_from_a_broker_that_speaks_version_5():
    assert MAX_MESSAGE_BYTES < MAX_INCOMING_BYTES < 2 * MAX_MESSAGE_BYTES


def test_every_message_is_in_the_matrix(sides):
    """But two names for one: the presence of the coordinator, which both sides read."""
    kinds = {type_of(payload) for side in sides for name, (_, payload) in side.messages.items() if "frame" not in name}
    assert kinds == {kind.__struct_config__.tag for kind in Message.__args__}


def type_of(payload: bytes) -> str:
    return str(json.loads(payload)["type"])
